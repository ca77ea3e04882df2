"""The processes that train together, and whether they do it on the CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

if TYPE_CHECKING:
    from layalign.train.recipe import Recipe


def on_cpu(recipe: Recipe) -> bool:
    """Whether a recipe is trained on the CPU: asked for, or for want of anything else."""
    return recipe.device == "cpu" or not torch.accelerator.is_available()


def processes(recipe: Recipe) -> PartialState:
    """The processes that train together (torchrun): what each of them would write is written by the first one.

    Raises:
        ValueError: several were started, and each would train alone.
    """
    state = PartialState(cpu=on_cpu(recipe))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ValueError(
            f"device: {started} processes were started (WORLD_SIZE), but they do not find each other: accelerate trains in "
            f"{state.num_processes}, on {state.device}. It was set up before by other means; start a process of its own"
        )
    return state
