"""The attention swap: one attention function and its mask function, registered with transformers under one name.

Any LLM whose attention modules call `ALL_ATTENTION_FUNCTIONS[name]` gets the fused operator without a subclass. The cross states
travel as the keyword argument `fusion`, so that checkpointing, two forwards before a backward and beam search see the right ones;
only the gate lives on the attention module.
"""

from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

NAME = "layalign"
UNCOVERED = (
    "this LLM asks for an attention pattern that LayAlign's fused attention does not cover (chunked, blockwise, bidirectional or "
    "packed by position_ids); causal and sliding-window causal attention are"
)


class FusionMask(NamedTuple):
    """What the mask function hands to every attention call, in the operator's own terms instead of a (B, 1, S, N) mask."""

    key_mask: torch.Tensor | None  # (B, N) bool
    query_start: int | torch.Tensor  # key index of the first query
    window: int | None


class CrossStates:
    """Cross keys and values (B, L, Hkv, T, D) of the fused layers, their mask (B, T), and which layers used them."""

    def __init__(self, keys, values, mask, layers, backend):
        # Taken apart once: indexing in every layer would make a full-size gradient of zeros for each.
        self.keys, self.values = keys.unbind(1), values.unbind(1)
        self.mask = None if mask is None else drop_full(mask)
        self.backend = backend
        self.slots = {layer: slot for slot, layer in enumerate(layers)}
        self.used = set()


def fusion_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    config=None,
    **kwargs,
):
    """Mask function of the pair: keeps the 2-D padding mask, the window and the query's place; refuses patterns it would lose."""
    key_mask = attention_mask
    if key_mask is not None:
        key_mask = key_mask[:, kv_offset : kv_offset + kv_length]
        if key_mask.shape[1] < kv_length:
            key_mask = torch.nn.functional.pad(key_mask, (0, kv_length - key_mask.shape[1]))
        key_mask = drop_full(key_mask)
    return FusionMask(key_mask, q_offset - kv_offset, _window(mask_function, local_size, config))


def drop_full(mask):
    """None for an all-true mask on a CPU, where a mask costs SDPA its fast path; on a GPU looking would be a synchronisation."""
    looking_is_free = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if looking_is_free and bool(mask.all()) else mask


def _window(mask_function, local_size, config):
    """The sliding window in a mask function of transformers: None for plain causal, the width for sliding causal."""
    if mask_function is causal_mask_function:
        return None
    if mask_function.__code__ is sliding_window_causal_mask_function(1).__code__:
        if torch.compiler.is_compiling():
            # Dynamo cannot look into a closure; chunked attention, of the same code, has a local_size of another setting.
            if local_size is not None and local_size == getattr(config, "sliding_window", None):
                return local_size
            raise ValueError(UNCOVERED)
        (parts,) = (cell.cell_contents for cell in mask_function.__closure__)
        overlay = [part for part in parts if part.__code__ is sliding_window_overlay(1).__code__]
        if len(parts) == 2 and len(overlay) == 1 and causal_mask_function in parts:
            (window,) = (cell.cell_contents for cell in overlay[0].__closure__)
            return window
    raise ValueError(UNCOVERED)


def fused_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, fusion=None, **kwargs):
    """Attention function of the pair: query (B, Hq, S, D) after RoPE, key and value (B, Hkv, N, D) -> ((B, S, Hq, D), None)."""
    if not isinstance(attention_mask, FusionMask):
        raise ValueError(
            f"{type(module).__name__} got an attention mask of type {type(attention_mask).__name__} that LayAlign's mask function did "
            "not make; padding would be lost. LLMs must build their masks with transformers.masking_utils"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} uses attention sinks, which LayAlign's fused attention does not support"
        )
    slot = None if fusion is None else fusion.slots.get(module.layer_idx)
    if slot is None:
        empty = key[:, :, :0]
        cross_key, cross_value, cross_mask, gate = empty, empty, None, query.new_zeros(1)
    else:
        cross_key, cross_value = fusion.keys[slot], fusion.values[slot]
        cross_mask = fusion.mask
        gate = kwargs.get("fusion_gate")
        gate = module.fusion_gate(None) if gate is None else gate
        fusion.used.add(module.layer_idx)
    out = adaptive_fusion_attention(
        query,
        key,
        value,
        cross_key,
        cross_value,
        gate,
        causal=True,
        scale=scaling,
        window=attention_mask.window,
        softcap=softcap,
        key_mask=attention_mask.key_mask,
        cross_mask=cross_mask,
        query_start=attention_mask.query_start,
        backend="auto" if fusion is None else fusion.backend,
    )
    return out.transpose(1, 2), None


def dynamic_gate_hook(module, args, kwargs):
    """Forward pre-hook of an attention module: the dynamic gate needs the hidden states, which the attention function never sees."""
    if kwargs.get("fusion") is None:
        return None
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"fusion_gate": module.fusion_gate(hidden_states)}


AttentionInterface.register(NAME, fused_attention)
AttentionMaskInterface.register(NAME, fusion_mask)
