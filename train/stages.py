"""The two training stages, from a recipe to a trained model."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import set_seed
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from layalign.configuration import STAGES
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.saving import load_trained_part
from layalign.train.checkpoints import newest_valid, problem, sealed_folder, sweep
from layalign.train.collate import Collator, encode_records
from layalign.train.run_folder import check_data, claim
from layalign.train.sources import read_sources
from layalign.train.templates import check_template
from layalign.train.trainer import StageTrainer

logger = logging.getLogger(__name__)

HISTORY = "history.json"


def train(recipe, callbacks=()):
    """Train the stages of a recipe, translation before task; what an earlier, interrupted call did is not done again.

    Args:
        recipe: Recipe.
        callbacks: transformers TrainerCallback objects, used in every stage.

    Returns:
        model (LayAlignForConditionalGeneration, in eval mode), processor, and history {stage: [{"step", "loss", ...},
        ...]}. Model and processor are also saved in `recipe.output/model`.

    Raises:
        ValueError: an output folder of another run, data that cannot be read or has changed, bases that cannot be
            loaded.
    """
    recipe.check_files()
    with _processes(recipe).main_process_first():
        claim(recipe)
    with _without_file_bars():
        model, processor = build(recipe)
        history = {}
        for name in STAGES:
            if name in recipe.stages:
                history[name] = run_stage(name, recipe, model, processor, callbacks)
        if _processes(recipe).is_main_process:
            save_model(recipe, model, processor)
    return model.eval(), processor, history


def build(recipe):
    """The untrained model of a recipe and its processor."""
    set_seed(recipe.seed)
    model = LayAlignForConditionalGeneration.from_bases(
        recipe.encoder, recipe.llm, llm_input=recipe.llm_input, **recipe.model
    )
    for name, stage in recipe.stages.items():
        if model.encoder_limit is not None and stage.source_max_length > model.encoder_limit:
            raise ValueError(
                f"stages.{name}.source_max_length: got {stage.source_max_length}, the encoder takes {model.encoder_limit} tokens"
            )
    processor = LayAlignProcessor.from_bases(recipe.encoder, recipe.llm, prompt_template=prompt_template(recipe))
    return model, processor


def run_stage(name, recipe, model, processor, callbacks=()):
    """Train one stage to its end, from its newest whole checkpoint if there is one; if it has ended before, load its
    result.

    Returns:
        its history: one dict for each log and each evaluation.
    """
    folder = Path(recipe.output) / name
    final = folder / "final"
    if problem(final) is None:
        load_trained_part(model, load_file(final / SAFE_WEIGHTS_NAME), str(final))
        return json.loads((final / HISTORY).read_text(encoding="utf-8"))

    stage = recipe.stages[name]
    data, eval_data = read_stage_data(name, recipe, processor)
    collator = Collator(processor.encoder_tokenizer.pad_token_id or 0, processor.tokenizer.pad_token_id or 0)
    if stage.gradient_checkpointing:
        _checkpointing(model, "enable")
    trainer = StageTrainer(model, name, stage, recipe, folder, data, eval_data, collator, callbacks)
    checkpoint = newest_valid(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
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
            (partial / HISTORY).write_text(json.dumps(history, indent=1), encoding="utf-8")
        sweep(folder)
    trainer.accelerator.wait_for_everyone()
    return history


def read_stage_data(name, recipe, processor):
    """Read and tokenise a stage's records: EncodedRecords to train on, and to evaluate on or None."""
    stage = recipe.stages[name]
    with_prompt = recipe.llm_input[name]
    records, skipped = read_sources(stage.data, recipe.data_root)
    held_out = []
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
    with _processes(recipe).main_process_first():
        check_data(Path(recipe.output) / name, name, records, skipped, data)
    if not held_out:
        return data, None
    return data, encode_records(held_out, processor, stage, with_prompt, recipe.progress, f"{name} evaluation")


def prompt_template(recipe):
    """The processor's template, {text} for the question, as the task stage's prompt has it; None if the LLM reads no
    text there.
    """
    if "task" not in recipe.stages or not recipe.llm_input["task"]:
        return None
    prompt = recipe.stages["task"].prompt
    if check_template(prompt, "prompt") != ["source"]:
        logger.warning(
            "the task prompt needs more than {source}: the saved processor has no prompt template, pass prompts to it"
        )
        return None
    return prompt.format(source="{text}")


def save_model(recipe, model, processor):
    """Save model and processor to `recipe.output/model`, unless they stand there whole."""
    folder = Path(recipe.output) / "model"
    if problem(folder) is None:
        return
    with sealed_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    sweep(folder.parent)


def _processes(recipe):
    """The processes that train together (torchrun): what each of them would write is written by the first one."""
    return PartialState(cpu=recipe.device == "cpu")


@contextmanager
def _without_file_bars():
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
    """A log entry without the wall-clock figures, which differ from run to run."""
    timings = ("runtime", "per_second")
    return {key: value for key, value in entry.items() if not key.endswith(timings)}
