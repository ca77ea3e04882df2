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

from layalign.families import KeyValueLayout, is_registered, layout_of
from layalign.shards import is_shard, whole


def attention_modules(llm: PreTrainedModel) -> dict[int, Any]:
    """The self-attention module of every decoder layer, by layer index.

    Raises:
        ValueError: the LLM has no modules with a layer index and key/value projections that we know.
    """
    found: dict[int, Any] = {}
    for name, module in llm.get_decoder().named_modules():
        index = getattr(module, "layer_idx", None)
        known = is_registered(module) or (type(module).__name__.endswith("Attention") and "cross" not in name.lower())
        if index is not None and known:
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
    its projections are plain linear layers (`is_plain`) their weights can be folded with the aligner's; FSDP2's shards
    (`is_sharded`) are gathered at each use. Others (LoRA, 4-bit, hooked or otherwise replaced layers) are called as modules,
    which never folds.

    Attributes:
        attention: the attention module.
        heads, head_dim: of its keys and values; heads * head_dim = kv.
        layout: the names of its projections, and what else is done.
    """

    attention: Any
    heads: int
    head_dim: int
    layout: KeyValueLayout

    @property
    def modules(self) -> list[Any]:
        """The projections named."""
        return [getattr(self.attention, name) for name in self.layout.names]

    @property
    def is_plain(self) -> bool:
        """Whether they do no more than multiply by a weight and add a bias."""
        return all(_is_plain(module) for module in self.modules)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of their weights only (FSDP2)."""
        return any(is_shard(parameter) for module in self.modules for parameter in module.parameters(recurse=False))

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
        if len(self.layout.names) == 2:
            key_module, value_module = self.modules
            return _call(key_module, key_stream), _call(value_module, value_stream)
        (module,) = self.modules
        keys, _ = self._parts(_call(module, key_stream), 2)
        _, values = self._parts(_call(module, value_stream), 2)
        return keys, values

    def _parts(self, joined: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        """Keys' and values' part of what queries, keys and values share along `dim`."""
        if self.layout.order == "by_head":
            by_head = joined.unflatten(dim, (self.heads, 3, self.head_dim))
            return [by_head.select(dim + 1, index).flatten(dim, dim + 1) for index in (1, 2)]
        width = self.heads * self.head_dim
        return joined.split([joined.shape[dim] - 2 * width, width, width], dim)[1:]

    @property
    def key_norm(self) -> Any | None:
        """The layer's own norm of keys (Qwen3, OLMo 2), or None."""
        return None if self.layout.key_norm is None else getattr(self.attention, self.layout.key_norm)

    def split(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys and values (B, T, kv) -> (B, T, Hkv, D), normed and adjusted as the layer's own are before RoPE."""
        by_head = (self.heads, self.head_dim)
        values = values.unflatten(-1, by_head)
        weight = getattr(self.key_norm, "weight", None)
        if self.key_norm is None:
            keys = keys.unflatten(-1, by_head)
        elif self.layout.heads_first:
            keys = _call(self.key_norm, keys.unflatten(-1, by_head).transpose(1, 2)).transpose(1, 2)
        elif weight is None or weight.shape[-1] == self.head_dim:
            keys = _call(self.key_norm, keys.unflatten(-1, by_head))
        else:
            keys = _call(self.key_norm, keys).unflatten(-1, by_head)
        return (keys, values) if self.layout.adjust is None else self.layout.adjust(self.attention, keys, values)


def key_value_projections(llm: PreTrainedModel, layers: Sequence[int] | None = None) -> list[KeyValueProjection]:
    """The projections of layers of an LLM.

    Args:
        llm: the LLM.
        layers: their indices; None: all.

    Raises:
        ValueError: attention modules that cannot be found or read, or whose keys differ in heads.
    """
    modules, text = attention_modules(llm), llm.config.get_text_config(decoder=True)
    found = [key_value_projection(modules[layer], text) for layer in (sorted(modules) if layers is None else layers)]
    if len(sizes := {(one.heads, one.head_dim) for one in found}) > 1:
        raise ValueError(
            f"{type(llm).__name__}: its layers have keys of {sorted(sizes)} (heads, width); LayAlign takes one of both for all fused "
            "layers, see llm_layers"
        )
    return found


def key_value_projection(attention: Any, config: PreTrainedConfig) -> KeyValueProjection:
    """The projections of an attention module.

    Args:
        attention: the module.
        config: the LLM's text configuration.

    Raises:
        ValueError: a module whose projections we do not know how to read.
    """
    layout = layout_of(attention)
    heads = layout.heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    named = [*layout.names, *([layout.key_norm] if layout.key_norm else [])]
    if missing := [name for name in named if getattr(attention, name, None) is None]:
        raise ValueError(f"{type(attention).__name__} has no {' and no '.join(missing)}, which its layout names")
    if layout.order == "apart":
        # Where they tell their width (quantised layers may not).
        width = getattr(getattr(attention, layout.names[0]), "out_features", None)
        if width is not None and width != heads * head_dim and width % head_dim == 0:
            heads = width // head_dim
        elif width is not None and width != heads * head_dim:
            raise ValueError(f"{type(attention).__name__}: keys of {width} are not {heads} heads of {head_dim}")
    return KeyValueProjection(attention, heads, head_dim, layout)


def split_heads(
    projections: Sequence[KeyValueProjection], keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """keys and values (L, B, T, kv) of L layers -> (L, B, T, Hkv, D), normed and adjusted as each layer does its own."""
    first = projections[0]
    if all(layer.key_norm is None and layer.layout.adjust is None for layer in projections):
        by_head = (first.heads, first.head_dim)
        return keys.unflatten(-1, by_head), values.unflatten(-1, by_head)
    pairs = [layer.split(key, value) for layer, key, value in zip(projections, keys, values, strict=True)]
    split_keys, split_values = zip(*pairs, strict=True)
    return torch.stack(split_keys), torch.stack(split_values)


def _is_plain(module: Any) -> bool:
    """Whether the module does no more than multiply by its weight and add its bias."""
    kind = type(module)
    if kind.__name__.startswith("FSDP"):  # fully_shard makes a class (FSDPModule, the module's own)
        kind = kind.__bases__[-1]
    elif module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if kind not in (nn.Linear, Conv1D):
        return False
    return type(module.weight) in (nn.Parameter, torch.Tensor) or is_shard(module.weight)


def _gathered(tensor: Any) -> Any:
    """The whole of a sharded tensor, any other as it is. Of a trained one, the gradient is the mean over the processes, as FSDP2's own
    are: it is used outside its layer, where FSDP2 would not add them up."""
    if not (is_shard(tensor) and tensor.requires_grad and torch.is_grad_enabled()):
        return whole(tensor) if is_shard(tensor) else tensor
    from torch.distributed.tensor import Partial

    count = tensor.device_mesh.size()
    gathered = tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
    gathered.register_hook(lambda gradient: gradient / count)
    return gathered


def _call(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The module on a tensor. FSDP2 gathers shards for their layer's own forward only, so here they are gathered for the call."""
    shards = {name: _gathered(value) for name, value in module.named_parameters() if is_shard(value)}
    return torch.func.functional_call(module, shards, (tensor,)) if shards else module(tensor)
