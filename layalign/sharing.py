"""One LLM under several models: each has modules, gates and settings of its own, and the weights are there once."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from layalign import fusion

TRAINED = (
    "train_llm: another LayAlign model answers with this LLM, and would change with it; give this one a copy, copy.deepcopy(llm), or load "
    "the LLM again"
)
# LLMs whose weights another LLM has too, as long as they live.
_SHARING: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def own_modules(llm: PreTrainedModel) -> PreTrainedModel:
    """The LLM for one more model: itself, or, where it is another model's already, a twin of it on the same weights.

    Of a twin all modules, hooks and configurations are its own, so that neither model sees the other's gates, mode or attention; its
    parameters and buffers are the same tensors. Moved or cast to another dtype, parameters follow in both, buffers do not.

    Args:
        llm: as given.

    Raises:
        ValueError: another model trains it, by LoRA or whole.
    """
    if not any(name.endswith(".fusion_gate") for name, _ in llm.named_modules()):
        return llm
    shown = f"this {type(llm).__name__} is another LayAlign model's"
    if adapters := getattr(llm, "peft_config", None):
        raise ValueError(
            f"{shown} and has adapters already ({', '.join(adapters)}), which both would train; give the LLM as it was loaded"
        )
    if any(own.requires_grad for name, own in llm.named_parameters() if ".fusion_gate." not in name):
        raise ValueError(
            f"{shown}, which trains it (train_llm); give a copy of it, copy.deepcopy(llm), or load it again"
        )
    twin = copy.deepcopy(llm, {id(kept): kept for kept in shared_with_twins(llm)})
    for module in twin.modules():
        if "fusion_gate" in module._modules:
            del module.fusion_gate
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is fusion.dynamic_gate_hook]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    _SHARING.update((llm, twin))
    return twin


def is_shared(llm: PreTrainedModel) -> bool:
    """Whether another LLM has the same weights."""
    if llm not in _SHARING:
        return False
    first = next(llm.parameters())
    return any(other is not llm and next(other.parameters()) is first for other in _SHARING)


def shared_with_twins(llm: torch.nn.Module) -> Iterator[Any]:
    """What a twin does not get a copy of: tensors, but those of gates, and the stores that accelerate's hooks fetch weights from."""
    for name, tensor in (*llm.named_parameters(), *llm.named_buffers()):
        if ".fusion_gate." not in name:
            yield tensor
    for module in llm.modules():
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):
            if (store := getattr(hook, name, None)) is not None:
                yield store
        for value in vars(module).values():  # a cache of keys and values that generate has left, say
            if isinstance(value, torch.Tensor):
                yield value
