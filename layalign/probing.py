"""What an LLM's own attention modules make of hidden states, seen where they hand it to the attention function."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "layalign_probe"
_SEEN: ContextVar[dict[int, tuple[torch.Tensor, torch.Tensor]]] = ContextVar("layalign_probe")


@torch.no_grad()
def made_by(llm: Any, modules: Sequence[Any], streams: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that attention modules make of hidden states, without RoPE.

    Args:
        llm: the LLM they are in; its attention function is another one meanwhile.
        modules: N attention modules of it.
        streams: (2, N, T, Dl), hidden states for the keys and for the values of each.

    Returns:
        for each module keys and values (T, Hkv, D).
    """
    before = llm.config.get_text_config(decoder=True)._attn_implementation
    training = [(module, module.training) for module in llm.modules()]
    llm.eval()
    llm.set_attn_implementation(NAME)
    try:
        keys, values = (_pass(llm, modules, part) for part in streams)
    finally:
        llm.set_attn_implementation(before)
        for module, mode in training:
            module.training = mode
    if missing := [type(module).__name__ for module in modules if id(module) not in keys]:
        raise ValueError(f"{type(llm).__name__}: {missing[0]} does not call transformers' attention interface")
    return [(keys[id(module)][0], values[id(module)][1]) for module in modules]


def _pass(llm, modules, streams):
    """id of a module -> keys and values (T, Hkv, D) of its hidden states (T, Dl)."""

    def replacing(states):
        def hook(module, args, kwargs):
            if isinstance(angles := kwargs.get("position_embeddings"), tuple):
                # No turn, and no factor that some kinds of RoPE put into it. At position 0 the sine is 0: GPT-J's comes first.
                still = tuple(torch.ones_like(part) if part.any() else torch.zeros_like(part) for part in angles)
                kwargs = kwargs | {"position_embeddings": still}
            rows = states[:, None]  # each in a row of its own, at position 0
            return ((rows, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": rows})

        return hook

    handles = [
        module.register_forward_pre_hook(replacing(states), with_kwargs=True)
        for module, states in zip(modules, streams, strict=True)
    ]
    token = _SEEN.set({})
    try:
        weight = llm.get_input_embeddings().weight
        zeros = torch.zeros(streams.shape[1], 1, dtype=torch.long, device=weight.device)
        embeddings = weight.new_zeros(*zeros.shape, streams.shape[-1])
        llm(inputs_embeds=embeddings, attention_mask=zeros + 1, position_ids=zeros, use_cache=False)
        return _SEEN.get()
    finally:
        _SEEN.reset(token)
        for handle in handles:
            handle.remove()


def _record(module, query, key, value, *args, **kwargs):
    _SEEN.get()[id(module)] = key[:, :, 0], value[:, :, 0]
    return torch.zeros_like(query.transpose(1, 2)), None


# One token sees itself: there is nothing to hide.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
AttentionInterface.register(NAME, _record)
