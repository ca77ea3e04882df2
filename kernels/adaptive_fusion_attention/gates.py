"""The shapes that a gate may have, and all that depends on them: a new one that broadcasts against (B, Hq, S) is one more entry of
`shapes`. The kernels read any gate by strides."""

import torch
from torch import Tensor

from ..dispatch import malformed


def shapes(batch: int, heads: int, queries: int) -> tuple[tuple[int, ...], ...]:
    """What a gate's shape may be: one for all, one a head, one a query, one a head and query."""
    return (1,), (heads,), (batch, 1, queries), (batch, heads, queries)


def check_gate(gate: object, q: Tensor) -> None:
    """Raises ValueError for a gate that does not fit q, (B, Hq, S, D)."""
    if not isinstance(gate, torch.Tensor):
        raise malformed("gate", type(gate).__name__, "a tensor")
    if tuple(gate.shape) not in (takes := shapes(*q.shape[:3])):
        *first, last = (f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for shape in takes)
        raise malformed("gate", f"shape {tuple(gate.shape)}", f"{', '.join(first)} or {last}")
    if gate.dtype not in (q.dtype, torch.float32):
        raise malformed("gate", gate.dtype, f"float32 or the dtype of q, {q.dtype}")
    if gate.device != q.device:
        raise malformed("gate", f"a tensor on {gate.device}", f"one on the device of q, {q.device}")


def as_rows(gate: Tensor) -> Tensor:
    """The gate as it broadcasts against (B, Hq, S)."""
    return gate.view(1, -1, 1) if gate.dim() == 1 else gate


def spread(gate: Tensor, q: Tensor) -> Tensor:
    """The gate as (B, Hq, S) by strides alone."""
    if gate.dim() == 1:  # whatever the batch, the same strides: kernels are compiled for them
        return gate.as_strided(q.shape[:3], (0, gate.stride(0) if gate.shape[0] > 1 else 0, 0))
    return gate.expand(q.shape[:3])


def per_query(gate: Tensor) -> bool:
    """Whether queries of one head have gates of their own."""
    return gate.dim() == 3


def of_sequence(gate: Tensor, begin: int, end: int) -> Tensor:
    """The gate of queries begin .. end."""
    return gate[:, :, begin:end] if per_query(gate) and gate.shape[2] > 1 else gate


def sums_heads(gate: Tensor, sums: Tensor) -> bool:
    """Whether the gradient of a gate is that of each query and head, (B, Hq, S), summed over heads alone."""
    rows, (batch, _, queries) = as_rows(gate), sums.shape
    return rows.shape != sums.shape and rows.shape == (batch, 1, queries)


def gradient(sums: Tensor, gate: Tensor) -> Tensor:
    """The gate's gradient from that of each query and head, (B, Hq, S) fp32, or of each query where `sums_heads`."""
    if gate.dim() == 1:
        total = sums.sum((0, 2)) if gate.shape[0] > 1 else sums.sum().view(1)
    else:
        spread_over = [dim for dim in range(3) if gate.shape[dim] < sums.shape[dim]]
        total = sums.sum(spread_over, keepdim=True) if spread_over else sums
    return total if total.dtype == gate.dtype else total.to(gate.dtype)
