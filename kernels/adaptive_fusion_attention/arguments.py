"""The checks of `adaptive_fusion_attention`, in the order of its arguments."""

import math
from itertools import pairwise

import torch

from ..dispatch import check_tensors, malformed


def check_arguments(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    *,
    backend,
    causal,
    scale,
    window,
    softcap,
    key_mask,
    cross_mask,
    query_start,
    cu_seqlens,
    cross_cu_seqlens,
    return_lse,
):
    check_tensors(backend, {"q": q, "k": k, "v": v, "cross_k": cross_k, "cross_v": cross_v})
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
    _check_shape("v", v, (batch, kv_heads, keys, width))
    if cross_k.dim() != 4 or (cross_k.shape[1], cross_k.shape[3]) != (kv_heads, width):
        raise malformed("cross_k", f"shape {tuple(cross_k.shape)}", f"({batch}, {kv_heads}, T, {width})")
    cross_rows, cross_keys = cross_k.shape[0], cross_k.shape[2]
    if cross_rows != batch and (cross_rows == 0 or batch % cross_rows):
        takes = f"{batch}, the batch of q, or a number that divides it"
        raise malformed("cross_k", f"{cross_rows} batch rows", takes)
    _check_shape("cross_v", cross_v, (cross_rows, kv_heads, cross_keys, width))

    _check_gate(gate, q)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise malformed(name, repr(flag), "True or False")
    if scale is not None and not _is_number(scale):
        raise malformed("scale", repr(scale), "a finite number or None")
    if window is not None:
        if not _is_integer(window) or window < 1:
            raise malformed("window", repr(window), "a positive int or None")
        if not causal:
            raise malformed("window", f"{window} with causal=False", "None without causal")
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise malformed("softcap", repr(softcap), "a positive finite number or None")
    _check_mask("key_mask", key_mask, (batch, keys), q)
    _check_mask("cross_mask", cross_mask, (cross_rows, cross_keys), q)
    _check_query_start(query_start, q)
    _check_packing(cu_seqlens, cross_cu_seqlens, query_start, q, keys, cross_keys)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value):
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_shape(name, tensor, shape):
    if tuple(tensor.shape) != shape:
        raise malformed(name, f"shape {tuple(tensor.shape)}", shape)


def _check_device(name, tensor, q):
    if tensor.device != q.device:
        raise malformed(name, f"a tensor on {tensor.device}", f"one on the device of q, {q.device}")


def _check_gate(gate, q):
    batch, heads, queries = q.shape[:3]
    if not isinstance(gate, torch.Tensor):
        raise malformed("gate", type(gate).__name__, "a tensor")
    if tuple(gate.shape) not in ((1,), (heads,), (batch, 1, queries), (batch, heads, queries)):
        takes = f"(1,), ({heads},), ({batch}, 1, {queries}) or ({batch}, {heads}, {queries})"
        raise malformed("gate", f"shape {tuple(gate.shape)}", takes)
    if gate.dtype not in (q.dtype, torch.float32):
        raise malformed("gate", gate.dtype, f"float32 or the dtype of q, {q.dtype}")
    _check_device("gate", gate, q)


def _check_mask(name, mask, shape, q):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise malformed(name, getattr(mask, "dtype", type(mask).__name__), "a bool tensor, True = attend, or None")
    _check_shape(name, mask, shape)
    _check_device(name, mask, q)


def _check_query_start(query_start, q):
    if query_start is None:
        return
    if isinstance(query_start, torch.Tensor):
        if query_start.dtype not in (torch.int32, torch.int64):
            raise malformed("query_start", query_start.dtype, "an int, or an int32 or int64 tensor")
        if tuple(query_start.shape) not in ((), (q.shape[0],)):
            raise malformed("query_start", f"shape {tuple(query_start.shape)}", f"an int, () or ({q.shape[0]},)")
        _check_device("query_start", query_start, q)
    elif not _is_integer(query_start) or query_start < 0:
        raise malformed("query_start", repr(query_start), "an int from 0 up, an integer tensor or None")


def _check_packing(cu_seqlens, cross_cu_seqlens, query_start, q, keys, cross_keys):
    if cu_seqlens is None and cross_cu_seqlens is None:
        return
    if cu_seqlens is None or cross_cu_seqlens is None:
        missing = "cu_seqlens" if cu_seqlens is None else "cross_cu_seqlens"
        raise malformed(missing, "None", "(n + 1,) int32: cu_seqlens and cross_cu_seqlens are given together")
    if query_start is not None:
        raise malformed("query_start", "a value with cu_seqlens", "None: each packed sequence starts at its first key")
    batch, _, queries, _ = q.shape
    if batch != 1 or keys != queries:
        raise malformed("cu_seqlens", f"q of batch {batch} with {queries} queries, {keys} keys", "B = 1 and N = S")
    packings = (("cu_seqlens", cu_seqlens, queries), ("cross_cu_seqlens", cross_cu_seqlens, cross_keys))
    for name, bounds, total in packings:
        if not isinstance(bounds, torch.Tensor) or bounds.dtype != torch.int32:
            raise malformed(name, getattr(bounds, "dtype", type(bounds).__name__), "an int32 tensor (n + 1,)")
        if bounds.dim() != 1 or bounds.shape[0] < 1 or bounds.shape != cu_seqlens.shape:
            raise malformed(name, f"shape {tuple(bounds.shape)}", "(n + 1,), the same n for both")
        _check_device(name, bounds, q)
        # The values are looked at only where that costs no wait for a device and no graph break.
        if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
            values = bounds.tolist()
            if values[0] != 0 or values[-1] != total or any(a > b for a, b in pairwise(values)):
                raise malformed(name, values, f"bounds that start at 0, never fall and end at {total}")
