"""AdaptiveFusionAttention: the operator as a layer, for models that are not transformers LLMs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, MultiheadAttention

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.dispatch import malformed
from layalign.modules import Gate

if TYPE_CHECKING:
    from typing_extensions import Self

GATES = ("scalar", "head", "dynamic")
OPERATOR = ("causal", "scale", "window", "softcap", "backend")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# (query (B, Hq, S, D), key (B, Hkv, S, D), positions (B, S) or (1, S) long) -> both, rotated.
Rotary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class CrossKeyValues(NamedTuple):
    """Cross keys and values of one layer, (B, Hkv, T, D) each, and their mask (B, T) bool or None, made once per input."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


class FusionCache:
    """Keys and values of what was read, and cross keys and values, for any number of layers, in decoding.

    It grows by concatenation. transformers' caches can be given in its place, static and sliding ones too; they keep no cross keys,
    so that `project_cross` makes these beforehand.
    """

    def __init__(self) -> None:
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self.cross: dict[int, CrossKeyValues] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions a layer has read."""
        return self._own[layer_idx][0].shape[2] if layer_idx in self._own else 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """All keys and values (B, Hkv, N, D) of a layer, after the new ones (B, Hkv, S, D) were put behind the others."""
        if layer_idx in self._own:
            before = self._own[layer_idx]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self._own[layer_idx] = keys, values
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows (B',) long, in this order, as beam search does. Cross keys follow: rows of other inputs may be mixed."""
        self._own = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._own.items()}
        self.cross = {
            layer: CrossKeyValues(*(None if part is None else part[rows] for part in cross))  # type: ignore[arg-type]
            for layer, cross in self.cross.items()
        }


class AdaptiveFusionAttention(Module):
    """Self-attention plus gated cross-attention over one query, out = self + gate * cross, with the projections around it.

    Self and cross share the key and value projections, as in LayAlign: the cross states get no position and no causal mask. The gate
    is 0 at first, so that a trained self-attention given as `projections` is what it was.

    Args:
        embed_dim: Dl, the width of hidden states and output.
        num_heads: query heads.
        num_kv_heads: key heads, a divisor; None: as many.
        head_dim: D; None: embed_dim / num_heads.
        cross_dim: De; a linear layer `cross_proj` maps cross states to Dl first. None: they have that width.
        gate: "scalar", "head" or "dynamic".
        bias: of the projections that are made here.
        projections: modules to use as "q_proj", "k_proj", "v_proj" or "o_proj", say those of a trained layer; others are made.
        layer_idx: this layer's place in a cache.
        operator: `causal`, `scale`, `window`, `softcap` and `backend`, as `adaptive_fusion_attention` takes them.

    Attributes:
        rotary: called on queries and keys where it is set, see `Rotary`; None: no position encoding. It is no argument as it belongs to the
            model, which shares one among its layers.

    Raises:
        ValueError: sizes that do not go together, another gate, unknown projections or arguments.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        cross_dim: int | None = None,
        gate: str = "scalar",
        bias: bool = False,
        projections: Mapping[str, Module] | None = None,
        layer_idx: int = 0,
        **operator: Any,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if not isinstance(size, int) or size < 1:
                raise malformed(name, repr(size), "a positive int")
        if num_heads % num_kv_heads:
            raise malformed("num_kv_heads", num_kv_heads, f"a divisor of num_heads, {num_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise malformed("embed_dim", embed_dim, f"a multiple of num_heads, {num_heads}, or head_dim beside it")
        if gate not in GATES:
            raise malformed("gate", repr(gate), f"one of {GATES}")
        if unknown := sorted(operator.keys() - set(OPERATOR)):
            raise malformed("operator", unknown, f"some of {OPERATOR}")
        given = dict(projections or {})
        if unknown := sorted(given.keys() - set(PROJECTIONS)):
            raise malformed("projections", unknown, f"some of {PROJECTIONS}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.layer_idx, self.operator = layer_idx, operator
        self.rotary: Rotary | None = None
        queries, keys = num_heads * self.head_dim, num_kv_heads * self.head_dim
        sizes = ((embed_dim, queries), (embed_dim, keys), (embed_dim, keys), (queries, embed_dim))
        for name, (inner, outer) in zip(PROJECTIONS, sizes, strict=True):
            setattr(self, name, given[name] if name in given else Linear(inner, outer, bias=bias))
        self.cross_proj = None if cross_dim is None else Linear(cross_dim, embed_dim)
        self.gate = Gate(gate, num_heads, embed_dim)

    @classmethod
    def from_multihead(cls, attention: MultiheadAttention, **settings: Any) -> Self:
        """One with the weights of torch's own layer, copied; its batch_first and dropout are not taken over.

        Args:
            attention: whose keys and values have the width of its queries.
            settings: of this class, apart from sizes and bias.

        Raises:
            ValueError: one with keys or values of other widths, or with `add_bias_kv` or `add_zero_attn`.
        """
        weight = attention.in_proj_weight
        if weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise malformed(
                "attention", "kdim, vdim, add_bias_kv or add_zero_attn", "a MultiheadAttention without them"
            )
        bias = attention.in_proj_bias
        made = cls(attention.embed_dim, attention.num_heads, bias=bias is not None, **settings)
        made.to(weight.device, weight.dtype)
        with torch.no_grad():
            for index, name in enumerate(PROJECTIONS[:3]):
                getattr(made, name).weight.copy_(weight.chunk(3)[index])
                if bias is not None:
                    getattr(made, name).bias.copy_(bias.chunk(3)[index])
            made.o_proj.weight.copy_(attention.out_proj.weight)
            if bias is not None:
                made.o_proj.bias.copy_(attention.out_proj.bias)
        return made

    def project_cross(self, cross_states: Tensor, cross_mask: Tensor | None = None) -> CrossKeyValues:
        """Cross keys and values of (B, T, De), for many calls; cross_mask (B, T), True or 1 = attend, or None.

        Raises:
            ValueError: other shapes.
        """
        width = self.embed_dim if self.cross_proj is None else self.cross_proj.in_features
        if cross_states.dim() != 3 or cross_states.shape[-1] != width:
            raise malformed("cross_states", f"shape {tuple(cross_states.shape)}", f"(B, T, {width})")
        states = cross_states if self.cross_proj is None else self.cross_proj(cross_states)
        keys, values = (self._heads(projection(states)) for projection in (self.k_proj, self.v_proj))
        return CrossKeyValues(keys, values, None if cross_mask is None else cross_mask.bool())

    def forward(
        self,
        hidden_states: Tensor,
        cross_states: Tensor | CrossKeyValues | None = None,
        cross_mask: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """(B, S, Dl) -> (B, S, Dl).

        Args:
            hidden_states: (B, S, Dl); with a cache, of the new positions.
            cross_states: (B, T, De), or what `project_cross` made of them. With a FusionCache they are given once, in the first call.
                None, and none in the cache: self-attention alone.
            cross_mask: (B, T), True or 1 = attend; None: all are real. Not beside `project_cross`'s, which have theirs.
            key_mask: (B, N), True or 1 = attend, of all positions read so far and the new ones; None: all are real.
            positions: (B, S) long, for `rotary`; None: counted from 0 over all columns, padding too.
            cache: a FusionCache or a cache of transformers (`update`, `get_seq_length`), shared by the layers of a model.

        Raises:
            ValueError: arguments that do not go together.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.embed_dim:
            raise malformed("hidden_states", f"shape {tuple(hidden_states.shape)}", f"(B, S, {self.embed_dim})")
        query, key, value = (self._heads(getattr(self, name)(hidden_states)) for name in PROJECTIONS[:3])
        count = hidden_states.shape[1]
        past, moved = self._past(cache, count)
        if self.rotary is not None:
            if positions is None:
                positions = (past + torch.arange(count, device=hidden_states.device))[None]
            query, key = self.rotary(query, key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if key_mask is not None:
            key_mask = key_mask.bool()[:, moved : moved + key.shape[2]]
            if (missing := key.shape[2] - key_mask.shape[1]) > 0:  # a static cache's room, which no query reaches
                key_mask = torch.nn.functional.pad(key_mask, (0, missing))
        cross = self._cross(cross_states, cross_mask, cache)
        gate = self.gate(hidden_states)
        if cross is None:
            cross = CrossKeyValues(key[:, :, :0], value[:, :, :0])
        out: Any = adaptive_fusion_attention(
            query,
            key,
            value,
            cross.keys.to(query.dtype),
            cross.values.to(query.dtype),
            gate,
            key_mask=key_mask,
            cross_mask=cross.mask,
            query_start=past - moved,
            **self.operator,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """For print."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _past(self, cache: Any, count: int) -> tuple[Any, Any]:
        """How many positions the cache holds for this layer, and how many it has dropped of them."""
        if cache is None:
            return 0, 0
        past = cache.get_seq_length(self.layer_idx)
        sizes = getattr(cache, "get_mask_sizes", None)
        # A static cache counts on the device and goes on counting in place.
        past = past.clone() if isinstance(past, Tensor) else past
        return past, 0 if sizes is None else sizes(count, self.layer_idx)[1]

    def _cross(self, states: Any, mask: Tensor | None, cache: Any) -> CrossKeyValues | None:
        kept = cache.cross if isinstance(cache, FusionCache) else {}
        if states is None:
            if mask is not None:
                raise malformed("cross_mask", "a mask without cross_states", "both, or neither")
            return kept.get(self.layer_idx)
        if self.layer_idx in kept:
            raise malformed(
                "cross_states", "some, with others in the cache", "None after the first call, or a new cache"
            )
        if isinstance(states, CrossKeyValues):
            if mask is not None:
                raise malformed("cross_mask", "a mask beside cross keys and values", "None: they bring theirs")
            made = states
        else:
            made = self.project_cross(states, mask)
        if isinstance(cache, FusionCache):
            kept[self.layer_idx] = made
        return made
