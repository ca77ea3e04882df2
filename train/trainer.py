"""transformers' Trainer for one stage: whole checkpoints, a data order that depends on nothing but seed and epoch, less
work per step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.saving import load_trained_part
from layalign.train.checkpoints import prune, publish, seal

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.collate import Collator, StageData
    from layalign.train.recipe import Recipe, StageRecipe

_GROUPED_BATCHES = 50


class StageTrainer(Trainer):
    """Trains one stage of a recipe.

    Args:
        model: only its trained part has gradients, is optimised and is saved.
        name: of the stage.
        recipe: which it belongs to.
        folder: where checkpoints go.
        data: what is trained on, and evaluated on.
        collator: makes batches of them.
        callbacks: beside the Trainer's own.
    """

    def __init__(
        self,
        model: LayAlignForConditionalGeneration,
        name: str,
        recipe: Recipe,
        folder: str | os.PathLike,
        data: StageData,
        collator: Collator,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.stage, self.order_seed = recipe.stages[name], (recipe.seed, sum(name.encode()))
        self._checkpoints_in = Path(folder)
        self._save_into = None
        bars = [_StageProgress(name)] if recipe.progress else []
        super().__init__(
            model,
            _arguments(self.stage, recipe, folder),
            data_collator=collator,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            callbacks=[_LogAndSave(), *bars, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        # The adapter's output stands before the labels, so the first label has a prediction too and counts.
        self._loss_shifts_labels = False

    def _get_train_sampler(self, train_dataset=None):
        lengths = self.train_dataset.lengths if self.stage.length_grouped else None
        return EpochSampler(len(self.train_dataset), self.order_seed, self.stage.batch_size, lengths)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._save_into is None else str(self._save_into)

    def _save_checkpoint(self, model, trial):
        """The Trainer's own checkpoint, written beside, sealed and renamed; older ones go only then."""
        partial = self._checkpoints_in / ".partial"
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        self._save_into = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._save_into = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            seal(partial / name)
            publish(partial / name, self._checkpoints_in / name)
            prune(self._checkpoints_in, self.stage.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        return load_trained_part(self.model, weights, resume_from_checkpoint)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate walks over all parameters at every step, and takes them all for trained."""
        return 0


class EpochSampler(torch.utils.data.Sampler):
    """A permutation of the records that is a function of seed and epoch, so that a resumed run needs no random state
    for it.

    Args:
        size: number of records.
        seed: int or tuple of ints.
        batch_size: records in one forward call.
        lengths: (size,) length of each record, to batch similar ones together; None: any with any.
    """

    def __init__(self, size: int, seed: int | tuple[int, ...], batch_size: int, lengths: np.ndarray | None = None):
        self.size, self.seed, self.batch_size, self.lengths, self.epoch = size, seed, batch_size, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([*np.atleast_1d(self.seed), self.epoch])
        order = generator.permutation(self.size)
        if self.lengths is not None:
            order = self._group(order, generator)
        return iter(order.tolist())

    def _group(self, order, generator):
        """Sort by length within runs of some batches, and shuffle the batches. Only the last batch may be a short
        one.
        """
        run = self.batch_size * _GROUPED_BATCHES
        runs = [order[start : start + run] for start in range(0, self.size, run)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in runs])
        whole = self.size - self.size % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        return np.concatenate([generator.permutation(batches).reshape(-1), order[whole:]])


class _LogAndSave(TrainerCallback):
    """Two things without which a resumed run differs from an uninterrupted one.

    Every checkpoint comes with a log: when it is resumed, the Trainer forgets the loss summed up since the last log. The last
    step has no checkpoint, the stage's result follows at once: from one the Trainer would go on, one step too far.
    """

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = False
        if last or control.should_save:
            control.should_log = True


class _StageProgress(ProgressCallback):
    """A progress bar with the stage's name and its newest loss, in place of one printed line a log."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)
            self.training_bar.update(state.global_step)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {key: f"{logs[key]:.4g}" for key in ("loss", "eval_loss") if key in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown, refresh=False)


def _arguments(stage: StageRecipe, recipe: Recipe, folder: str | os.PathLike) -> TrainingArguments:
    evaluate, save = bool(stage.eval_steps), bool(stage.save_steps)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 0,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.eval_batch_size or stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.eps,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16",
        logging_steps=stage.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=stage.eval_steps if evaluate else None,
        prediction_loss_only=True,
        save_strategy="steps" if save else "no",
        save_steps=stage.save_steps or 500,
        report_to=recipe.report_to,
        disable_tqdm=True,
        seed=recipe.seed,
        # Without this, transformers refuses bf16 where there is no accelerator.
        use_cpu=recipe.device == "cpu" or not torch.accelerator.is_available(),
        use_cache=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
