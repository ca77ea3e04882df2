"""`adaptive_fusion_attention` as two calls of flash-attn and a combine: version 2, 3 or 4, whichever is installed.

flash-attn aligns queries to the end of their keys and knows no masks of keys. What of a call says the same in its words is served;
the rest is refused by name. Packed sequences and spans become its sequences of variable length, their bounds computed on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch import malformed
from . import gates, torch_backend
from .call import Call
from .packing import repaired

HOW_TO_INSTALL = (
    "pip install 'layalign[flash]' --no-build-isolation (version 2), pip install flash-attn-4, or version 3 from its "
    "repository's folder hopper"
)
DEVICES = ("cuda",)
# Version -> its module, how it is asked for log-sum-exps, and what it calls a window without an end.
_MODULES: dict[int, tuple[str, str, int | None]] = {
    2: ("flash_attn", "return_attn_probs", -1),
    3: ("flash_attn_interface", "return_attn_probs", -1),
    4: ("flash_attn.cute", "return_lse", None),
}
_ORDER = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}  # by compute capability: what was written for it first


class Flash(NamedTuple):
    """One version: its functions of batches and of packed sequences, and the words of `_MODULES`."""

    version: int
    dense: Callable[..., Any]
    packed: Callable[..., Any]
    lse_wanted: str
    endless: int | None


class Bounds(NamedTuple):
    """Where sequences of queries and of their keys begin and end, (n + 1,) int32, and the most positions either has."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


class Sight(NamedTuple):
    """What a query sees of its sequence's keys: up to `ahead` keys after the one that it is aligned to and `back` before; None is all."""

    back: int | None
    ahead: int | None


def fused_attention(call: Call, return_lse: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The results of `adaptive_fusion_attention` for a checked Call.

    Queries past the end of their row's key_span get 0 from the self term: they are padding.

    Raises:
        ValueError: flash-attn is not installed, or what it cannot say, by name.
    """
    _check(call)
    if call.q.numel() == 0:
        return torch_backend.fused_attention(call, return_lse)
    major = torch.cuda.get_device_capability(call.q.device)[0] if call.q.device.type == "cuda" else 8
    flash = _installed(major)
    if flash is None:
        raise ValueError(f'backend="flash" needs flash-attn, which is not installed: {HOW_TO_INSTALL}')
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.cu_seqlens is not None and call.cross_cu_seqlens is not None:
        bounds = repaired(call.cu_seqlens, call.q.shape[2]), repaired(call.cross_cu_seqlens, call.cross_k.shape[2])
        call = call._replace(cu_seqlens=bounds[0], cross_cu_seqlens=bounds[1])
    self_out, self_lse = _self_term(flash, call, scale, return_lse)
    if call.cross_k.shape[2]:
        cross_out, cross_lse = _cross_term(flash, call, scale, return_lse)
    else:  # the sum of nothing, for gradients of 0
        cross_out = torch.zeros_like(self_out) + (call.cross_k.sum() + call.cross_v.sum())
        cross_lse = torch.full(call.q.shape[:3], -torch.inf, device=call.q.device)
    gate = gates.as_rows(call.gate)[..., None].float()  # so that the sum is rounded once, and the gate's gradient
    out = torch.addcmul(self_out, gate, cross_out).to(call.q.dtype)
    return (out, self_lse, cross_lse) if return_lse else out


@cache
def _installed(major):
    """The Flash of the first version, in the order for this compute capability, that can be imported; None where none can."""
    for version in _ORDER.get(major, (2, 4, 3)):
        name, lse_wanted, endless = _MODULES[version]
        try:
            module = import_module(name)
            return Flash(version, module.flash_attn_func, module.flash_attn_varlen_func, lse_wanted, endless)
        except (ImportError, AttributeError):  # version 4 alone leaves `flash_attn` without its functions
            continue
    return None


def _check(call):
    """Raises ValueError for what flash-attn cannot say."""
    here = 'with backend="flash"'
    if call.q.device.type not in DEVICES:
        raise malformed("q", f"a tensor on {call.q.device}", f"a CUDA tensor {here}")
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        raise malformed("q", call.q.dtype, f"float16 or bfloat16 {here}")
    for name in ("key_mask", "cross_mask"):
        if getattr(call, name) is not None:
            raise malformed(name, "a mask", f"None {here}: padding as a span, or sequences packed")
    if call.sink is not None:
        raise malformed("sink", "a tensor", f'None {here}: backend="auto" has it')
    if isinstance(call.query_start, Tensor):
        raise malformed("query_start", "a tensor", f"an int or None {here}")
    if call.causal and call.window is not None and call.query_start is not None:
        most = call.k.shape[2] - call.q.shape[2] + call.window - 1
        if call.query_start > most:
            raise malformed("query_start", call.query_start, f"at most {most} {here} and a window of {call.window}")


def _self_term(flash, call, scale, return_lse):
    """-> (B, Hq, S, D) and its log-sum-exps (B, Hq, S) or None."""
    k, v, queries, ahead = call.k, call.v, call.q.shape[2], 0
    if call.query_start is not None and call.causal:
        ahead = call.query_start + queries - k.shape[2]
        if ahead < 0:  # queries are aligned to the last key
            k, v = k[:, :, :ahead], v[:, :, :ahead]
            ahead = 0
    keys = k.shape[2]
    bounds = None
    if call.cu_seqlens is not None:
        bounds = Bounds(call.cu_seqlens, call.cu_seqlens, queries, keys)
    if call.key_span is not None:
        start = keys - queries if call.query_start is None else min(call.query_start, keys)
        bounds, ahead = _spanned(call.key_span, (queries, keys), start if call.causal else None), 0
    sight = Sight(None, min(ahead, keys) if call.causal else None)
    if call.window is not None:
        sight = Sight(min(call.window - 1 - ahead, keys), min(ahead, keys))
    out, lse = _attend(flash, (call.q, k, v), bounds, sight, (scale, call.softcap or 0.0), return_lse)
    return out, lse


def _cross_term(flash, call, scale, return_lse):
    """As `_self_term`. Rows of q that share a row of cross keys become its queries."""
    batch, _, queries, _ = call.q.shape
    rows, _, keys, _ = call.cross_k.shape
    together = (rows, batch // rows)
    q = call.q.unflatten(0, together).transpose(1, 2).flatten(2, 3)
    bounds = None
    if call.cu_seqlens is not None:
        bounds = Bounds(call.cu_seqlens, call.cross_cu_seqlens, queries, keys)
    if call.cross_span is not None:
        bounds = _spanned(call.cross_span, (q.shape[2], keys), None)
    results = _attend(flash, (q, call.cross_k, call.cross_v), bounds, Sight(None, None), (scale, 0.0), return_lse)
    return tuple(
        x if x is None else x.unflatten(2, (together[1], queries)).transpose(1, 2).flatten(0, 1) for x in results
    )


def _spanned(span, sizes, start):
    """The Bounds of batch rows of so many queries and keys, of which a row sees those of its span (B, 2). start: key index of the first
    query, aligned to; None aligns nothing.

    Four sequences a row: the keys before the span without a query; the span with the queries up to its end, so that its last key is that
    of its last query; the queries past it without a key; the keys past it without a query.
    """
    queries, keys = sizes
    begin = span[:, 0].clamp(0, keys)
    end = torch.maximum(span[:, 1].clamp(max=keys), begin)
    seeing = torch.full_like(begin, queries) if start is None else (end - start).clamp(0, queries)
    row = torch.arange(span.shape[0], dtype=torch.int32, device=span.device)
    ends = [row * queries + x for x in (0, seeing, queries, queries)], [row * keys + x for x in (begin, end, end, keys)]
    return Bounds(*(pad(torch.stack(x, dim=1).flatten(), (1, 0)).int() for x in ends), queries, keys)


def _attend(flash, tensors, bounds, sight, numbers, return_lse):
    """One call of flash-attn: (B, H, S, D) tensors -> (B, Hq, S, D), and (B, Hq, S) or None. numbers: scale and soft cap."""
    batch, _, queries, width = tensors[0].shape
    q, k, v = (pad(x.transpose(1, 2), (0, -width % 8)) for x in tensors)  # multiples of 8 are what all versions take
    causal = sight == Sight(None, 0)
    window = (None, None) if causal else sight
    options = {
        "softmax_scale": numbers[0],
        "softcap": numbers[1],
        "causal": causal,
        "window_size": tuple(flash.endless if x is None else x for x in window),
        "deterministic": True,
        flash.lse_wanted: return_lse,
    }
    if bounds is None:
        results = flash.dense(q, k, v, **options)
    else:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        results = flash.packed(*packed, **dict(zip(names, bounds, strict=True)), **options)
    out, lse = results[:2] if isinstance(results, tuple) else (results, None)
    if bounds is not None:
        out = out.unflatten(0, (batch, queries))
    out = out[..., :width].transpose(1, 2)
    if not return_lse:
        return out, None
    if bounds is not None:
        lse = lse.unflatten(1, (batch, queries)).transpose(0, 1)
    return out, torch.where(lse == torch.inf, -torch.inf, lse).detach()  # version 2 has +inf for a row that saw nothing
