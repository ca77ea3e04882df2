"""What a pickle holds of a model: everything but transformers' capturing hooks, which are local functions and are made anew."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from transformers.utils import output_capturing

from layalign.offloading import hooks
from layalign.shards import is_partition, is_shard
from layalign.sharing import shared_with_twins

INSTALLED = "_output_capturing_hooks_installed"  # transformers' mark on a model that has them


def picklable_state(model: torch.nn.Module) -> dict[str, Any]:
    """A model's attributes, as its `__getstate__` gives them, with modules of their own on the same tensors.

    Args:
        model: with submodules of transformers.

    Raises:
        pickle.PicklingError: a model that is more than its tensors: spread over devices, offloaded or sharded.
    """
    what = ""
    if any(hooks(module) for module in model.modules()):
        what = "whose LLM is spread over devices or offloaded"
    elif any(is_shard(parameter) or is_partition(parameter) for parameter in model.parameters()):
        what = "whose weights several processes hold together"
    if what:
        raise pickle.PicklingError(
            f"a model {what} cannot be pickled; save it by save_pretrained and load it by from_pretrained"
        )
    kept = [*shared_with_twins(model), *model.parameters()]
    state = copy.deepcopy(model.__getstate__(), {id(own): own for own in kept} | {id(model): model})
    for part in state["_modules"].values():
        for module in part.modules() if part is not None else ():
            _without_capturing(module)
    return state


def _without_capturing(module: torch.nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) == output_capturing.__name__:
            for kind in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                kind.pop(key, None)
    vars(module).pop(INSTALLED, None)
