"""The frozen key and value projections of an LLM's attention modules, applied to cross states (no RoPE there)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


def attention_modules(llm: PreTrainedModel) -> dict[int, Any]:
    """The self-attention module of every decoder layer, by layer index.

    Raises:
        ValueError: the LLM has no modules with a layer index and key/value projections that we know.
    """
    found: dict[int, Any] = {}
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


class KeyValueWeights(NamedTuple):
    """Of one layer's keys and values."""

    key: torch.Tensor  # (kv, Dl)
    value: torch.Tensor  # (kv, Dl)
    key_bias: torch.Tensor | None  # (kv,)
    value_bias: torch.Tensor | None  # (kv,)


@dataclass(frozen=True)
class KeyValueProjection:
    """Keys and values of one layer from the aligner's streams (B, T, Dl) -> (B, T, kv).

    Everything is read off the attention module at each use: adapters put on it later, other weights and shards are followed. Where
    its projections are plain linear layers (`is_plain`) their weights can be folded with the aligner's; FSDP2's shards are
    gathered for that. Others (LoRA, 4-bit, hooked or otherwise replaced layers) are called as modules, which never folds.

    Attributes:
        attention: the attention module.
        heads, head_dim: of its keys and values; heads * head_dim = kv.
        names: its projections, keys and values apart or one for queries, keys and values together.
        interleaved: there by head (GPT-NeoX), else one after the other.
    """

    attention: Any
    heads: int
    head_dim: int
    names: tuple[str, ...]
    interleaved: bool = False

    @property
    def modules(self) -> list[Any]:
        """The projections named."""
        return [getattr(self.attention, name) for name in self.names]

    @property
    def is_plain(self) -> bool:
        """Whether they do no more than multiply by a weight and add a bias."""
        return all(_is_plain(module) for module in self.modules)

    def sources(self) -> list[torch.Tensor]:
        """The parameters that `weights` is made from; only where `is_plain`."""
        found = [(module.weight, module.bias) for module in self.modules]
        return [parameter for pair in found for parameter in pair if parameter is not None]

    def weights(self) -> KeyValueWeights:
        """What they multiply by and add; only where `is_plain`."""
        found = []
        for module in self.modules:
            weight, bias = _gathered(module.weight), _gathered(module.bias)
            found.append((weight.T if isinstance(module, Conv1D) else weight, bias))
        if len(found) == 1:
            weight, bias = found[0]
            biases = (None, None) if bias is None else self._parts(bias, 0)
            found = list(zip(self._parts(weight, 0), biases, strict=True))
        (key, key_bias), (value, value_bias) = found
        return KeyValueWeights(key, value, key_bias, value_bias)

    def __call__(self, key_stream: torch.Tensor, value_stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, T, kv), each from its stream."""
        if self.is_plain:
            own, dtype = self.weights(), key_stream.dtype
            key_bias, value_bias = (None if bias is None else bias.to(dtype) for bias in own[2:])
            keys = F.linear(key_stream, own.key.to(dtype), key_bias)
            return keys, F.linear(value_stream, own.value.to(dtype), value_bias)
        if len(self.names) == 2:
            key_module, value_module = self.modules
            return _call(key_module, key_stream), _call(value_module, value_stream)
        (module,) = self.modules
        keys, _ = self._parts(_call(module, key_stream), 2)
        _, values = self._parts(_call(module, value_stream), 2)
        return keys, values

    def _parts(self, joined: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        """Keys' and values' part of what queries, keys and values share along `dim`."""
        if self.interleaved:
            by_head = joined.unflatten(dim, (self.heads, 3, self.head_dim))
            return [by_head.select(dim + 1, index).flatten(dim, dim + 1) for index in (1, 2)]
        width = self.heads * self.head_dim
        return joined.split([joined.shape[dim] - 2 * width, width, width], dim)[1:]

    @property
    def key_norm(self) -> Any | None:
        """The layer's own norm of keys (Qwen3, OLMo 2), or None."""
        return getattr(self.attention, "k_norm", None)

    def split_key(self, keys: torch.Tensor) -> torch.Tensor:
        """keys (B, T, kv) -> (B, T, Hkv, D), normed as the layer norms its own keys before RoPE."""
        by_head = (self.heads, self.head_dim)
        if self.key_norm is None:
            return keys.unflatten(-1, by_head)
        if self.key_norm.weight.shape[-1] == self.head_dim:
            return _call(self.key_norm, keys.unflatten(-1, by_head))
        return _call(self.key_norm, keys).unflatten(-1, by_head)


def key_value_projection(attention: Any, config: PreTrainedConfig) -> KeyValueProjection:
    """The projections of an attention module.

    Args:
        attention: the module.
        config: the LLM's text configuration.

    Raises:
        ValueError: a module whose projections we do not know how to read.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = getattr(attention, "k_norm", None)
    if getattr(attention, "v_norm", None) is not None or (norm is not None and getattr(norm, "weight", None) is None):
        raise ValueError(f"{type(attention).__name__}: its value norm or weightless key norm is not supported")
    for names in (("k_proj", "v_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",)):
        modules = [getattr(attention, name, None) for name in names]
        if None in modules or (names == ("c_attn",) and isinstance(modules[0], nn.Linear)):
            continue  # a linear c_attn is another family's (GPT-BigCode); GPT-2's is a Conv1D
        return KeyValueProjection(attention, heads, head_dim, names, interleaved=names == ("query_key_value",))
    raise ValueError(
        f"{type(attention).__name__}: no k_proj/v_proj, qkv_proj, c_attn or query_key_value linear layer to project cross states with"
    )


def split_heads(
    projections: Sequence[KeyValueProjection], keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """keys and values (L, B, T, kv) of L layers -> (L, B, T, Hkv, D), the keys normed as each layer norms its own."""
    first = projections[0]
    values = values.unflatten(-1, (first.heads, first.head_dim))
    if first.key_norm is None:
        return keys.unflatten(-1, (first.heads, first.head_dim)), values
    return torch.stack([layer.split_key(key) for layer, key in zip(projections, keys, strict=True)]), values


def _is_plain(module: Any) -> bool:
    """Whether the module does no more than multiply by its weight and add its bias."""
    kind = type(module)
    if kind.__name__.startswith("FSDP"):  # fully_shard makes a class (FSDPModule, the module's own)
        kind = kind.__bases__[-1]
    elif module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if kind not in (nn.Linear, Conv1D):
        return False
    return type(module.weight) in (nn.Parameter, torch.Tensor) or _is_sharded(module.weight)


def _is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, by its method: builds of torch without distributed lack the class."""
    return hasattr(tensor, "full_tensor")


def _gathered(tensor: Any) -> Any:
    """The whole of a sharded tensor, any other as it is.

    Raises:
        ValueError: a shard that is trained: its gradient would miss the other processes' part.
    """
    if not _is_sharded(tensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "projections of keys and values: got trained parameters (LoRA?) that are sharded by FSDP2, takes frozen or whole ones: "
            "LayAlign uses them outside their layer, where FSDP2 would not add up their gradients"
        )
    return tensor.full_tensor()


def _call(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The module on a tensor. FSDP2 gathers shards for their layer's own forward only, so here they are gathered for the call."""
    shards = {name: _gathered(value) for name, value in module.named_parameters() if _is_sharded(value)}
    return torch.func.functional_call(module, shards, (tensor,)) if shards else module(tensor)
