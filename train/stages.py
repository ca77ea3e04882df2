"""The two training stages, from a recipe to a trained model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from layalign.configuration import STAGES
from layalign.kernels.files import write_json
from layalign.loading import load_encoder, load_llm
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.saving import load_trained_part, reference
from layalign.train.checkpoints import damage, newest_valid, sealed_folder, sweep
from layalign.train.collate import Collator, StageData, encode_records
from layalign.train.initial import InitialWeights
from layalign.train.interruption import Interruption
from layalign.train.processes import processes
from layalign.train.prompts import prompt_template
from layalign.train.recipe import Recipe
from layalign.train.run_folder import RunFolder, check_data
from layalign.train.sources import read_sources
from layalign.train.trainer import StageTrainer

HISTORY = "history.json"
History = list[dict[str, Any]]


class Trained(NamedTuple):
    """What training gives: the model in eval mode, and of each stage one dict for each log and each evaluation."""

    model: LayAlignForConditionalGeneration
    processor: LayAlignProcessor
    history: dict[str, History]


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> Trained:
    """Train the stages of a recipe, translation before task; what an earlier, interrupted call did is not done again.

    Args:
        recipe: what to train, and on what.
        callbacks: used in every stage.

    Returns:
        model, processor and history; model and processor are also saved in `recipe.output/model`.

    Raises:
        ValueError: an output folder of another run or in use, data that cannot be read or has changed, bases that cannot
            be loaded, a disk that is full, or a global_batch_size that the processes do not divide.
        SystemExit: SIGTERM (status 143) or Ctrl-C (status 130), when what has been reached is saved.
    """
    recipe.check_files()
    together = processes(recipe)
    for name, stage in recipe.stages.items():
        try:
            stage.accumulation(together.num_processes)
        except ValueError as error:
            raise ValueError(f"stages.{name}.{error}") from None
    with Interruption().installed() as interruption, ExitStack() as stack:
        _take_folder(recipe, together.is_main_process, stack)
        stack.enter_context(_without_file_bars())
        model, processor = build(recipe)
        history = {}
        for name in STAGES:
            if name in recipe.stages:
                history[name] = run_stage(name, recipe, model, processor, callbacks, interruption)
        if together.is_main_process:
            save_model(recipe, model, processor)
        together.wait_for_everyone()  # the lock is not given up before
    return Trained(model.eval(), processor, history)


def build(recipe: Recipe) -> tuple[LayAlignForConditionalGeneration, LayAlignProcessor]:
    """The untrained model of a recipe and its processor.

    Raises:
        ValueError: bases that cannot be loaded, or sources longer than the encoder takes.
    """
    start = recipe.init_from
    initial = None if start is None else InitialWeights(start.path, start.only)
    settings = dict(recipe.model)
    dtype = settings.pop("dtype", None)
    encoder, llm = load_encoder(recipe.encoder, dtype), load_llm(recipe.llm, dtype)
    # Here and not before: the first weights are to depend on nothing that loading may draw.
    set_seed(recipe.seed)
    model = LayAlignForConditionalGeneration.from_bases(encoder, llm, llm_input=recipe.llm_input, **settings)
    model.config.encoder_name_or_path = reference(recipe.encoder, encoder)
    model.config.llm_name_or_path = reference(recipe.llm, llm)
    if initial is not None:
        initial.load_into(model)
    for name, stage in recipe.stages.items():
        if model.encoder_limit is not None and stage.source_max_length > model.encoder_limit:
            raise ValueError(
                f"stages.{name}.source_max_length: got {stage.source_max_length}, the encoder takes {model.encoder_limit} tokens"
            )
    processor = LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)
    processor.prompt_template = prompt_template(recipe, processor.tokenizer)
    return model, processor


def run_stage(
    name: str,
    recipe: Recipe,
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    callbacks: Sequence[TrainerCallback] = (),
    interruption: Interruption | None = None,
) -> History:
    """Train one stage to its end, from its newest whole checkpoint if there is one; if it has ended before, load its
    result.

    Args:
        name, recipe: the stage, and the run it belongs to.
        model, processor: what `build` made, or the stage before has left.
        callbacks: beside the trainer's own.
        interruption: tells of signals; None: these do what they always do.

    Returns:
        its history: one dict for each log and each evaluation.
    """
    folder = Path(recipe.output) / name
    final = folder / "final"
    if damage(final) is None:
        load_trained_part(model, load_file(final / SAFE_WEIGHTS_NAME), str(final))
        return json.loads((final / HISTORY).read_text(encoding="utf-8"))

    stage = recipe.stages[name]
    data = read_stage_data(name, recipe, processor)
    collator = Collator(processor.encoder_tokenizer.pad_token_id or 0, processor.tokenizer.pad_token_id or 0)
    if stage.gradient_checkpointing:
        _checkpointing(model, "enable")
    trainer = StageTrainer(model, name, recipe, folder, data, collator, callbacks, interruption)
    trainer.run(newest_valid(folder))
    # Under bf16, accelerate has wrapped forward in autocast; the next stage and the caller get the plain one back.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    # With the mark that unwrapping leaves, accelerate would not wrap the model again: the next stage would run in fp32.
    model.__dict__.pop("_is_accelerate_prepared", None)
    if stage.gradient_checkpointing:
        _checkpointing(model, "disable")

    history = [_plain(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    if trainer.is_world_process_zero():
        with sealed_folder(final) as partial:
            model.save_pretrained(partial)
            write_json(partial / HISTORY, history)
        sweep(folder)
    trainer.accelerator.wait_for_everyone()
    # Told after the last step: what the stage has come to is its checkpoint.
    if interruption is not None and (number := interruption.agree().signal_number):
        interruption.leave(number, f"{name} has ended, and the same command goes on with what follows")
    return history


def read_stage_data(name: str, recipe: Recipe, processor: LayAlignProcessor) -> StageData:
    """Read and tokenise a stage's records.

    Raises:
        ValueError: data that cannot be read or has changed, or more held out than there is.
    """
    stage = recipe.stages[name]
    with_prompt = recipe.llm_input[name]
    records, skipped = read_sources(stage.data, recipe.data_root)
    held_out: list[dict[str, str]] = []
    if stage.eval_data:
        held_out, _ = read_sources(stage.eval_data, recipe.data_root)
    elif stage.hold_out:
        if stage.hold_out >= len(records):
            raise ValueError(
                f"stages.{name}.hold_out: {stage.hold_out} of {len(records)} records leave none to train on"
            )
        order = np.random.default_rng(recipe.seed).permutation(len(records))
        held_out = [records[index] for index in order[: stage.hold_out]]
        records = [records[index] for index in np.sort(order[stage.hold_out :])]
    data = encode_records(records, processor, stage, with_prompt, recipe.progress, name)
    with processes(recipe).main_process_first():
        check_data(Path(recipe.output) / name, name, records, skipped, data)
    if not held_out:
        return StageData(data, None)
    return StageData(
        data, encode_records(held_out, processor, stage, with_prompt, recipe.progress, f"{name} evaluation")
    )


def save_model(recipe: Recipe, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor) -> None:
    """Save model and processor to `recipe.output/model`, unless they stand there whole."""
    folder = Path(recipe.output) / "model"
    if damage(folder) is None:
        return
    with sealed_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    sweep(folder.parent)


def _take_folder(recipe, first, stack):
    """The first process takes the output folder; where it is refused, all of them say so and end, and none waits for the others."""
    refusal: list[str | None] = [None]
    if first:
        try:
            stack.enter_context(RunFolder(recipe))
        except ValueError as error:
            refusal = [str(error)]
    (message,) = broadcast_object_list(refusal)
    if message is not None:
        raise ValueError(message)


@contextmanager
def _without_file_bars() -> Iterator[None]:
    """Without transformers' bars for files read and written, which would break up the training bar at every
    checkpoint.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _checkpointing(model, action):
    """Enable or disable it; transformers 5.2x renamed the methods and warns at the old names."""
    names = (f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}")
    getattr(model, next(name for name in names if hasattr(model, name)))()


def _plain(entry):
    """A log entry without the wall-clock figures, which differ from run to run, its keys in the order that a checkpoint has."""
    timings = ("runtime", "per_second")
    return {key: value for key, value in sorted(entry.items()) if not key.endswith(timings)}
