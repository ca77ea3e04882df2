"""The processes that train together, and whether they do it on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from layalign.train.recipe import Recipe
    from layalign.train.stage_recipe import StageRecipe

# What PyTorch calls the instructions of x86 and of ARM that multiply in bf16.
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def on_cpu(recipe: Recipe) -> bool:
    """Whether a recipe is trained on the CPU: asked for, or for want of anything else."""
    return recipe.device == "cpu" or not torch.accelerator.is_available()


def precision_of(recipe: Recipe, stage: StageRecipe) -> Literal["fp32", "bf16"]:
    """What a stage of a recipe computes in on this machine, which "auto" leaves to it.

    A CPU without instructions for bf16 makes 13 GFLOP/s in it and 75 in fp32 (one thread, AVX2).
    """
    if stage.precision != "auto":
        return stage.precision
    if not on_cpu(recipe) and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # PyTorch 2.11 may not tell yet.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(name) for name in _BF16_INSTRUCTIONS) else "fp32"


def processes(recipe: Recipe) -> PartialState:
    """The processes that train together (torchrun): what each of them would write is written by the first one.

    Raises:
        ValueError: several were started, and each would train alone.
    """
    with _talking_on_the_cpu(recipe):
        # NCCL's ten minutes are short of what the first process alone may write and hash, with an LLM that is trained.
        state = PartialState(cpu=on_cpu(recipe), timeout=timedelta(hours=2))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ValueError(
            f"device: {started} processes were started (WORLD_SIZE), but they do not find each other: accelerate trains in "
            f"{state.num_processes}, on {state.device}. It was set up before by other means; start a process of its own"
        )
    return state


@contextmanager
def _talking_on_the_cpu(recipe):
    """Shards that wait on the CPU are added up there, for which accelerate opens a second way beside the GPUs' if told so here."""
    if recipe.parallel != "fsdp2" or recipe.fsdp is None or not recipe.fsdp.cpu_offload:
        yield
        return
    names = ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "true"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def heard_by_all() -> Iterator[None]:
    """Where the block is refused in one process, all of them say so and end, and none waits for the others.

    All processes go through the block; one that has nothing to do in it, too.

    Raises:
        ValueError: this process', or the first one's that raised it.
    """
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    messages = [
        message for message in gather_object([None if refusal is None else str(refusal)]) if message is not None
    ]
    if refusal is not None:
        raise refusal
    if messages:
        raise ValueError(messages[0])
