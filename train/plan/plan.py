"""What a recipe would do, before anything of it is done: parameters, data, steps, memory and time, without loading weights."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from layalign.arguments import NO_CODE
from layalign.configuration import STAGES, LayAlignConfig
from layalign.loading import DTYPES, build_encoder, read_config, resolve
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.data.batches import TokenBatches
from layalign.train.data.collate import EncodedRecords
from layalign.train.data.encoding import RecordEncoder, encode_records
from layalign.train.engines import read_deepspeed
from layalign.train.loaders import AROUND, order_of, token_batches
from layalign.train.parts import has_soft_prompts, model_settings, stage_parts
from layalign.train.plan.cost import GPU_OVERHEAD, Batch, arithmetic, memory, sharded, sizes_of
from layalign.train.plan.machine import Machine, this_machine
from layalign.train.plan.sample import limit, records
from layalign.train.processes import precision_of
from layalign.train.prompts import unread_prompts
from layalign.train.recipe import Recipe
from layalign.train.stage_recipe import StageRecipe


def make_plan(recipe: Recipe, processes: int | None = None, machine: Machine | None = None) -> dict[str, Any]:
    """A recipe's plan.

    Args:
        recipe: its data files need not be there.
        processes: that are to train together; None: those that were started (torchrun), else one.
        machine: where each process is to run; None: here.

    Returns:
        JSON values: "parameters", "bases", "processes", "parallel", "machine", "stages" by name (examples, tokens, steps, memory in bytes
        a process, seconds), "seconds" (None where a stage's are not known) and "notes", what could not be known and why.

    Raises:
        ValueError: bases without a configuration, or a global_batch_size that the processes do not divide.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    notes = unread_prompts(recipe)
    model = empty_model(recipe)
    sizes = sizes_of(model)
    processor = _processor(recipe, notes)
    if recipe.train_encoder:
        notes.append("train_encoder: what the encoder keeps for its backward pass is not counted in the memory")
    on_cpu = recipe.device == "cpu"
    # What "auto" leaves to the machine is not left to this one where another is named: all of those multiply in bf16.
    there = machine is not None and not on_cpu
    precisions = {
        name: "bf16" if there and stage.precision == "auto" else precision_of(recipe, stage)
        for name, stage in recipe.stages.items()
    }
    machine = machine or this_machine(set(precisions.values()), on_cpu)
    stages = {}
    for name in STAGES:
        if name in recipe.stages:
            stages[name] = _stage(name, recipe, sizes, processor, processes, machine, precisions[name], notes)
    seconds = [stage["seconds"] for stage in stages.values()]
    return {
        "output": recipe.output,
        "bases": _bases(recipe, model, sizes),
        "parameters": {
            "trained": {
                **{part: getattr(sizes, part) for part in ("adapter", "aligner", "gates")},
                **({"lora": sizes.lora} if recipe.lora else {}),
                **({"llm": sizes.llm} if recipe.train_llm else {}),
                **({"encoder": sizes.encoder_trained} if recipe.train_encoder else {}),
                "total": sizes.trained + sizes.encoder_trained + (sizes.llm if recipe.train_llm else 0),
            },
            "frozen": {
                "encoder": sizes.encoder - sizes.encoder_trained,
                "llm": 0 if recipe.train_llm else sizes.llm,
                "total": sizes.encoder - sizes.encoder_trained + (0 if recipe.train_llm else sizes.llm),
            },
        },
        "processes": processes,
        "parallel": recipe.parallel if processes > 1 else "none",
        "machine": {"name": machine.name, "memory": machine.memory, "flops_per_second": dict(machine.flops_per_second)},
        "stages": stages,
        "seconds": None if None in seconds else sum(seconds),
        "notes": notes,
    }


def empty_model(recipe: Recipe) -> LayAlignForConditionalGeneration:
    """The recipe's model on the meta device: shapes and dtypes without values, from the bases' config.json alone.

    Raises:
        ValueError: bases without one, or that cannot be joined.
    """
    dtype = DTYPES.get(recipe.model.get("dtype", ""))
    with torch.device("meta"):
        encoder = None
        if recipe.encoder is not None:
            config = read_config(resolve(recipe.encoder), "encoder")
            encoder = build_encoder(config).to(dtype or config.dtype or torch.float32)
        config = read_config(resolve(recipe.llm), "llm")
        llm = AutoModelForCausalLM.from_config(config, **NO_CODE).to(dtype or config.dtype or torch.float32)
        # Quantised layers cannot be made here: the plan counts them.
        settings = model_settings(recipe) | {"quantization": None, "train_llm": recipe.train_llm and encoder is None}
        config = LayAlignConfig(
            encoder_config=None if encoder is None else encoder.config,
            llm_config=llm.config,
            llm_input=recipe.llm_input,
            **settings,
        )
        return LayAlignForConditionalGeneration(config, encoder, llm)


def _bases(recipe, model, sizes):
    found = {}
    for role, base in (("encoder", model.encoder), ("llm", model.llm)):
        if base is not None:
            bits = (recipe.quantization or {}).get(role, {}).get("bits")
            dtype = str(base.dtype).removeprefix("torch.")
            name, count = getattr(recipe, role), getattr(sizes, role)
            kind = "trained" if role == "llm" and recipe.train_llm else "frozen"
            if role == "encoder" and recipe.train_encoder:
                kind = "trained" if recipe.train_encoder is True else "frozen but for its embeddings"
            found[role] = {
                "name": name,
                "class": type(base).__name__,
                "parameters": count,
                "dtype": bits or dtype,
                "is": kind,
            }
    return found


def steps_of(stage: StageRecipe, examples: int, processes: int) -> int:
    """Optimizer steps of a stage, as the Trainer counts them.

    Args:
        stage: its recipe.
        examples: that are trained on.
        processes: that train together.
    """
    if stage.steps is not None:
        return stage.steps
    if stage.batch_tokens is not None and stage.global_batch_size is not None:
        return math.ceil((stage.epochs or 0) * math.ceil(examples / stage.global_batch_size))
    calls = math.ceil(math.ceil(examples / stage.batch_size) / processes)
    return math.ceil((stage.epochs or 0) * max(math.ceil(calls / stage.accumulation(processes)), 1))


def _stage(name, recipe, sizes, processor, processes, machine, precision, notes):
    stage = recipe.stages[name]
    try:
        accumulation = stage.accumulation(processes)
    except ValueError as error:
        raise ValueError(f"stages.{name}.{error}") from None
    found, held_out = records(name, recipe, notes)
    examples, at_most = (limit(stage), True) if found is None else (found.epoch, False)
    encoded = outsized = None
    if found is not None and processor is not None:
        encoded, outsized = _encode(name, recipe, found, processor, notes)
    most = 0 if outsized is None else int(outsized.lengths.max()) + AROUND
    if stage.batch_tokens is not None and most > stage.batch_tokens:
        notes.append(
            f"{name}: a record takes {most} positions, more than batch_tokens, {stage.batch_tokens}: training refuses it"
        )
    if stage.batch_tokens is None:
        mean, longest = _batches(stage, encoded, outsized, recipe.llm_input[name])
    else:
        seed = (recipe.seed, sum(name.encode()))
        with_prompt = recipe.llm_input[name]
        mean, longest, accumulation = _budgets(stage, encoded, examples, with_prompt, processes, seed)
    steps = stage.steps if examples is None else steps_of(stage, examples, processes)
    autocast, checkpointing = precision == "bf16", stage.gradient_checkpointing
    parts = stage_parts(recipe, name)
    engine = _engine(recipe)
    shape = (sizes, longest, autocast)
    held = memory(*shape, checkpointing, machine.is_cpu, parts, recipe.quantization, engine)
    held = sharded(held, sizes, engine, processes, parts)
    other = memory(*shape, not checkpointing, machine.is_cpu, parts, engine=engine)["activations"]
    overhead = 0 if machine.is_cpu else GPU_OVERHEAD
    operations = arithmetic(sizes, mean, checkpointing, parts) * accumulation
    seconds = None if steps is None else steps * operations / machine.flops_per_second[precision]
    tokens = None
    if encoded is not None:
        source, text = encoded.questions.lengths(), encoded.texts.lengths()
        tokens = {
            "encoder": round(float(source.mean()) * examples),
            "llm": round(float(text.mean()) * examples),
            "sampled": not found.whole,
        }
    return {
        "examples": examples,
        "at_most": at_most,
        "held_out": held_out,
        "epochs": stage.epochs,
        "tokens_an_epoch": tokens,
        "steps": steps,
        "global_batch": stage.global_batch_size or stage.batch_size * processes * accumulation,
        "batch_size": None if stage.batch_tokens else stage.batch_size,
        "batch_tokens": stage.batch_tokens,
        "accumulation": accumulation,
        "longest_batch": {"rows": round(longest.rows), "encoder": round(longest.source), "llm": round(longest.text)},
        "memory": {**held, "overhead": overhead, "total": sum(held.values()) + overhead},
        "activations_if_checkpointing" if not checkpointing else "activations_without_checkpointing": other,
        "operations_a_step": operations * processes,
        "seconds": seconds,
    }


def _engine(recipe: Recipe) -> str:
    """The recipe's engine, with the stage of DeepSpeed."""
    if recipe.parallel != "deepspeed":
        return recipe.parallel
    zero = read_deepspeed(recipe.deepspeed or "zero3").get("zero_optimization", {})
    return f"zero{zero.get('stage', 0)}"


def _processor(recipe, notes):
    try:
        return LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(" :")
        notes.append(
            f"a tokenizer is missing ({reason}): lengths are taken for the recipe's limits, the most that can come"
        )
        return None


def _encode(name, recipe, found, processor, notes):
    """The sample and the longest records, tokenised."""
    quiet = logging.getLogger("layalign.train.data.encoding")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # how many of a sample are cut is of no use
    try:
        encoder = RecordEncoder(processor, recipe.stages[name], recipe.llm_input[name])
        both = encode_records([*found.sample, *found.longest], encoder)
        both.soft = has_soft_prompts(recipe)
        return [both.subset(part) for part in np.split(np.arange(len(both)), [len(found.sample)])]
    except ValueError as error:
        notes.append(f"{name}: {error}")
        return None, None
    finally:
        quiet.setLevel(level)


def _batches(
    stage: StageRecipe, encoded: EncodedRecords | None, outsized: EncodedRecords | None, with_prompt: bool
) -> tuple[Batch, Batch]:
    """The mean forward call of an epoch of the sample, filled up as training does it (packed ones are not), and the longest that the
    longest records make.
    """
    if encoded is None or outsized is None:
        most = _most(stage, with_prompt)
        return most, most
    order = np.array(list(order_of(stage, encoded, (0,))))
    calls = [order[start : start + stage.batch_size] for start in range(0, len(order), stage.batch_size)]
    sides = _sides(encoded)
    one = np.mean if stage.packing else np.max
    shapes = np.array([[one(values[call]) for values in sides] for call in calls])
    mean, together = shapes.mean(0), np.stack(_sides(outsized), 1)
    if stage.packing and not stage.length_grouped:  # they stand among others, and fill nothing up
        most = together[together.sum(1).argmax()]
        together = mean + (most - mean)[None] / stage.batch_size
    fullest = max(one(together, 0), shapes[shapes.sum(1).argmax()], key=np.sum)
    return Batch(stage.batch_size, *mean), Batch(stage.batch_size, *fullest)


def _budgets(
    stage: StageRecipe,
    encoded: EncodedRecords | None,
    examples: int | None,
    with_prompt: bool,
    processes: int,
    seed: tuple[int, ...],
) -> tuple[Batch, Batch, int]:
    """The mean and the fullest forward call of a stage with batch_tokens, and the calls of one process in a step: those of training,
    where the sample is all there is.
    """
    wanted, budget = stage.global_batch_size or 1, stage.batch_tokens or 1
    if encoded is None:
        most = _most(stage, with_prompt)
        rows = max(budget // int(most.source + most.text + AROUND), 1)
        most = replace(most, rows=rows)
        return most, most, math.ceil(wanted / rows / processes)
    means = [float(values.mean()) for values in _sides(encoded)]
    order = order_of(stage, encoded, seed)
    if len(encoded) == examples:
        batches = token_batches(stage, encoded, order, processes)
        calls = batches.calls if batches is not None else 1
    else:
        sampled = min(wanted, len(encoded))
        batches = TokenBatches(order, encoded.lengths + AROUND, sampled, budget, processes, 1)
        calls = math.ceil(batches.calls * wanted / sampled)
    fullest = budget / (means[0] + means[1] + AROUND)
    return Batch(wanted / processes / calls, *means), Batch(fullest, *means), calls


def _most(stage: StageRecipe, with_prompt: bool) -> Batch:
    prompt = stage.source_max_length if with_prompt else 0
    target = stage.target_max_length
    return Batch(stage.batch_size, stage.source_max_length, prompt + target, target)


def _sides(encoded: EncodedRecords) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of each record: of its source, its text and its target."""
    text = encoded.texts.lengths()
    return encoded.questions.lengths(), text, text - encoded.prompt_lengths
