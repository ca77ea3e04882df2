"""The two training stages, from a recipe to a trained model."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.state import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from layalign.base_models import write_down
from layalign.configuration import STAGES
from layalign.folders import damage
from layalign.kernels.files import write_json
from layalign.loading import load_encoder, load_llm
from layalign.model import LayAlignForConditionalGeneration
from layalign.model_card import model_card, write_card
from layalign.processor import LayAlignProcessor
from layalign.saving import LLM_FOLDER, Weights, load_trained_part
from layalign.train.card import HISTORY, LANGUAGES, stage_facts
from layalign.train.checkpoints import newest_valid, sealed_folder, sweep
from layalign.train.data.collate import Collator, PackedCollator, StageData
from layalign.train.data.stage_data import read_stage_data
from layalign.train.engines import check_engine, own_environment
from layalign.train.initial import InitialWeights
from layalign.train.interruption import Interruption
from layalign.train.parts import model_settings, train_stage_parts
from layalign.train.processes import heard_by_all, processes
from layalign.train.prompts import prompt_template, unread_prompts
from layalign.train.recipe import Recipe
from layalign.train.report.samples import keep_samples
from layalign.train.run_folder import RunFolder
from layalign.train.trainer import StageTrainer
from layalign.train.watching import TIMINGS
from layalign.trained_parts import read_trained

History = list[dict[str, Any]]
logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What training gives: the model in eval mode, and of each stage one dict for each log and each evaluation.

    Under fsdp2 and deepspeed the model stays as the last stage has left it, sharded; `output/model` is whole.
    """

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
            be loaded, a disk that is full, a global_batch_size that the processes do not divide, or an engine (`parallel`) that
            does not fit these processes or the environment.
        SystemExit: SIGTERM (status 143) or Ctrl-C (status 130), when what has been reached is saved.
    """
    recipe.check_files()
    check_engine(recipe)
    together = processes(recipe)
    with heard_by_all():  # one that ends while another still joins would have that one end with a lost connection
        for name, stage in recipe.stages.items():
            try:
                stage.accumulation(together.num_processes)
            except ValueError as error:
                raise ValueError(f"stages.{name}.{error}") from None
    if together.is_main_process:
        for line in unread_prompts(recipe):
            logger.warning(line)
    with Interruption().installed() as interruption, own_environment(), ExitStack() as stack:
        with heard_by_all():
            if together.is_main_process:
                stack.enter_context(RunFolder(recipe))
        _check_same_folder(recipe)
        stack.enter_context(_without_file_bars())
        with heard_by_all():
            model, processor = build(recipe)
        # All of it before anything is trained: a bad line of the task stage is not to be met after days of translation.
        data = {name: _read_data(name, recipe, model, processor) for name in STAGES if name in recipe.stages}
        history: dict[str, History] = {}
        weights: Weights | None = None
        before = ""
        for name in STAGES:
            if name not in recipe.stages:
                continue
            if weights is not None:
                # What the engine has made of the model cannot be undone; the next stage's engine begins with a whole one.
                del model
                gc.collect()
                model, _ = build(recipe)
                train_stage_parts(model, recipe, before)
                final = Path(recipe.output) / before / "final"  # the first process alone has them
                load_trained_part(model, read_trained(final, model.config), str(final))
            before = name
            history[name], weights = run_stage(name, recipe, model, processor, callbacks, interruption, data.pop(name))
        if together.is_main_process:
            save_model(recipe, model, processor, weights)
        together.wait_for_everyone()  # the lock is not given up before
    model.train_only()
    return Trained(model.eval(), processor, history)


def build(recipe: Recipe) -> tuple[LayAlignForConditionalGeneration, LayAlignProcessor]:
    """The untrained model of a recipe and its processor.

    Raises:
        ValueError: bases that cannot be loaded, or sources longer than the encoder takes.
    """
    start = recipe.init_from
    initial = None if start is None else InitialWeights(start.path, start.only)
    dtype = recipe.model.get("dtype")
    quantized = recipe.quantization or {}
    encoder = None if recipe.encoder is None else load_encoder(recipe.encoder, dtype, quantized.get("encoder"))
    llm = load_llm(recipe.llm, dtype, quantized.get("llm"))
    # Here and not before: the first weights are to depend on nothing that loading may draw.
    set_seed(recipe.seed)
    # The stage that trains a base says so; before it, the base is what it was and need not be saved.
    later = {"train_llm": recipe.train_llm and encoder is None, "train_encoder": False}
    settings = model_settings(recipe) | {"quantization": None, **later}
    model = LayAlignForConditionalGeneration.from_bases(encoder, llm, llm_input=recipe.llm_input, **settings)
    model.config.quantization = recipe.quantization
    for role, source, module in (("encoder", recipe.encoder, encoder), ("llm", recipe.llm, llm)):
        if source is not None and module is not None:
            write_down(model.config, role, source, module)
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
    data: StageData | None = None,
) -> tuple[History, Weights | None]:
    """Train one stage to its end, from its newest whole checkpoint if there is one; if it has ended before, load its
    result.

    Args:
        name, recipe: the stage, and the run it belongs to.
        model, processor: what `build` made, or the stage before has left.
        callbacks: beside the trainer's own.
        interruption: tells of signals; None: these do what they always do.
        data: what it is trained on; None: it is read.

    Returns:
        its history, one dict for each log and each evaluation, and its weights where the model is sharded now; else None.
    """
    folder = Path(recipe.output) / name
    final = folder / "final"
    train_stage_parts(model, recipe, name)
    if data is None and _first_says(lambda: _whole(final)):
        load_trained_part(model, read_trained(final, model.config), str(final))
        return json.loads((final / HISTORY).read_text(encoding="utf-8")), None

    stage = recipe.stages[name]
    data = data or _read_data(name, recipe, model, processor)
    assert data is not None  # of a stage that has not ended
    padding = processor.encoder_tokenizer.pad_token_id or 0, processor.tokenizer.pad_token_id or 0
    collator = PackedCollator() if stage.packing else Collator(*padding)
    if stage.gradient_checkpointing:
        _checkpointing(model, "enable")
    interruption = interruption or Interruption()
    trainer = StageTrainer(model, name, recipe, folder, data, collator, callbacks, interruption)
    if trainer.is_world_process_zero():
        keep_samples(Path(recipe.output), data, processor)
    checkpoint = _first_says(lambda: newest_valid(folder))
    # Until the result is written, which may take minutes: nothing else holds the steps since the last checkpoint.
    with interruption.deferred():
        weights = trainer.run(checkpoint)
        if weights is None:
            # Under bf16, accelerate has wrapped forward in autocast; the next stage and the caller get the plain one back.
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            # With the mark that unwrapping leaves, accelerate would not wrap the model again: the next stage would run in fp32.
            model.__dict__.pop("_is_accelerate_prepared", None)
        if stage.gradient_checkpointing:
            _checkpointing(model, "disable")

        history = [_plain(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        if trainer.is_world_process_zero():
            with sealed_folder(final) as partial:
                model.save_pretrained(partial, state_dict=weights)
                write_json(partial / HISTORY, history)
                write_json(partial / LANGUAGES, sorted(data.train.by_language()))
            sweep(folder)
        trainer.accelerator.wait_for_everyone()
    trainer.give_up_engine()
    # Told after the last step: what the stage has come to is its checkpoint.
    if number := interruption.agree().signal_number:
        interruption.leave(number, f"{name} has ended, and the same command goes on with what follows")
    return history, weights


def _read_data(
    name: str, recipe: Recipe, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor
) -> StageData | None:
    """What a stage is trained on; None of one that has ended."""
    if _first_says(lambda: _whole(Path(recipe.output) / name / "final")):
        return None
    with heard_by_all():
        data = read_stage_data(name, recipe, processor)
        _check_positions(name, data, model)
    _check_same_everywhere(name, data)
    return data


def _check_positions(name, data, model):
    """That an LLM which looks positions up in a table has one for each token of the longest record, which may come after days."""
    limit = model.llm_limit
    for kind, records in (("record", data.train), ("held-out record", data.held_out)):
        if limit is None or records is None or not len(records):
            continue
        around = int(model.config.get_text_config().bos_token_id is not None) + int(records.soft)  # the boundary
        taken = records.lengths + around
        if taken.max() > limit:
            raise ValueError(
                f"stages.{name}: {kind} {taken.argmax()} of {len(records)} (counted from 0) takes {taken.max()} positions of the LLM, "
                f"which has {limit}; lower source_max_length or target_max_length"
            )


def _whole(folder):
    """Whether a stage's or the run's result is there as it was written."""
    if not folder.exists():
        return False
    if reason := damage(folder):
        logger.warning("%s is not as it was written, and is made again: %s", folder, reason)
    return reason is None


def _first_says(find):
    """What `find` gives in the first process, in all: a disk that one host cannot read may not send it another way."""
    return gather_object([find() if PartialState().is_main_process else None])[0]


def _unlike_the_first(here):
    """The processes that have something else here than the first one. All call this together."""
    found = gather_object([here])
    return [process for process, theirs in enumerate(found) if theirs != found[0]]


def _check_same_folder(recipe):
    """That every process sees the work that the first one goes on with: another host's own disk has none, and would begin anew."""
    output = Path(recipe.output)
    work = [sorted(path.name for path in (output / name).glob("checkpoint-*")) for name in STAGES]
    work += [[name] for name in (*(f"{name}/final" for name in STAGES), "model") if (output / name).exists()]
    if other := _unlike_the_first(work):
        raise ValueError(
            f"output: processes {other} do not see in {output} what the first process does, which goes on from there; all hosts must "
            "share this folder"
        )


def _check_same_everywhere(name, data):
    """That every process has read what the first one has: on several hosts, files of one name may differ."""
    if other := _unlike_the_first([part and part.digest() for part in data]):
        raise ValueError(
            f"stages.{name}.data: processes {other} have read other records than the first process (other files, tokenizers or "
            "versions on their host?); all must read the same"
        )


def save_model(
    recipe: Recipe,
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    weights: Weights | None = None,
) -> None:
    """Save model and processor to `recipe.output/model`, unless they stand there whole.

    Args:
        recipe, model, processor: what was trained.
        weights: the trained part of a model that is sharded; None: the model has it.
    """
    folder = Path(recipe.output) / "model"
    if _whole(folder):
        return
    with sealed_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        write_card(partial, model_card(model, folder.parent.resolve().name, stage_facts(recipe)))
        if model.config.train_llm:  # an LLM that transformers and `evaluate --llm` take as it is
            processor.tokenizer.save_pretrained(partial / LLM_FOLDER)
    sweep(folder.parent)


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
    return {key: value for key, value in sorted(entry.items()) if not key.endswith(TIMINGS)}
