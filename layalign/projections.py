"""The frozen key and value projections of an LLM's attention modules, applied to cross states (no RoPE there)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


def attention_modules(llm):
    """The self-attention module of every decoder layer, by layer index.

    Raises:
        ValueError: the LLM has no modules with a layer index and key/value projections that we know.
    """
    found = {}
    for name, module in llm.get_decoder().named_modules():
        index = getattr(module, "layer_idx", None)
        if index is not None and type(module).__name__.endswith("Attention") and "cross" not in name.lower():
            found.setdefault(index, module)
    layers = llm.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(found) != list(range(layers)):
        raise ValueError(
            f"{type(llm).__name__}: found attention modules for layers {sorted(found)} of {layers}; LayAlign needs an LLM whose "
            "attention modules carry a layer_idx and go through transformers' attention interface (Llama, Mistral, Qwen, Phi-3, ...)"
        )
    return found


@dataclass
class KeyValueProjection:
    """Keys and values of one layer from the aligner's streams (B, T, Dl) -> (B, T, kv).

    Fused QKV modules give slices of their weight. A projection that is no plain linear layer (4-bit, LoRA, sharded) is called as a
    module instead; `is_plain` tells which. `key_norm` is the layer's own norm of keys (Qwen3, OLMo 2).
    """

    head_dim: int
    heads: int
    key_norm: nn.Module | None
    key_weight: torch.Tensor | None = None
    value_weight: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None
    key_module: nn.Module | None = None
    value_module: nn.Module | None = None

    @property
    def is_plain(self):
        return self.key_module is None

    def key(self, stream):
        return F.linear(stream, self.key_weight, self.key_bias) if self.is_plain else self.key_module(stream)

    def value(self, stream):
        return F.linear(stream, self.value_weight, self.value_bias) if self.is_plain else self.value_module(stream)

    def split_key(self, keys):
        """keys (B, T, kv) -> (B, T, Hkv, D), normed as the layer norms its own keys before RoPE."""
        if self.key_norm is None:
            return keys.unflatten(-1, (self.heads, self.head_dim))
        if self.key_norm.weight.shape[-1] == self.head_dim:
            return self.key_norm(keys.unflatten(-1, (self.heads, self.head_dim)))
        return self.key_norm(keys).unflatten(-1, (self.heads, self.head_dim))


def key_value_projection(attention, config):
    """Read the projections off an attention module.

    Raises:
        ValueError: a module whose projections we do not know how to read.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = getattr(attention, "k_norm", None)
    if getattr(attention, "v_norm", None) is not None or (norm is not None and getattr(norm, "weight", None) is None):
        raise ValueError(f"{type(attention).__name__}: its value norm or weightless key norm is not supported")
    width = heads * head_dim
    if hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        key, value = attention.k_proj, attention.v_proj
        if type(key) is nn.Linear and type(value) is nn.Linear:
            return KeyValueProjection(head_dim, heads, norm, key.weight, value.weight, key.bias, value.bias)
        return KeyValueProjection(head_dim, heads, norm, key_module=key, value_module=value)
    if type(getattr(attention, "qkv_proj", None)) is nn.Linear:  # Phi-3: queries, keys, values one after the other
        parts = _split(attention.qkv_proj.weight, attention.qkv_proj.bias, width)
    elif hasattr(attention, "c_attn") and not isinstance(
        attention.c_attn, nn.Linear
    ):  # GPT-2: Conv1D, weight (in, out)
        parts = _split(attention.c_attn.weight.T, attention.c_attn.bias, width)
    elif type(getattr(attention, "query_key_value", None)) is nn.Linear:  # GPT-NeoX: q, k, v interleaved by head
        weight, bias = attention.query_key_value.weight, attention.query_key_value.bias
        by_head = weight.view(heads, 3, head_dim, -1)
        bias_by_head = None if bias is None else bias.view(heads, 3, head_dim)
        parts = [by_head[:, i].reshape(width, -1) for i in (1, 2)]
        parts += [None if bias is None else bias_by_head[:, i].reshape(width) for i in (1, 2)]
    else:
        raise ValueError(
            f"{type(attention).__name__}: no k_proj/v_proj, qkv_proj, c_attn or query_key_value linear layer to project cross states with"
        )
    return KeyValueProjection(head_dim, heads, norm, *parts)


def _split(weight, bias, width):
    keys, values = weight[-2 * width : -width], weight[-width:]
    return (keys, values, None, None) if bias is None else (keys, values, bias[-2 * width : -width], bias[-width:])
