"""PagedDecode: self-attention and gated cross-attention of a step that only decodes, in one launch over vLLM's paged caches.

Imported only where LAYALIGN_PAGED_DECODE=1 asks for it. Imports no vLLM itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_decode_paged

# Of vLLM's attention backends those with caches (pages, Hkv, keys of a page, 2 D), keys and values of a head side by side.
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


def why_not(own: Any, cross: Any, platform: str) -> str | None:
    """What keeps an attention from PagedDecode, in words; None where nothing does.

    Args:
        own, cross: vLLM's layers of the self- and the cross-attention.
        platform: vLLM's name of the device, "cuda" or another.
    """
    if platform != "cuda":
        return f"vLLM runs on {platform} here, and it is for cuda"
    for layer in (own, cross):
        name = layer.attn_backend.get_name()
        if name not in BACKENDS:
            return f"vLLM's attention backend is {name}, and it reads the caches of {' and '.join(BACKENDS)}"
        if layer.kv_cache_torch_dtype != layer.dtype:
            return f"the caches are {layer.kv_cache_torch_dtype} in a model of {layer.dtype}"
    if own.attn_backend.forward_includes_kv_cache_update:
        return "vLLM's attention backend writes the step's keys itself"
    if own.head_size > 256 or (own.dtype == torch.float32 and own.head_size > 64):
        return f"no kernel has {own.dtype} heads of {own.head_size}"
    if own.has_sink or own.impl.alibi_slopes is not None or own.kv_sharing_target_layer_name is not None:
        return "the LLM's attention has sinks, ALiBi or the keys of another layer"
    if getattr(own.impl, "dcp_world_size", 1) > 1:
        return "caches are divided over processes by position"
    return None


@functools.cache
def warn_once(reason: str) -> None:
    """Say that two calls serve: of each reason once, not of each layer."""
    logging.getLogger("vllm.layalign").warning(
        "LAYALIGN_PAGED_DECODE=1 is left out, two attention calls serve: %s", reason
    )


class PagedDecode:
    """Takes the place of `forward` of a self-attention's implementation in vLLM: what it writes has the gated cross-attention in it.

    In the implementation, and not around the layer: that is where vLLM has the step's metadata, outside of what it compiles. A step
    that reads prompts goes through both implementations.

    Args:
        own, cross: vLLM's layers of both attentions.
        gate: -> the gate, (1,) or (Hq,) of this process's heads.
        context: vLLM's `get_attention_context`: a layer's name -> its metadata in this step, the layer, its cache, slots.
    """

    def __init__(
        self, own: Any, cross: Any, gate: Callable[[], Tensor], context: Callable[[str], tuple[Any, Any, Tensor, Any]]
    ):
        self.own, self.cross, self.gate, self.context = own, cross, gate, context
        self.own_forward = own.impl.forward

    def __call__(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        """As vLLM's: queries (tokens, Hq, D), whose keys and values are in the cache -> output (tokens, Hq, D), written."""
        if attn_metadata is None:  # vLLM measures memory
            return self.own_forward(layer, query, key, value, kv_cache, None, output=output, **scales)
        metadata, _, cross_cache, _ = self.context(self.cross.layer_name)
        if attn_metadata.max_query_len == 1 and self._reads(kv_cache) and self._reads(cross_cache):
            self._decode(query, output, (kv_cache, attn_metadata), (cross_cache, metadata))
            return output
        self.own_forward(layer, query, key, value, kv_cache, attn_metadata, output=output, **scales)
        found = torch.empty_like(output)
        self.cross.impl.forward(self.cross, query, None, None, cross_cache, metadata, output=found)
        tokens = attn_metadata.num_actual_tokens
        output[:tokens] += found[:tokens] * self.gate().to(found.dtype)[:, None]
        return output

    def _reads(self, cache):
        own = self.own
        if cache.dim() == 4 and (cache.shape[1], cache.shape[3]) == (own.num_kv_heads, 2 * own.head_size):
            return True
        warn_once(f"a cache has the shape {tuple(cache.shape)}")
        return False

    def _decode(self, query, output, *sides):
        """sides: cache and metadata of the self- and of the cross-attention."""
        rows, own = sides[0][1].num_actual_tokens, self.own
        arguments = []
        for cache, metadata in sides:
            table = metadata.block_table[:rows]
            # A step that is captured in a graph stands for later ones, which may be longer.
            if not (table.is_cuda and torch.cuda.is_current_stream_capturing()):
                table = table[:, : max(1, -(-metadata.max_seq_len // cache.shape[2]))]
            keys_and_values = cache.transpose(1, 2).split(own.head_size, dim=-1)
            arguments += [*keys_and_values, table, metadata.seq_lens[:rows]]
        adaptive_fusion_decode_paged(
            query[:rows].unsqueeze(2),
            *arguments,
            self.gate(),
            scale=own.impl.scale,
            window=own.sliding_window,
            softcap=own.impl.logits_soft_cap or None,
            out=output[:rows].unsqueeze(2),
        )
