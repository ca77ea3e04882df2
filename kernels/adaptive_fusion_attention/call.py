"""A call of `adaptive_fusion_attention` as one object: its fields, its checks, and its flat form for torch.library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import check_tensors, malformed
from .gates import check_gate


class Call(NamedTuple):
    """The arguments that all backends take, as the public function documents them; a scale of None is D ** -0.5."""

    q: Tensor
    k: Tensor
    v: Tensor
    cross_k: Tensor
    cross_v: Tensor
    gate: Tensor
    sink: Tensor | None = None
    key_mask: Tensor | None = None
    cross_mask: Tensor | None = None
    key_span: Tensor | None = None
    cross_span: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cross_cu_seqlens: Tensor | None = None
    query_start: Tensor | int | None = None
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


# The flat form: the fields in their order, but for query_start, which is a tensor and an int, one of them None.
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor cross_k, Tensor cross_v, Tensor gate, Tensor? sink, Tensor? key_mask, "
    "Tensor? cross_mask, Tensor? key_span, Tensor? cross_span, Tensor? cu_seqlens, Tensor? cross_cu_seqlens, Tensor? query_start, "
    "SymInt? first_query, bool causal, float scale, SymInt? window, float? softcap"
)
FLAT_TENSORS = 14  # of the flat form, first; the others are numbers
FLAT_NUMBERS = 5
MOST_QUERIES = 16  # that decoding takes
FLOATS = 7  # of the flat form, first: what may have gradients; the last of them may be None


def flatten(call: Call) -> tuple[Any, ...]:
    """The flat form of a call, with a scale."""
    given = isinstance(call.query_start, Tensor)
    query_start, first_query = (call.query_start, None) if given else (None, call.query_start)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    softcap = None if call.softcap is None else float(call.softcap)
    return *call[:13], query_start, first_query, call.causal, scale, call.window, softcap


def unflatten(flat: Sequence[Any]) -> Call:
    """The Call that `flatten` took apart."""
    query_start, first_query = flat[13:15]
    fields = [*flat[:13], first_query if query_start is None else query_start, *flat[15:]]
    return Call(*fields)


def first_query(call: Call) -> int | Tensor:
    """Key index of the first query, an int or an int64 tensor, cut to where a larger one changes nothing: sums with it stay in 64 bits."""
    keys = call.k.shape[2]
    if call.query_start is None:
        return keys - call.q.shape[2]
    most = keys + min(call.window or 0, 2**62)
    return (
        call.query_start.long().clamp(max=most) if isinstance(call.query_start, Tensor) else min(call.query_start, most)
    )


def with_rows_repeated(call: Call) -> Call:
    """A call in which every row of q has cross keys of its own."""
    if call.cross_k.shape[0] == call.q.shape[0]:
        return call
    sharing = call.q.shape[0] // call.cross_k.shape[0]
    names = ("cross_k", "cross_v", "cross_mask", "cross_span")
    given = {name: x for name in names if (x := getattr(call, name)) is not None}
    fields: dict[str, Any] = {name: x.repeat_interleave(sharing, dim=0) for name, x in given.items()}
    return call._replace(**fields)


def with_spans_as_masks(call: Call) -> Call:
    """A call that says with masks alone what its spans and masks hide."""
    if call.key_span is None and call.cross_span is None:
        return call
    key_mask = _spanned(call.key_span, call.k.shape[2], call.key_mask)
    cross_mask = _spanned(call.cross_span, call.cross_k.shape[2], call.cross_mask)
    return call._replace(key_mask=key_mask, cross_mask=cross_mask, key_span=None, cross_span=None)


def _spanned(span, length, mask):
    if span is None:
        return mask
    key = torch.arange(length, device=span.device)
    inside = (key >= span[:, :1]) & (key < span[:, 1:])
    return inside if mask is None else inside & mask


def check(call: Call, return_lse: object, backend: str) -> None:
    """Raises ValueError for what is wrong with a call, in the order of the public function's arguments."""
    check_tensors(backend, dict(zip(Call._fields[:5], call[:5], strict=True)))
    q = call.q
    _check_keys(call)
    check_gate(call.gate, q)
    check_sink(call.sink, q)
    for name, flag in (("causal", call.causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise malformed(name, repr(flag), "True or False")
    check_numbers(call.scale, call.window, call.softcap)
    if call.window is not None and not call.causal:
        raise malformed("window", f"{call.window} with causal=False", "None without causal")
    _check_mask("key_mask", call.key_mask, (q.shape[0], call.k.shape[2]), q)
    _check_mask("cross_mask", call.cross_mask, (call.cross_k.shape[0], call.cross_k.shape[2]), q)
    _check_span("key_span", call.key_span, q.shape[0], q)
    _check_span("cross_span", call.cross_span, call.cross_k.shape[0], q)
    _check_query_start(call.query_start, q)
    _check_packing(call)


def check_numbers(scale: Any, window: Any, softcap: Any) -> None:
    """Raises ValueError for numbers that no call takes."""
    if scale is not None and not _is_number(scale):
        raise malformed("scale", repr(scale), "a finite number or None")
    if window is not None and (not _is_integer(window) or window < 1):
        raise malformed("window", repr(window), "a positive int or None")
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise malformed("softcap", repr(softcap), "a positive finite number or None")


def _check_keys(call):
    q, k, cross_k = call.q, call.k, call.cross_k
    if q.dim() != 4 or not 0 < q.shape[3] <= 256:
        raise malformed("q", f"shape {tuple(q.shape)}", "(B, Hq, S, D) with D from 1 to 256")
    batch, heads, queries, width = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != width:
        raise malformed("k", f"shape {tuple(k.shape)}", f"({batch}, Hkv, N, {width})")
    kv_heads, keys = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise malformed("k", f"{kv_heads} heads", f"a number that divides the {heads} heads of q")
    if keys < queries:
        raise malformed("k", f"{keys} keys", f"at least as many as queries, {queries}")
    check_shape("v", call.v, (batch, kv_heads, keys, width))
    if cross_k.dim() != 4 or (cross_k.shape[1], cross_k.shape[3]) != (kv_heads, width):
        raise malformed("cross_k", f"shape {tuple(cross_k.shape)}", f"({batch}, {kv_heads}, T, {width})")
    cross_rows, cross_keys = cross_k.shape[0], cross_k.shape[2]
    if cross_rows != batch and (cross_rows == 0 or batch % cross_rows):
        takes = f"{batch}, the batch of q, or a number that divides it"
        raise malformed("cross_k", f"{cross_rows} batch rows", takes)
    check_shape("cross_v", call.cross_v, (cross_rows, kv_heads, cross_keys, width))


def _is_number(value):
    # Not math.isfinite: torch.compile makes a number that changes a symbol, which that does not take.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_integer(value):
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another shape."""
    if tuple(tensor.shape) != shape:
        raise malformed(name, f"shape {tuple(tensor.shape)}", shape)


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    """Raises ValueError for another device than that of q."""
    if tensor.device != q.device:
        raise malformed(name, f"a tensor on {tensor.device}", f"one on the device of q, {q.device}")


def _check_mask(name, mask, shape, q):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise malformed(name, getattr(mask, "dtype", type(mask).__name__), "a bool tensor, True = attend, or None")
    check_shape(name, mask, shape)
    check_device(name, mask, q)


def _check_span(name, span, rows, q):
    if span is None:
        return
    if not isinstance(span, torch.Tensor) or span.dtype != torch.int32:
        raise malformed(name, getattr(span, "dtype", type(span).__name__), f"({rows}, 2) int32, begin and end, or None")
    check_shape(name, span, (rows, 2))
    check_device(name, span, q)


def check_sink(sink: object, q: Tensor) -> None:
    """Raises ValueError for a sink that does not fit q, (B, Hq, S, D)."""
    if sink is None:
        return
    heads = q.shape[1]
    if not isinstance(sink, torch.Tensor) or tuple(sink.shape) != (heads,):
        got = f"shape {tuple(sink.shape)}" if isinstance(sink, torch.Tensor) else type(sink).__name__
        raise malformed("sink", got, f"({heads},), a score for each head, or None")
    if sink.dtype not in (q.dtype, torch.float32):
        raise malformed("sink", sink.dtype, f"float32 or the dtype of q, {q.dtype}")
    check_device("sink", sink, q)


def _check_query_start(query_start, q):
    if query_start is None:
        return
    if isinstance(query_start, torch.Tensor):
        if query_start.dtype not in (torch.int32, torch.int64):
            raise malformed("query_start", query_start.dtype, "an int, or an int32 or int64 tensor")
        if tuple(query_start.shape) not in ((), (q.shape[0],)):
            raise malformed("query_start", f"shape {tuple(query_start.shape)}", f"an int, () or ({q.shape[0]},)")
        check_device("query_start", query_start, q)
    elif not _is_integer(query_start) or query_start < 0:
        raise malformed("query_start", repr(query_start), "an int from 0 up, an integer tensor or None")


def _check_packing(call):
    cu_seqlens, cross_cu_seqlens = call.cu_seqlens, call.cross_cu_seqlens
    if cu_seqlens is None and cross_cu_seqlens is None:
        return
    if cu_seqlens is None or cross_cu_seqlens is None:
        missing = "cu_seqlens" if cu_seqlens is None else "cross_cu_seqlens"
        raise malformed(missing, "None", "(n + 1,) int32: cu_seqlens and cross_cu_seqlens are given together")
    if call.query_start is not None:
        raise malformed("query_start", "a value with cu_seqlens", "None: each packed sequence starts at its first key")
    for name in ("key_span", "cross_span"):
        if getattr(call, name) is not None:
            raise malformed(name, "a tensor with cu_seqlens", "None: packed sequences have no padding")
    (batch, _, queries, _), keys = call.q.shape, call.k.shape[2]
    if batch != 1 or keys != queries:
        raise malformed("cu_seqlens", f"q of batch {batch} with {queries} queries, {keys} keys", "B = 1 and N = S")
    for name, bounds, total in _packings(call):
        if not isinstance(bounds, torch.Tensor) or bounds.dtype != torch.int32:
            raise malformed(name, getattr(bounds, "dtype", type(bounds).__name__), "an int32 tensor (n + 1,)")
        if bounds.dim() != 1 or bounds.shape[0] < 1 or bounds.shape != cu_seqlens.shape:
            raise malformed(name, f"shape {tuple(bounds.shape)}", "(n + 1,), the same n for both")
        check_device(name, bounds, call.q)
        if bounds.shape[0] == 1 and total > 0:
            raise malformed(name, f"no sequence for {total} positions", "bounds of at least one")
    check_bounds(call)


def _packings(call):
    """(name, bounds, length) of q's and of the cross keys'."""
    yield "cu_seqlens", call.cu_seqlens, call.q.shape[2]
    yield "cross_cu_seqlens", call.cross_cu_seqlens, call.cross_k.shape[2]


def check_bounds(call: Call) -> None:
    """Raises ValueError for bounds of packed sequences with wrong values, where `may_look`: they are no part of a plan."""
    for name, bounds, total in _packings(call):
        if bounds is not None and may_look(bounds):
            values = bounds.tolist()
            if values[0] != 0 or values[-1] != total or any(a > b for a, b in pairwise(values)):
                raise malformed(name, values, f"bounds that start at 0, never fall and end at {total}")


def may_look(x: Tensor) -> bool:
    """Whether reading what lies in a tensor costs no wait for a device and no graph break. Elsewhere `packing.repaired` makes any
    bounds safe."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
