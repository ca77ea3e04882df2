"""transformers' Trainer for one stage: whole checkpoints, a data order that depends on nothing but seed and epoch, less
work per step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from layalign.parts import part_of
from layalign.saving import Weights, load_trained_part
from layalign.shards import part_of_process
from layalign.train.checkpoints import newest, prune, publish, seal, writing
from layalign.train.engine_trainer import RUNNING, EngineTrainer
from layalign.train.engines import engine_arguments
from layalign.train.flow import EvaluationCut, StageFlow
from layalign.train.interruption import Agreed, Interruption
from layalign.train.loaders import StageLoaders, order_of, token_batches
from layalign.train.processes import on_cpu, precision_of, processes
from layalign.train.progress import StageBar, StageLines
from layalign.train.stage_log import StageLog
from layalign.train.watching import Watch
from layalign.trained_parts import read_trained

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.data.collate import Collator, PackedCollator, StageData
    from layalign.train.recipe import Recipe
    from layalign.train.stage_recipe import StageRecipe

logger = logging.getLogger(__name__)

_BEST = "best.safetensors"


class StageTrainer(StageLoaders, EngineTrainer):
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
        collator: Collator | PackedCollator,
        callbacks: Sequence[TrainerCallback] = (),
        interruption: Interruption | None = None,
    ):
        self.stage = recipe.stages[name]
        self._order = order_of(self.stage, data.train, (recipe.seed, sum(name.encode())))
        self._token_batches = token_batches(self.stage, data.train, self._order, processes(recipe).num_processes)
        self.stage_name, self._checkpoints_in = name, Path(folder)
        self._save_into: Path | None = None
        self._written: set[Path] = set()
        self._interruption, self._agreed = interruption or Interruption(), Agreed()
        self._resumed_from: Path | None = None
        self._begun_at = 0
        self._best: Weights | None = None
        self.evaluation_due = False
        self.engine = recipe.parallel
        self.precision = precision_of(recipe, self.stage)
        self.watch = Watch(name, self.stage, model)
        self._log_file = StageLog(self._checkpoints_in, self.watch)
        shown = StageBar(name) if recipe.progress else StageLines(name)
        super().__init__(
            model,
            _arguments(
                self.stage, recipe, folder, model, None if self._token_batches is None else self._token_batches.calls
            ),
            data_collator=collator,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            callbacks=[shown, StageFlow(self), self._log_file, *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def run(self, checkpoint: Path | None) -> Weights | None:
        """Train to the stage's end; afterwards the model holds the weights to keep.

        Args:
            checkpoint: where to go on from; None: from the beginning.

        Returns:
            these weights, where the model is sharded and has no place for them as a whole, in the first process (others: none of
            them); else None.

        Raises:
            SystemExit: a signal; what was reached is saved.
            ValueError: a checkpoint that cannot be taken up by these processes.
        """
        if checkpoint is not None:
            self.refuse_other_engine(checkpoint, self.stage.global_batch_size is not None)
        self._resumed_from = checkpoint
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.sharded:
            return self.whole_weights() if self._best is None else self._best
        if self._best is not None:
            load_trained_part(self.model, self._best, f"the best weights of {self.stage_name}")
        return None

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
        self._best = self.whole_weights()

    def take_up(self) -> None:
        """What a checkpoint of ours holds beside the Trainer's own state, and an evaluation that it still owes."""
        self._begun_at = self.state.global_step
        self.watch.begin(self._begun_at)
        if self._resumed_from is None:
            return
        if (self._resumed_from / _BEST).exists():
            # Copies: a mapped file of an old checkpoint could not be removed everywhere (NFS, Windows).
            best = load_file(self._resumed_from / _BEST) if self.keeps_whole else {}
            self._best = {name: value.clone() for name, value in best.items()}
        running = json.loads((self._resumed_from / RUNNING).read_text(encoding="utf-8"))
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with what the watch adds, and end the stage where a loss is no number any more.

        Raises:
            ValueError: a loss or a gradient norm that is not finite.
        """
        if "loss" in logs:
            logs |= self.watch.figures(self.state, lambda tokens: self.accelerator.gather(tokens.to(self.args.device)))
        super().log(logs, start_time)
        try:
            self.watch.check_finite(self.state, logs, self._last_good())
            self.watch.look(self.state, logs)
        except ValueError:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        finally:
            self._log_file.write_warnings(self.state)

    def _track_num_input_tokens(self, inputs):
        self.watch.count(inputs)

    def _last_good(self):
        found = newest(self._checkpoints_in)
        return None if found is None else str(found)

    def _refuse_nan(self):
        """A checkpoint of weights that are no numbers would only push out a good one."""
        mine = [part_of_process(value).detach() for _, value in self.model.trained_parameters()]
        # Shards may wait on the CPU, where the processes of GPUs do not talk.
        finite = torch.stack([value.isfinite().all().to(self.args.device) for value in mine]).all()
        if not self.accelerator.gather(finite.reshape(1)).all():
            message = self.watch.stop_message(self.state, "there is nan or inf in the weights", self._last_good())
            self._log_file.write_warnings(self.state)
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise ValueError(message)

    def _evaluate(self, *args, **kwargs):
        try:
            with self.watch.paused(evaluation=True):
                return super()._evaluate(*args, **kwargs)
        except EvaluationCut:
            # Cut again when resumed to make up for it: nothing has changed since the checkpoint.
            if self.state.global_step > self._begun_at:
                self.evaluation_due = True
                self._save_checkpoint(self.model_wrapped, None)
            self.leave_if_told()
            raise

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._save_into is None else str(self._save_into)

    def _save_checkpoint(self, model, trial):
        """The Trainer's own checkpoint, written beside, sealed and renamed; older ones go only then."""
        # A stage that has come to its end has no checkpoint any more, its result follows at once.
        if self.control.should_training_stop and not self._agreed.signal_number:
            return
        self._refuse_nan()
        with self.watch.paused():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model, trial):
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
            **self.engine_record(),
        }
        with writing(partial, f"{self.stage_name}: {name}"):
            self._save_into = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._save_into = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (partial / name / RUNNING).write_text(json.dumps(running), encoding="utf-8")
                if self._best is not None:
                    save_file(self._best, partial / name / _BEST)
                seal(partial / name)
                publish(partial / name, self._checkpoints_in / name)
        if self.args.should_save:
            self._written.add(self._checkpoints_in / name)
            prune(self._checkpoints_in, self.stage.keep_checkpoints, self._written)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = read_trained(resume_from_checkpoint, self.model.config)
        return load_trained_part(self.model, weights, resume_from_checkpoint)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with LoRA, the LLM and the encoder in groups of their own where the stage gives them a learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        of_parts = ((("lora", "llm"), self.stage.llm_learning_rate), (("encoder",), self.stage.encoder_learning_rate))
        for parts, rate in of_parts:
            if not fresh or rate is None:
                continue
            named = (self.model if model is None else model).named_parameters()
            ours = {id(own) for name, own in named if part_of(name.removeprefix("module.")) in parts}
            for group in list(optimizer.param_groups):
                moved = [own for own in group["params"] if id(own) in ours]
                group["params"] = [own for own in group["params"] if id(own) not in ours]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def _get_learning_rate(self):
        """That of the first group that trains something: those that `create_optimizer` has emptied stay, for checkpoints' sake."""
        if self.is_deepspeed_enabled:
            return super()._get_learning_rate()
        groups = zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True)
        return next(rate for group, rate in groups if group["params"])

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate walks over all parameters at every step, and takes them all for trained."""
        return 0


def _arguments(
    stage: StageRecipe,
    recipe: Recipe,
    folder: str | os.PathLike,
    model: LayAlignForConditionalGeneration,
    calls: int | None = None,
) -> TrainingArguments:
    """calls: forward calls of one process in one step, where the stage does not say it."""
    evaluate = bool(stage.eval_steps)
    values: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 0,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=stage.eval_batch_size or stage.batch_size,
        gradient_accumulation_steps=calls or stage.accumulation(processes(recipe).num_processes),
        learning_rate=stage.learning_rate,
        lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        adam_epsilon=stage.eps,
        max_grad_norm=stage.max_grad_norm,
        bf16=precision_of(recipe, stage) == "bf16",
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
        # Of an encoder that is trained, parts may lead nowhere: a pooler, or the last layer where there is no adapter.
        ddp_find_unused_parameters=bool(recipe.train_encoder),
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments = TrainingArguments(**values | engine_arguments(recipe, stage, model))
    if arguments.n_gpu > 1:
        # The Trainer would share each call out over all of them (DataParallel), unseen by all that counts examples.
        logger.warning(
            "%d GPUs are visible and one is used; torchrun --nproc-per-node %d -m layalign ... trains with all",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        vars(arguments)["_n_gpu"] = 1
    if arguments.device.type == "cpu":
        # Several processes have "cpu:0", where transformers 5.17 cannot load an optimizer's state to.
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments
