"""What a run shows while it works: a bar for each stage, or a line for each log."""

from __future__ import annotations

import sys
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate")


class StageBar(ProgressCallback):
    """A progress bar with the stage's name and its newest loss, in place of one printed line a log.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin where a resumed stage goes on."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)
            self.training_bar.update(state.global_step)
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest losses beside the bar."""
        shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown, refresh=False)


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
        figures = " ".join(f"{key} {value:.4g}" for key, value in (logs or {}).items() if key in _FIGURES)
        if state.is_world_process_zero and figures:
            print(f"{self.name} {state.global_step}/{state.max_steps} {figures}", file=sys.stderr, flush=True)
