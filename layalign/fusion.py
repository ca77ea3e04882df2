"""The attention swap: one attention function and its mask function, registered with transformers under one name.

Any LLM whose attention modules call `ALL_ATTENTION_FUNCTIONS[name]` gets the fused operator without a subclass. The cross states
travel as the keyword argument `fusion`, so that checkpointing, two forwards before a backward and beam search see the right ones;
only the gate lives on the attention module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.sequence import Padding

NAME = "layalign"
FUSED = "_layalign_fused"  # attribute of an LLM that `layalign.fuse` has patched
UNCOVERED = (
    "this LLM asks for an attention pattern that LayAlign's fused attention does not cover (chunked, blockwise, bidirectional or "
    "packed by position_ids); causal and sliding-window causal attention are, and sequences packed by cu_seqlens"
)


# Of an attention function's arguments, those that say what a query sees (MiniMax-M3's blocks) or add to scores.
_NOT_COVERED = ("block_indices", "indices", "position_bias", "sinks")


class FusionMask(NamedTuple):
    """What the mask function hands to every attention call, in the operator's own terms instead of a (B, 1, S, N) mask."""

    key_mask: torch.Tensor | None  # (B, N) bool
    query_start: int | torch.Tensor  # key index of the first query
    window: int | None
    key_offset: int | torch.Tensor = 0  # of the sequence's positions that a sliding cache has dropped
    states: Any = None  # the call's CrossStates, where a layer hands on its mask alone, see families.bring_arguments


def mask_of_cache(attention_mask: torch.Tensor | None = None, **call: Any) -> torch.Tensor | None:
    """The mask of a generation step: (B, N) as it is, padded to a static cache's width, for one that grows would be a graph more at each
    step. What else transformers hands over is `call`, the cache in it."""
    cache = call.get("past_key_values", call.get("cache"))
    if attention_mask is None or cache is None:
        return attention_mask
    width = max((getattr(layer, "max_cache_len", 0) for layer in cache.layers), default=0)
    return torch.nn.functional.pad(attention_mask, (0, max(width - attention_mask.shape[1], 0)))


class CrossInputs(NamedTuple):
    """Cross keys and values of the fused layers, as a forward call takes them, and what is known of padding."""

    keys: torch.Tensor  # (B, L, Hkv, T, D)
    values: torch.Tensor  # (B, L, Hkv, T, D)
    mask: torch.Tensor | None  # (B, T) bool
    span: torch.Tensor | None = None  # (B, 2) int32, the mask once more; None: only the mask says
    own: Padding | None = None  # of the LLM's sequence, B rows; None: only its attention mask says


class Packing(NamedTuple):
    """Where packed sequences begin and end in their row, (n + 1,) int32 each, as the operator takes it."""

    own: torch.Tensor  # in what the LLM reads
    cross: torch.Tensor  # in the cross keys

    def to(self, device: torch.device) -> Packing:
        """On another device."""
        return Packing(self.own.to(device), self.cross.to(device))


class CrossStates:
    """One forward call's cross keys and values, layer by layer, which layers used them, and how its row is packed.

    Args:
        cross: the keys, values and mask; None: there are none.
        layers: indices of the L fused layers.
        backend: of the fused operator.
        packing: of a row of packed sequences; None: every row is one sequence.

    Attributes:
        refuses_dropout: whether dropout of attention weights, which the operator has not, is an error in its calls.
    """

    refuses_dropout = False

    def __init__(self, cross: CrossInputs | None, layers: Sequence[int], backend: str, packing: Packing | None = None):
        self.keys: Sequence[torch.Tensor] = ()
        self.values: Sequence[torch.Tensor] = ()
        self.span = self.mask = self.own = None
        self.packing = packing
        if cross is not None:
            # Taken apart once: indexing in every layer would make a full-size gradient of zeros for each.
            self.keys, self.values = cross.keys.unbind(1), cross.values.unbind(1)
            spans = takes_spans(backend, cross.keys.device)
            self.span = cross.span if spans else None
            self.mask = None if cross.mask is None or self.span is not None else drop_full(cross.mask)
            self.own = cross.own if spans else None
        self._own_spans: dict[tuple[int, Any], torch.Tensor] = {}
        self.backend = backend
        self.indices = {layer: index for index, layer in enumerate(layers if cross is not None else ())}
        self.used: set[int] = set()

    def hidden_keys(self, mask: FusionMask, rows: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """-> the mask (rows, N) and the span (rows, 2) of the LLM's own keys, made once per call of the model."""
        if self.own is None:
            return mask.key_mask, None
        if self.own.span is None:
            return None, None
        moved = mask.key_offset if isinstance(mask.key_offset, int) else id(mask.key_offset)
        if (rows, moved) not in self._own_spans:
            span = self.own.span
            if rows != len(span):  # beams and samples of an example
                span = span.repeat_interleave(rows // len(span), dim=0)
            if moved != 0:
                span = (span - mask.key_offset).to(torch.int32)
            self._own_spans[rows, moved] = span
        return None, self._own_spans[rows, moved]

    def gate(self, module: Any, call: Mapping[str, Any]) -> torch.Tensor:
        """The gate of a fused layer's call, as the operator takes it.

        Args:
            module: the attention module.
            call: the attention function's other keyword arguments, among them what `dynamic_gate_hook` has made.
        """
        made = call.get("fusion_gate")
        return module.fusion_gate(None) if made is None else made


def takes_spans(backend: str, device: torch.device) -> bool:
    """Whether this backend of the operator is faster by spans than by masks; on CPUs full masks are dropped by a look at them."""
    return backend in ("triton", "flash") or (backend == "auto" and device.type == "cuda")


def swap_attention(llm: PreTrainedModel) -> None:
    """Make LayAlign's the attention function of an LLM.

    Raises:
        ValueError: an LLM whose attention cannot be set.
    """
    # Of one that reads pictures too, the language model's alone.
    alone = llm.config.get_text_config(decoder=True) is llm.config
    (llm if alone else llm.get_decoder()).set_attn_implementation(NAME)
    if llm.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise ValueError(
            f"{type(llm).__name__} does not let its attention be set: it does not go through transformers' attention interface, "
            "so LayAlign cannot be joined to it"
        )


def check_free(llm: PreTrainedModel) -> None:
    """Before an LLM becomes part of a LayAlign model, or is fused.

    Raises:
        ValueError: `layalign.fuse` has fused it.
    """
    if hasattr(llm, FUSED):
        raise ValueError(f"this {type(llm).__name__} is fused already; layalign.unfuse(llm) gives the bare LLM back")


def check_swapped(llm: PreTrainedModel) -> None:
    """Before a forward call.

    Raises:
        RuntimeError: the LLM's attention function is no longer LayAlign's.
    """
    current = llm.config.get_text_config(decoder=True)._attn_implementation
    if current != NAME:
        raise RuntimeError(
            f"the LLM's attention implementation was set to {current!r}, which drops the cross-attention; "
            f"call model.llm.set_attn_implementation({NAME!r})"
        )


def check_used(llm: PreTrainedModel, cross: CrossStates) -> None:
    """After a forward call: every fused layer must have called the attention function; a few families ignore it silently.

    Raises:
        RuntimeError: one has not.
    """
    missing = sorted(cross.indices.keys() - cross.used)
    if missing:
        raise RuntimeError(
            f"{type(llm).__name__} did not call LayAlign's attention function in layers {missing}: its attention does not go "
            "through transformers' attention interface, so LayAlign cannot be joined to it"
        )


def fusion_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> FusionMask:
    """Mask function of the pair: keeps the 2-D padding mask, the window and the query's place; refuses patterns it would lose."""
    key_mask = attention_mask
    if key_mask is not None:
        key_mask = key_mask[:, kv_offset : kv_offset + kv_length]
        if key_mask.shape[1] < kv_length:
            key_mask = torch.nn.functional.pad(key_mask, (0, kv_length - key_mask.shape[1]))
        key_mask = drop_full(key_mask)
    return FusionMask(key_mask, q_offset - kv_offset, _window(mask_function, local_size, config), kv_offset)


def drop_full(mask: torch.Tensor) -> torch.Tensor | None:
    """None for an all-true mask on a CPU, where a mask costs SDPA its fast path; on a GPU looking would be a synchronisation."""
    looking_is_free = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if looking_is_free and bool(mask.all()) else mask


def _window(mask_function: Callable, local_size: int | None, config: PreTrainedConfig | None) -> int | None:
    """The sliding window in a mask function of transformers: None for plain causal, the width for sliding causal."""
    if mask_function is causal_mask_function:
        return None
    if mask_function.__code__ is sliding_window_causal_mask_function(1).__code__:
        if torch.compiler.is_compiling():
            # Dynamo cannot look into a closure; chunked attention, of the same code, has a local_size of another setting.
            if local_size is not None and local_size == getattr(config, "sliding_window", None):
                return local_size
            raise ValueError(UNCOVERED)
        (parts,) = (cell.cell_contents for cell in mask_function.__closure__ or ())
        overlay = [part for part in parts if part.__code__ is sliding_window_overlay(1).__code__]
        if len(parts) == 2 and len(overlay) == 1 and causal_mask_function in parts:
            (window,) = (cell.cell_contents for cell in overlay[0].__closure__)
            return window
    raise ValueError(UNCOVERED)


def fused_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: FusionMask,
    scaling: float | None = None,
    softcap: float | None = None,
    fusion: CrossStates | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the pair: query (B, Hq, S, D) after RoPE, key and value (B, Hkv, N, D) -> ((B, S, Hq, D), None)."""
    if not isinstance(attention_mask, FusionMask):
        raise ValueError(
            f"{type(module).__name__} got an attention mask of type {type(attention_mask).__name__} that LayAlign's mask function did "
            "not make; padding would be lost. LLMs must build their masks with transformers.masking_utils"
        )
    if asked := [name for name in _NOT_COVERED if kwargs.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} hands {asked[0]} to its attention function, which LayAlign's fused attention does not cover: "
            "answers would be another LLM's"
        )
    if kwargs.get("dropout") and (fusion is None or fusion.refuses_dropout):
        raise ValueError(
            f"{type(module).__name__}: attention dropout of {kwargs['dropout']} in training mode, which the fused attention does not have; "
            "call llm.eval(), or load the LLM with attention_dropout=0 (GPT-2: attn_pdrop=0)"
        )
    sink = kwargs.get("s_aux")  # transformers' name for attention sinks (gpt-oss)
    index = None if fusion is None else fusion.indices.get(module.layer_idx)
    if fusion is None or index is None:
        empty = key[:, :, :0]
        cross_key, cross_value, cross_mask, cross_span, gate = empty, empty, None, None, query.new_zeros(1)
    else:
        cross_key, cross_value = fusion.keys[index], fusion.values[index]
        cross_mask, cross_span = fusion.mask, fusion.span
        gate = fusion.gate(module, kwargs).to(query.device)
        fusion.used.add(module.layer_idx)
    key_mask, key_span = attention_mask.key_mask, None
    query_start: int | torch.Tensor | None = attention_mask.query_start
    packing = None if fusion is None else fusion.packing
    if packing is not None:
        packing = packing.to(query.device)
        if index is None:
            packing = packing._replace(cross=torch.zeros_like(packing.own))
        key_mask = query_start = None
    elif fusion is not None:
        key_mask, key_span = fusion.hidden_keys(attention_mask, len(query))
    if (
        cross_key.device != query.device
    ):  # an LLM spread over devices: what is the same for all layers lies on the first
        cross_key, cross_value = cross_key.to(query.device), cross_value.to(query.device)
        cross_mask, cross_span, key_mask, key_span = (
            None if hidden is None else hidden.to(query.device)
            for hidden in (cross_mask, cross_span, key_mask, key_span)
        )
    out: Any = adaptive_fusion_attention(
        query,
        key,
        value,
        cross_key,
        cross_value,
        gate,
        sink=sink if sink is None or sink.dtype == query.dtype else sink.float(),
        causal=True,
        scale=scaling,
        window=attention_mask.window,
        softcap=softcap,
        key_mask=key_mask,
        cross_mask=cross_mask,
        key_span=key_span,
        cross_span=cross_span,
        query_start=query_start,
        cu_seqlens=None if packing is None else packing.own,
        cross_cu_seqlens=None if packing is None else packing.cross,
        backend="auto" if fusion is None else fusion.backend,
    )
    return out.transpose(1, 2), None


def dynamic_gate_hook(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of an attention module: the dynamic gate needs the hidden states, which the attention function never sees."""
    if kwargs.get("fusion") is None:
        return None
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"fusion_gate": module.fusion_gate(hidden_states)}


AttentionInterface.register(NAME, fused_attention)
AttentionMaskInterface.register(NAME, fusion_mask)
