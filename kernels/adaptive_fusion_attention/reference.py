"""The specification of `adaptive_fusion_attention` in plain PyTorch. Tests and benchmarks use it; no backend does."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import gates
from .call import FLOATS, Call, first_query, with_rows_repeated, with_spans_as_masks
from .paged import PagedCall, gathered


def adaptive_fusion_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    gate: Tensor,
    *,
    sink: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cross_mask: Tensor | None = None,
    key_span: Tensor | None = None,
    cross_span: Tensor | None = None,
    query_start: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cross_cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `adaptive_fusion_attention`, unchecked.

    upcast=True computes in fp64 and rounds the results once to the dtype of q; upcast=False computes in the dtype of q,
    as eager PyTorch would.
    """
    tensors = (
        q,
        k,
        v,
        cross_k,
        cross_v,
        gate,
        sink,
        key_mask,
        cross_mask,
        key_span,
        cross_span,
        cu_seqlens,
        cross_cu_seqlens,
    )
    return attend_reference(Call(*tensors, query_start, causal, scale, window, softcap), return_lse, upcast=upcast)


def adaptive_fusion_decode_paged_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cross_k_cache: Tensor,
    cross_v_cache: Tensor,
    cross_block_table: Tensor,
    cross_seq_lens: Tensor,
    gate: Tensor,
    *,
    sink: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `adaptive_fusion_decode_paged`, unchecked; upcast as in `adaptive_fusion_attention_reference`."""
    caches = (k_cache, v_cache, block_table, seq_lens, cross_k_cache, cross_v_cache, cross_block_table, cross_seq_lens)
    call = PagedCall(q, *caches, gate, sink, None, scale, window, softcap)
    return attend_reference(gathered(call), return_lse, upcast=upcast)


def attend_reference(
    call: Call, return_lse: bool = False, *, upcast: bool = True
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`adaptive_fusion_attention_reference` of a Call."""
    dtype = call.q.dtype
    call = with_rows_repeated(with_spans_as_masks(call))
    if upcast:
        floats = [name for name in Call._fields[:FLOATS] if getattr(call, name) is not None]
        call = call._replace(**{name: getattr(call, name).double() for name in floats})
    call = call._replace(scale=call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.cu_seqlens is None:
        parts = [_one_batch(call._replace(query_start=first_query(call)))]
    else:
        # n = 0: S and T are 0 too
        parts = [_one_batch(part) for part in _sequences(call)] or [_one_batch(call._replace(query_start=0))]
    out, self_lse, cross_lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    out = out.to(dtype)
    return (out, self_lse.detach().float(), cross_lse.detach().float()) if return_lse else out


def _sequences(call):
    """A call for each packed sequence."""
    bounds, cross_bounds = call.cu_seqlens.tolist(), call.cross_cu_seqlens.tolist()
    for (begin, end), (cross_begin, cross_end) in zip(pairwise(bounds), pairwise(cross_bounds), strict=True):
        yield call._replace(
            **{name: getattr(call, name)[:, :, begin:end] for name in ("q", "k", "v")},
            **{name: getattr(call, name)[:, :, cross_begin:cross_end] for name in ("cross_k", "cross_v")},
            gate=gates.of_sequence(call.gate, begin, end),
            key_mask=None if call.key_mask is None else call.key_mask[:, begin:end],
            cross_mask=None if call.cross_mask is None else call.cross_mask[:, cross_begin:cross_end],
            query_start=0,
        )


def _one_batch(call):
    q, k, device = call.q, call.k, call.q.device
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if call.causal:
        start = torch.as_tensor(call.query_start, device=device).reshape(-1, 1, 1, 1)
        query_index = start + torch.arange(queries, device=device)[:, None]
        key_index = torch.arange(keys, device=device)
        visible = visible & (key_index <= query_index)
        if call.window is not None:
            visible = visible & (query_index - key_index < call.window)
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None, :]
    self_out, self_lse = _attention(q, k, call.v, visible, call.scale, call.softcap, call.sink)

    cross_visible = torch.ones(batch, 1, queries, call.cross_k.shape[2], dtype=torch.bool, device=device)
    if call.cross_mask is not None:
        cross_visible = cross_visible & call.cross_mask[:, None, None, :]
    cross_out, cross_lse = _attention(q, call.cross_k, call.cross_v, cross_visible, call.scale, None)
    gate = gates.as_rows(call.gate)[..., None]
    return self_out + gate.to(self_out.dtype) * cross_out, self_lse, cross_lse


def _attention(q, k, v, visible, scale, softcap, sink=None):
    """Softmax attention under `visible` (B, 1, S, N) bool, with its log-sum-exp (B, Hq, S). sink: (Hq,), a score beside the keys'."""
    seen = visible.any(dim=2)[..., None]  # (B, 1, N, 1): a key that no query sees may hold anything
    k, v = (torch.where(seen, x, 0.0).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:  # as a last key, whose value is 0
        scores = torch.cat([scores, sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    if scores.shape[-1] == 0:
        return scores @ v, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (top + torch.log(total)).squeeze(-1)
    return (weights / torch.where(total == 0, 1.0, total)) @ v, lse
