"""CrossFusedAttention: an attention call of a vLLM model, with a gated call on cross keys and values in a paged cache of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, CrossAttention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from layalign.serving.settings import paged_decode_asked


class CrossFusedAttention(nn.Module):
    """Takes the place of an attention module's `attn`, which gets queries after norm and RoPE: both calls see the same.

    Args:
        own: the self-attention.
        gate: "scalar" or "head".
        cache_config: vLLM's.
    """

    def __init__(self, own: Attention, gate: str, cache_config: Any):
        super().__init__()
        self.own = own
        # The window is of the self-attention alone.
        cache_config = copy.copy(cache_config)
        cache_config.sliding_window = None
        self.cross = CrossAttention(
            own.num_heads,
            own.head_size,
            own.impl.scale,
            cache_config=cache_config,
            num_kv_heads=own.num_kv_heads,
            prefix=f"{own.layer_name.removesuffix('attn')}cross_attn",
        )
        total = own.num_heads * get_tensor_model_parallel_world_size()
        self.gate = nn.Parameter(torch.zeros(total if gate == "head" else 1), requires_grad=False)
        self.in_one_launch = paged_decode_asked() and self._decode_in_one_launch()

    def _decode_in_one_launch(self) -> bool:
        """Have the self-attention's implementation do both, and say whether it does. Where it cannot, answers are the same without:
        a server starts on any machine with the same settings."""
        from layalign.serving.paged_decode import PagedDecode, warn_once, why_not

        reason = why_not(self.own, self.cross, current_platform.device_name)
        if reason is not None:
            warn_once(reason)
            return False
        self.own.impl.forward = PagedDecode(self.own, self.cross, self._gate_of_heads, get_attention_context)
        return True

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries (tokens, Hq D), keys and values (tokens, Hkv D) -> (tokens, Hq D)."""
        # Cross keys and values are in the cache before the LLM runs, see `write`.
        if self.in_one_launch:
            return self.own(query, key, value)
        found = self.cross(query, None, None)
        return self.own(query, key, value) + found * self._gate_of_columns().to(found.dtype)

    def _gate_of_heads(self) -> torch.Tensor:
        """The gate (1,), or (Hq,) of this process's heads."""
        if len(self.gate) == 1:
            return self.gate
        first = get_tensor_model_parallel_rank() * self.own.num_heads
        return self.gate[first : first + self.own.num_heads]

    def _gate_of_columns(self) -> torch.Tensor:
        """The gate (1,), or (Hq D,) of this process's heads."""
        gate = self._gate_of_heads()
        return gate if len(self.gate) == 1 else gate.repeat_interleave(self.own.head_size)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the cross keys and values (tokens, Hkv, D) of the requests whose prompts are read in this step into the cache.

        Args:
            keys, values: of these requests one after the other, in the order of the batch.
        """
        if get_forward_context().attn_metadata is None:  # vLLM measures memory
            return
        metadata, layer, cache, _ = get_attention_context(self.cross.layer_name)
        slots = metadata.slot_mapping
        if len(slots) != len(keys):
            raise RuntimeError(f"{self.cross.layer_name}: {len(keys)} cross keys for {len(slots)} slots of the cache")
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)


def attention_layers(llm: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a vLLM model by layer: those with `qkv_proj` and an `attn`."""
    found = {}
    for module in llm.modules():
        own = getattr(module, "attn", None)
        if isinstance(own, Attention) and hasattr(module, "qkv_proj"):
            found[extract_layer_index(own.layer_name)] = module
    return found
