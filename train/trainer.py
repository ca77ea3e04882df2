"""transformers' Trainer for one stage: whole checkpoints, a data order that depends on nothing but seed and epoch, less
work per step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign.saving import Weights, load_trained_part
from layalign.train.checkpoints import prune, publish, seal, writing
from layalign.train.flow import EvaluationCut, StageFlow
from layalign.train.interruption import Agreed, Interruption
from layalign.train.processes import on_cpu, processes
from layalign.train.progress import StageBar, StageLines

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.collate import Collator, StageData
    from layalign.train.recipe import Recipe, StageRecipe

_GROUPED_BATCHES = 50
_RUNNING = "running.json"
_BEST = "best.safetensors"


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
        interruption: tells of signals.

    Attributes:
        evaluation_due: whether a signal has kept the evaluation of the present step from being made.
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
        interruption: Interruption | None = None,
    ):
        self.stage, self.order_seed = recipe.stages[name], (recipe.seed, sum(name.encode()))
        self.stage_name, self._checkpoints_in = name, Path(folder)
        self._save_into: Path | None = None
        self._interruption, self._agreed = interruption or Interruption(), Agreed()
        self._resumed_from: Path | None = None
        self._begun_at = 0
        self._best: Weights | None = None
        self.evaluation_due = False
        shown = StageBar(name) if recipe.progress else StageLines(name)
        super().__init__(
            model,
            _arguments(self.stage, recipe, folder),
            data_collator=collator,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            callbacks=[shown, StageFlow(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        # The adapter's output stands before the labels, so the first label has a prediction too and counts.
        self._loss_shifts_labels = False

    def run(self, checkpoint: Path | None) -> None:
        """Train to the stage's end; afterwards the model holds the weights to keep.

        Args:
            checkpoint: where to go on from; None: from the beginning.

        Raises:
            SystemExit: a signal; what was reached is saved.
        """
        self._resumed_from = checkpoint
        self._interruption.deferring = True
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self._interruption.deferring = False
        if self._best is not None:
            load_trained_part(self.model, self._best, f"the best weights of {self.stage_name}")

    def agree(self, save: bool = False) -> Agreed:
        """What all processes do now, where this one wants a checkpoint or not."""
        self._agreed = self._interruption.agree(save)
        return self._agreed

    def leave_if_told(self) -> None:
        """End the process if a signal was agreed upon; to be called when what has been reached is saved."""
        if self._agreed.signal_number:
            step, steps = self.state.global_step, self.state.max_steps
            # Reporters write down what they hold back, and the bar ends before the line.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            text = f"{self.stage_name} is saved at step {step} of {steps}, and the same command goes on from there"
            self._interruption.leave(self._agreed.signal_number, text)

    def remember_best(self) -> None:
        """Keep the present weights as the best."""
        self._best = {name: value.detach().cpu().clone() for name, value in self.model.trained_parameters()}

    def take_up(self) -> None:
        """What a checkpoint of ours holds beside the Trainer's own state, and an evaluation that it still owes."""
        self._begun_at = self.state.global_step
        if self._resumed_from is None:
            return
        if (self._resumed_from / _BEST).exists():
            self._best = load_file(self._resumed_from / _BEST)
        running = json.loads((self._resumed_from / _RUNNING).read_text(encoding="utf-8"))
        sums = running["loss_sums"]
        # Of other processes than these only the mean is of use, which is all that is ever logged.
        same = len(sums) == self.args.world_size
        self._tr_loss += sums[self.args.process_index] if same else sum(sums) / len(sums)
        self._globalstep_last_logged = running["last_logged"]
        if running["evaluation_due"]:
            self._evaluate(None, None)

    def _run_epoch(self, *args, epoch, **kwargs):
        # Resumed within an epoch, and with more than one process, accelerate does not get through to the sampler: it would give
        # the order of the first epoch.
        self._order.set_epoch(epoch)
        # Resumed where nothing is left to do, the Trainer would train one step before it looks.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _evaluate(self, *args, **kwargs):
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationCut:
            # Cut again when resumed to make up for it: nothing has changed since the checkpoint.
            if self.state.global_step > self._begun_at:
                self.evaluation_due = True
                self._save_checkpoint(self.model_wrapped, None)
            self.leave_if_told()
            raise

    def _get_train_sampler(self, train_dataset=None):
        lengths = self.train_dataset.lengths if self.stage.length_grouped else None
        self._order = EpochSampler(len(self.train_dataset), self.order_seed, self.stage.batch_size, lengths)
        return self._order

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._save_into is None else str(self._save_into)

    def _save_checkpoint(self, model, trial):
        """The Trainer's own checkpoint, written beside, sealed and renamed; older ones go only then."""
        # A stage that has come to its end has no checkpoint any more, its result follows at once.
        if self.control.should_training_stop and not self._agreed.signal_number:
            return
        partial = self._checkpoints_in / ".partial"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        # Without it a resumed run would forget the losses since the last log, and its history differ.
        sums = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        running = {
            "loss_sums": sums,
            "last_logged": self._globalstep_last_logged,
            "evaluation_due": self.evaluation_due,
        }
        with writing(partial, f"{self.stage_name}: {name}"):
            self._save_into = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._save_into = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (partial / name / _RUNNING).write_text(json.dumps(running), encoding="utf-8")
                if self._best is not None:
                    save_file(self._best, partial / name / _BEST)
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


def _arguments(stage: StageRecipe, recipe: Recipe, folder: str | os.PathLike) -> TrainingArguments:
    evaluate = bool(stage.eval_steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 0,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.eval_batch_size or stage.batch_size,
        gradient_accumulation_steps=stage.accumulation(processes(recipe).num_processes),
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
        save_strategy="no",  # StageFlow decides
        report_to=recipe.report_to,
        disable_tqdm=True,
        seed=recipe.seed,
        # Without this, transformers refuses bf16 where there is no accelerator.
        use_cpu=on_cpu(recipe),
        use_cache=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.device.type == "cpu":
        # Several processes have "cpu:0", where transformers 5.17 cannot load an optimizer's state to.
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments
