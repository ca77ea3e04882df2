"""A call of `adaptive_fusion_decode_paged`: its fields, its checks, and the call of contiguous keys that is the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import check_tensors, malformed
from .call import MOST_QUERIES, Call, check_device, check_numbers, check_shape, check_sink, may_look
from .gates import check_gate


class PagedCall(NamedTuple):
    """The arguments, as the public function documents them."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cross_k_cache: Tensor
    cross_v_cache: Tensor
    cross_block_table: Tensor
    cross_seq_lens: Tensor
    gate: Tensor
    sink: Tensor | None = None
    out: Tensor | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


# Of the operator for torch.library: all but `out`, with a scale.
PAGED_SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, Tensor cross_k_cache, Tensor cross_v_cache, "
    "Tensor cross_block_table, Tensor cross_seq_lens, Tensor gate, Tensor? sink, float scale, SymInt? window, float? softcap, "
    "bool return_lse) -> (Tensor, Tensor, Tensor)"
)


class _Side(NamedTuple):
    """Keys and values of one of the two terms; prefix: of their arguments' names; window: None of the cross keys."""

    prefix: str
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    window: int | None


def _sides(call: PagedCall) -> tuple[_Side, _Side]:
    return _Side("", *call[1:5], call.window), _Side("cross_", *call[5:9], None)


def asks_for_gradients(call: PagedCall) -> bool:
    """Whether gradients would be lost."""
    tensors = (call.q, call.k_cache, call.v_cache, call.cross_k_cache, call.cross_v_cache, call.gate, call.sink)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check(call: PagedCall, return_lse: object, backend: str) -> None:
    """Raises ValueError for what is wrong with a call."""
    q = call.q
    names = ("q", "k_cache", "v_cache", "cross_k_cache", "cross_v_cache")
    check_tensors(backend, {name: getattr(call, name) for name in names}, {"out": call.out})
    if q.dim() != 4 or not 0 < q.shape[3] <= 256 or not 0 < q.shape[2] <= MOST_QUERIES:
        takes = f"(B, Hq, S, D) with S from 1 to {MOST_QUERIES} and D from 1 to 256"
        raise malformed("q", f"shape {tuple(q.shape)}", takes)
    kv_heads = call.k_cache.shape[2] if call.k_cache.dim() == 4 else 0
    if kv_heads == 0 or q.shape[1] % kv_heads:
        takes = f"(pages, keys of a page, Hkv, D), Hkv a number that divides the {q.shape[1]} heads of q"
        raise malformed("k_cache", f"shape {tuple(call.k_cache.shape)}", takes)
    for side in _sides(call):
        _check_side(side, q, kv_heads)
    check_gate(call.gate, q)
    check_sink(call.sink, q)
    if asks_for_gradients(call):
        raise malformed("q", "tensors that require gradients", "none outside torch.no_grad(): decoding has no backward")
    if not isinstance(return_lse, bool):
        raise malformed("return_lse", repr(return_lse), "True or False")
    check_numbers(call.scale, call.window, call.softcap)
    if call.out is not None:
        check_shape("out", call.out, tuple(q.shape))
        _check_unit_stride("out", call.out)
    check_pages(call)


def _check_side(side, q, kv_heads):
    (batch, _, _, width), name = q.shape, f"{side.prefix}k_cache"
    if side.k.dim() != 4 or side.k.shape[1] == 0 or tuple(side.k.shape[2:]) != (kv_heads, width):
        takes = f"(pages, keys of a page, {kv_heads}, {width})"
        raise malformed(name, f"shape {tuple(side.k.shape)}", takes)
    check_shape(f"{side.prefix}v_cache", side.v, tuple(side.k.shape))
    _check_unit_stride(name, side.k)
    _check_unit_stride(f"{side.prefix}v_cache", side.v)
    shapes = {"block_table": f"({batch}, pages of a row)", "seq_lens": f"({batch},)"}
    for name, x in ((f"{side.prefix}block_table", side.table), (f"{side.prefix}seq_lens", side.lengths)):
        takes = shapes[name.removeprefix("cross_")]
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
            raise malformed(name, getattr(x, "dtype", type(x).__name__), f"{takes} int32")
        if x.dim() != 1 + (x is side.table) or x.shape[0] != batch:
            raise malformed(name, f"shape {tuple(x.shape)}", takes)
        check_device(name, x, q)
        _check_unit_stride(name, x)


def _check_unit_stride(name, x):
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise malformed(name, f"strides {x.stride()}", "a last stride of 1: nothing is copied")


def check_pages(call: PagedCall) -> None:
    """Raises ValueError for lengths and pages that do not exist, where `may_look`: they are no part of a plan."""
    if not may_look(call.seq_lens):
        return
    for side in _sides(call):
        (pages, page), width = side.k.shape[:2], side.table.shape[1]
        room, lengths = width * page, side.lengths
        for row in ((lengths < 0) | (lengths > room)).nonzero().flatten().tolist():
            got = f"{lengths[row]} in row {row}"
            raise malformed(f"{side.prefix}seq_lens", got, f"0 to {room}, for which {side.prefix}block_table has pages")
        first = torch.arange(width) * page
        used = first < lengths[:, None]
        if side.window is not None:
            used &= first + page > (lengths - call.q.shape[2] - side.window + 1)[:, None]
        for row, place in (used & ((side.table < 0) | (side.table >= pages))).nonzero().tolist():
            got = f"page {side.table[row, place]} in row {row}, for keys from {place * page} on"
            raise malformed(f"{side.prefix}block_table", got, f"0 to {pages - 1} for keys that are read")


def gathered(call: PagedCall) -> Call:
    """The same call with each row's keys and values end to end, copied, and spans that end where they do."""
    (k, v, span, length), (cross_k, cross_v, cross_span, _) = map(_end_to_end, _sides(call))
    given: dict[str, Any] = {name: getattr(call, name) for name in ("gate", "sink", "scale", "window", "softcap")}
    start = length.long() - call.q.shape[2]
    keys = dict(k=k, v=v, cross_k=cross_k, cross_v=cross_v, key_span=span, cross_span=cross_span)
    return Call(call.q, **keys, **given, query_start=start)


def _end_to_end(side):
    pages = side.table.clamp(0, max(0, side.k.shape[0] - 1)).long()  # unused entries may hold anything
    k, v = (x[pages].flatten(1, 2).transpose(1, 2) for x in (side.k, side.v))
    length = side.lengths.clamp(0, k.shape[2])
    return k, v, torch.stack([torch.zeros_like(length), length], 1), length
