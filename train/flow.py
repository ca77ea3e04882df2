"""What a stage does after each step and each evaluation: save, stop, remember its best weights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from layalign.train.trainer import StageTrainer


class EvaluationCut(Exception):
    """Ends an evaluation because a signal is to be obeyed. It is made up for when the run goes on."""


class StageFlow(TrainerCallback):
    """Decides, for all processes alike, when a stage saves and when it ends early.

    Args:
        trainer: of the stage.
    """

    def __init__(self, trainer: StageTrainer):
        self.trainer, self.stage = trainer, trainer.stage
        self._saved_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the Trainer does not: the losses since the last log, and an evaluation that a signal cut short."""
        self._saved_at = time.monotonic()
        self.trainer.take_up()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where it is time, by steps or by the clock of the first process, or where a signal ends the run."""
        last = state.global_step >= state.max_steps
        # A stage that may end with this evaluation has logged its losses before.
        control.should_log |= last or (control.should_evaluate and self.stage.early_stopping is not None)
        due = state.is_world_process_zero and not last and self._due(state.global_step)
        agreed = self.trainer.agree(due)
        control.should_save = agreed.save
        if agreed.signal_number and control.should_evaluate:
            control.should_evaluate, self.trainer.evaluation_due = False, True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation may take minutes; a signal does not wait for its end."""
        if self.trainer.agree().signal_number:
            raise EvaluationCut

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the weights if they are the best so far; end the stage if they have not been for long enough."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        if self.stage.keep == "best" and since_best == 0:
            self.trainer.remember_best()
        if self.stage.early_stopping is not None and since_best >= self.stage.early_stopping:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time from here, and obey a signal."""
        self._saved_at = time.monotonic()
        self.trainer.leave_if_told()

    def _due(self, step: int) -> bool:
        if self.stage.save_steps and step % self.stage.save_steps == 0:
            return True
        minutes = self.stage.minutes_between_saves
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
