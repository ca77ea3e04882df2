"""What a run shows while it works: a bar for each stage, or a line for each log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate", "gate_mean")


class StageBar(ProgressCallback):
    """A progress bar with the stage's name and its newest loss, in place of one printed line a log.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin where a resumed stage goes on."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)
            # What is done already is no speed of this process: its estimate of the end would be too early.
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.refresh()
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss beside the bar, the newest held-out loss, tokens per second and the time that is left, evaluations
        included."""
        logs = logs or {}
        shown: dict[str, str] = {key: f"{logs[key]:.4g}" for key in logs if key in ("loss", "eval_loss")}
        shown |= {key: text for key, text in _speed(logs)}
        self._shown |= shown
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(self._shown, refresh=False)


class StageLines(TrainerCallback):
    """One line on standard error for each log, for where a bar would fill a file.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str):
        self.name = name

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Step and figures."""
        logs = logs or {}
        figures = [
            f"{key} {value:.4g}" for key, value in logs.items() if key in _FIGURES or key.startswith("eval_loss_")
        ]
        figures += [" ".join(speed) for speed in _speed(logs)]
        if state.is_world_process_zero and figures:
            said = " ".join(figures)
            print(f"{self.name} {state.global_step}/{state.max_steps} {said}", file=sys.stderr, flush=True)


def _speed(logs):
    """(name, text) of tokens per second and the time that is left."""
    if "tokens_per_second" in logs:
        yield "tokens/s", f"{logs['tokens_per_second']:,.0f}"
    if "remaining_seconds" in logs:
        yield "left", tqdm.format_interval(logs["remaining_seconds"])
