"""What a stage's logs tell beside its losses: speed, the time that is left, gates by layer; and warnings where training goes wrong."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from layalign import shards
from layalign.projections import attention_modules

if TYPE_CHECKING:
    from transformers import TrainerState

    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.stage_recipe import StageRecipe

# Of a log: differ from run to run.
TIMINGS = ("runtime", "per_second", "remaining_seconds")
# Speed is taken over so many logs.
_WINDOW = 10
# Steps of rising or full learning rate after which a gate that has learnt anything is further from 0 than this.
_GATE_STEPS, _GATE_ZERO = 20, 1e-7
# A loss is looked at after so many steps, by the medians of so many logs.
_LOSS_STEPS, _LOSS_LOGS = 100, 5
_MASKS = {"encoder_attention_mask": "encoder_input_ids", "attention_mask": "input_ids"}


class Watch:
    """Watches one stage. Nothing here waits for a GPU but at a log, where the Trainer waits too.

    Args:
        name: of the stage.
        stage: its recipe.
        model: of which the gates are read.

    Attributes:
        warnings: (step, text) of those given.
    """

    def __init__(self, name: str, stage: StageRecipe, model: LayAlignForConditionalGeneration):
        self.name, self.stage, self.model = name, stage, model
        self.warnings: list[tuple[int, str]] = []
        self._tokens: torch.Tensor | int = 0
        self._intervals: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._first_step_alone: bool | None = None  # None: nothing has been logged yet
        self._warned: set[str] = set()
        self._gates: dict[int, list[torch.Tensor]] | None = None
        self._paused = self._evaluation = 0.0
        self._logged_at, self._logged_step = time.monotonic(), 0

    def begin(self, step: int) -> None:
        """Count time from here: a stage begins, or goes on, at a step."""
        self._logged_at, self._logged_step, self._paused = time.monotonic(), step, 0.0
        self._intervals.clear()
        self._first_step_alone = None
        # Now and not before: an engine may have replaced the parameters. Looked for once: it takes milliseconds.
        self._gates = gates_of(self.model)

    def count(self, batch: Mapping[str, Any]) -> None:
        """Add the real tokens of a batch, the encoder's and the LLM's: one kernel each, which nobody waits for."""
        for mask, ids in _MASKS.items():
            if self.model.encoder is None and ids == "encoder_input_ids":
                continue  # nobody reads them
            if mask in batch:
                self._tokens = self._tokens + batch[mask].sum()
            elif ids in batch:
                self._tokens = self._tokens + batch[ids].numel()

    @contextmanager
    def paused(self, evaluation: bool = False) -> Iterator[None]:
        """The block's time is no training: a checkpoint, or an evaluation, whose like are still to come."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._paused += seconds
            if evaluation:
                self._evaluation = seconds

    def figures(self, state: TrainerState, gather: Any) -> dict[str, float]:
        """What is logged beside a loss; all processes call it together.

        Args:
            state: the Trainer's.
            gather: from a (1,) tensor of this process, wherever it lies, to those of all.

        Returns:
            tokens_per_second since the last log, over all processes, evaluations and checkpoints left out; remaining_seconds of
            the stage, where it is known how many steps it has; gate_mean and gate_layer_N, absolute values.
        """
        now = time.monotonic()
        steps, seconds = state.global_step - self._logged_step, now - self._logged_at - self._paused
        tokens = torch.as_tensor(self._tokens).reshape(1)
        self._tokens, self._paused = 0, 0.0
        self._logged_at, self._logged_step = now, state.global_step
        figures: dict[str, float] = {}
        if steps > 0 and seconds > 0:
            figures["tokens_per_second"] = int(gather(tokens).sum()) / seconds
            # The first step compiles and allocates: it tells only as long as there are no others.
            if self._first_step_alone:
                self._intervals.clear()
            self._first_step_alone = self._first_step_alone is None and steps == 1
            self._intervals.append((steps, seconds))
            figures["remaining_seconds"] = self._remaining(state)
        return figures | gate_figures(gates_of(self.model) if self._gates is None else self._gates)

    def _remaining(self, state):
        steps, seconds = (sum(column) for column in zip(*self._intervals, strict=True))
        left = state.max_steps - state.global_step
        evaluations = left // self.stage.eval_steps if self.stage.eval_steps else 0
        return left * seconds / steps + evaluations * self._evaluation

    def look(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Warn, once each in a stage, of what has gone wrong without ending training.

        Args:
            state: the Trainer's, with this log in its history.
            logs: the present log.
        """
        step = state.global_step
        if "eval_loss" in logs and not math.isfinite(logs["eval_loss"]):
            self._warn(step, "eval_loss", f"the held-out loss is {logs['eval_loss']}: look at the held-out records")
        if "loss" not in logs:
            return
        warmup = math.ceil(state.max_steps * self.stage.warmup_ratio)
        gates = [value for key, value in logs.items() if key.startswith("gate_layer_")]
        if gates and step >= _GATE_STEPS + warmup // 2 and max(gates) < _GATE_ZERO:
            self._warn(
                step,
                "gates",
                f"all gates are still 0 after {step} steps: the LLM reads nothing through the aligner. Try a learning_rate above "
                f"{self.stage.learning_rate:g}, and see that grad_norm is not 0 and that no source is empty",
            )
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if step < max(_LOSS_STEPS, warmup) or len(losses) < 2 * _LOSS_LOGS:
            return
        first, last = median(losses[:_LOSS_LOGS]), median(losses[-_LOSS_LOGS:])
        if last >= first:
            self._warn(
                step,
                "loss",
                f"the loss does not fall: {first:.4g} in the first logs, {last:.4g} now, at step {step} of {state.max_steps}. "
                f"Try another learning_rate (now {self.stage.learning_rate:g}: ten times lower if the loss has risen, higher if it "
                "stands still), and see that targets answer their sources; `layalign report` shows the curve",
            )

    def check_finite(self, state: TrainerState, logs: Mapping[str, float], last_good: str | None) -> None:
        """End a stage that has gone to NaN: every further step would only lose time.

        Args:
            state: the Trainer's.
            logs: loss, and grad_norm if there is one.
            last_good: the newest checkpoint; None: there is none.

        Raises:
            ValueError: a loss or a gradient norm that is no finite number.
        """
        bad = [name for name in ("loss", "grad_norm") if name in logs and not math.isfinite(logs[name])]
        if bad:
            names = {"loss": "the loss", "grad_norm": "the gradient norm"}
            said = " and ".join(f"{names[name]} is {logs[name]}" for name in bad)
            raise ValueError(self.stop_message(state, said, last_good))

    def stop_message(self, state: TrainerState, said: str, last_good: str | None) -> str:
        """What a user is told of a stage that ends because of NaN, and may do.

        Args:
            state: the Trainer's.
            said: what is not finite.
            last_good: the newest checkpoint; None: there is none.
        """
        kept = (
            f"{last_good} is the last good checkpoint; to go on from it, choose another output and `init_from: {last_good}`"
            if last_good
            else "no checkpoint had been made yet"
        )
        text = (
            f"stages.{self.name}: stopped at step {state.global_step} of {state.max_steps}: {said}, and the trained part with it. {kept}. "
            f"The same command would come to the same: try a lower learning_rate (now {self.stage.learning_rate:g}), a larger "
            f"warmup_ratio, {'' if self.stage.precision == 'fp32' else 'precision: fp32, '}or a smaller max_grad_norm"
        )
        self.warnings.append((state.global_step, text))
        return text

    def _warn(self, step, kind, text):
        if kind in self._warned:
            return
        self._warned.add(kind)
        self.warnings.append((step, f"stages.{self.name}: {text}"))
        tqdm.write(f"layalign: stages.{self.name}: {text}", file=sys.stderr)


def gates_of(model: LayAlignForConditionalGeneration) -> dict[int, list[torch.Tensor]]:
    """The gates' parameters by fused layer; none without an aligner or a gate."""
    if model.aligner is None or model.config.gate is None:
        return {}
    modules = attention_modules(model.llm)
    return {layer: list(modules[layer].fusion_gate.parameters()) for layer in model.config.fused_layers}


def gate_figures(gates: Mapping[int, list[torch.Tensor]]) -> dict[str, float]:
    """gate_mean and gate_layer_N: the mean absolute gate, of all fused layers and of each; of dynamic gates, which have no value of
    their own, the mean absolute weight. All processes call this together.

    Args:
        gates: of `gates_of`.
    """
    if not gates:
        return {}
    values = []
    for parameters in gates.values():
        values.append(torch.cat([shards.whole(one).detach().flatten() for one in parameters]).float().abs().mean())
    found = torch.stack(values).tolist()
    by_layer = {f"gate_layer_{layer}": value for layer, value in zip(gates, found, strict=True)}
    return {"gate_mean": sum(found) / len(found)} | by_layer
