"""`adaptive_fusion_attention` as two calls of PyTorch's own attention and a combine: the path of CPUs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import gates
from .call import Call, first_query, with_spans_as_masks
from .packing import repaired


class Keys(NamedTuple):
    """Keys and values (B, Hkv, N, D) of one softmax, their mask (B, N) or None, and what queries see besides it: None (all),
    "triangle" (S = N), or a bool tensor that broadcasts to (B, 1, S, N)."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    visible: Tensor | str | None


def fused_attention(call: Call, return_lse: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The results of `adaptive_fusion_attention` for a checked Call."""
    call = with_spans_as_masks(call)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    cu_seqlens, cross_cu_seqlens = call.cu_seqlens, call.cross_cu_seqlens
    if cu_seqlens is None:
        results = _dense(call, scale, first_query(call), return_lse)
    elif _can_look(cu_seqlens) and _can_look(cross_cu_seqlens):
        results = _sequence_by_sequence(call, scale, return_lse)
    else:
        owner = _sequence_index(cu_seqlens, call.q.shape[2])
        cross_owner = _sequence_index(cross_cu_seqlens, call.cross_k.shape[2])
        results = _dense(call, scale, 0, return_lse, (owner[:, None] == owner, owner[:, None] == cross_owner))
    return results if return_lse else results[0]


def _dense(call, scale, query_start, return_lse, packing=(None, None)):
    """One batch -> out, self lse, cross lse. packing: (S, N) and (S, T) bool, positions of the same sequence."""
    dtype = call.q.dtype
    q, k, v, cross_k, cross_v, gate = call[:6]
    if q.device.type == "cpu" and dtype != torch.float32:
        # CPUs without bf16 matrix units take 12.7 ms for what takes 7.1 in fp32 (4 x 9 heads of 128 x 64); exacter too.
        q, k, v, cross_k, cross_v = (x.float() for x in (q, k, v, cross_k, cross_v))
    keys = _self_keys(call, k, v, query_start, packing[0])
    self_out, self_lse = _attend(q, keys, scale, call.softcap, return_lse, call.sink)
    if cross_k.shape[2] == 0 and not return_lse and not _wants_gradient(cross_k, cross_v, gate):
        return self_out.to(dtype), None, None
    cross_out, cross_lse = _attend_across(q, Keys(cross_k, cross_v, call.cross_mask, packing[1]), scale, return_lse)
    out = torch.addcmul(self_out.float(), gates.as_rows(gate)[..., None].float(), cross_out.float())
    # What is computed by hand has them anyway, its neighbours in a packed row may not.
    return out.to(dtype), *((self_lse, cross_lse) if return_lse else (None, None))


def _attend_across(q, keys, scale, return_lse):
    """The cross term's output and lse. Rows and heads of q that share a row and head of cross keys become its queries."""
    batch, heads, queries, _ = q.shape
    cross_rows, kv_heads = keys.k.shape[:2]
    if cross_rows == batch:
        return _attend(q, keys, scale, None, return_lse)
    together = (batch // cross_rows, heads // kv_heads, queries)
    q = q.unflatten(1, (kv_heads, -1)).unflatten(0, (cross_rows, -1)).transpose(1, 2).flatten(2, 4)
    out, lse = _attend(q, Keys(keys.k, keys.v, keys.mask, None), scale, None, return_lse)
    return tuple(
        x if x is None else x.unflatten(2, together).transpose(1, 2).flatten(2, 3).flatten(0, 1) for x in (out, lse)
    )


def _sequence_by_sequence(call, scale, return_lse):
    """Packed sequences one after the other: no work, and no NaN, crosses from one into another."""
    ends, cross_ends = call.cu_seqlens.tolist(), call.cross_cu_seqlens.tolist()
    sizes, cross_sizes = ([b - a for a, b in pairwise(bounds)] for bounds in (ends, cross_ends))
    split = {name: getattr(call, name).split(sizes, dim=2) for name in ("q", "k", "v")}
    split |= {name: getattr(call, name).split(cross_sizes, dim=2) for name in ("cross_k", "cross_v")}
    if call.key_mask is not None:
        split["key_mask"] = call.key_mask.split(sizes, dim=1)
    if call.cross_mask is not None:
        split["cross_mask"] = call.cross_mask.split(cross_sizes, dim=1)
    split["gate"] = [gates.of_sequence(call.gate, begin, end) for begin, end in pairwise(ends)]
    parts = [
        _dense(call._replace(**{name: values[index] for name, values in split.items()}), scale, 0, return_lse)
        for index in range(len(sizes))
    ]
    if not parts:
        q = call.q
        return torch.empty_like(q), *(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return tuple(torch.cat(part, dim=2) if part[0] is not None else None for part in zip(*parts, strict=True))


def _self_keys(call, k, v, query_start, packing):
    """The Keys of the self term without those that no query reaches; k and v as they are multiplied."""
    queries, keys, device = call.q.shape[2], k.shape[2], call.q.device
    key_mask, window = call.key_mask, call.window
    if not call.causal:
        return Keys(k, v, key_mask, packing)
    if packing is not None:
        return Keys(k, v, key_mask, packing & _causal_visibility(queries, keys, 0, window, device))
    if isinstance(query_start, torch.Tensor):
        visible = _causal_visibility(queries, keys, query_start.reshape(-1, 1, 1, 1), window, device)
        reached = visible.any(dim=2)[:, 0].expand(k.shape[0], keys)
        return Keys(k, v, reached if key_mask is None else reached & key_mask, visible)
    begin, end = 0, min(keys, query_start + queries)
    if window is not None:
        begin = min(end, max(0, query_start - window + 1))
    if (begin, end) != (0, keys):
        k, v = k[:, :, begin:end], v[:, :, begin:end]
        key_mask = None if key_mask is None else key_mask[:, begin:end]
        query_start, keys = query_start - begin, end - begin
    if window is not None and window >= query_start + queries:
        window = None
    if window is None and query_start >= keys - 1:
        visible = None
    elif window is None and query_start == 0:
        visible = "triangle"
    else:
        visible = _causal_visibility(queries, keys, query_start, window, device)
    return Keys(k, v, key_mask, visible)


def _causal_visibility(queries, keys, query_start, window, device):
    query_index = query_start + torch.arange(queries, device=device)[:, None]
    key_index = torch.arange(keys, device=device)
    visible = key_index <= query_index
    return visible if window is None else visible & (query_index - key_index < window)


def _sequence_index(cu_seqlens, length):
    """Which packed sequence each position belongs to; empty sequences own none."""
    return torch.searchsorted(
        repaired(cu_seqlens, length)[1:], torch.arange(length, device=cu_seqlens.device), right=True
    )


def _attend(q, keys, scale, softcap, return_lse, sink=None):
    """One softmax attention over Keys: output, lse or None."""
    k, v, mask, visible = keys
    if mask is not None and _can_look(mask) and bool(mask.all()):
        mask = None
    if mask is not None:
        k, v = _without_masked(k, mask), _without_masked(v, mask)
        if isinstance(visible, str):
            visible = _causal_visibility(q.shape[2], k.shape[2], 0, None, q.device)
        unmasked = mask[:, None, None, :]
        visible = unmasked if visible is None else visible & unmasked
    if softcap is not None or return_lse or sink is not None:
        return _attend_by_hand(q, k, v, scale, visible, softcap, sink)
    if isinstance(visible, str):
        return _sdpa(q, k, v, scale, is_causal=True), None
    if visible is None or _can_look(visible):
        return _sdpa(q, k, v, scale, attn_mask=visible), None
    # The CPU kernel gives 0 where nothing is visible; of other kernels and compiled code nothing is asked this way.
    some = visible.any(dim=-1, keepdim=True)
    return torch.where(some, _sdpa(q, k, v, scale, attn_mask=visible | ~some), 0.0), None


def _sdpa(q, k, v, scale, **mask):
    batch, heads, queries, width = q.shape
    if queries == 1:
        # The heads that share a key head become its queries: 62 us, not 364, for bf16 decode of 9/3 heads.
        q = q.reshape(batch, k.shape[1], heads // k.shape[1], width)
    if q.shape[1] != k.shape[1]:  # no expression: numbers of heads may be symbols, and their comparison is no bool then
        mask["enable_gqa"] = True
    out = scaled_dot_product_attention(q, k, v, scale=scale, **mask)
    return out.reshape(batch, heads, queries, width)


def _can_look(tensor):
    """Values may decide the path only where reading one waits for no device and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _without_masked(x, mask):
    """x (B, H, N, D) with zeros in masked keys: a weight of 0 would not stop a NaN there."""
    # 8 us to see that nothing can leak, 56 us to write the copy (4 x 3 x 128 x 64, fp32, one core).
    if _can_look(x) and bool(torch.linalg.vector_norm(x.detach()) < torch.inf):
        return x
    return torch.where(mask[:, None, :, None], x, 0.0)


def _wants_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attend_by_hand(q, k, v, scale, visible, softcap, sink):
    """In fp32, for what PyTorch's attention lacks: the soft cap, the sink and the log-sum-exp."""
    (batch, heads, queries, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    if isinstance(visible, str):
        visible = _causal_visibility(queries, keys, 0, None, q.device)
    grouped = q.float().reshape(batch, kv_heads, group * queries, width)
    scores = (grouped @ k.float().transpose(-1, -2) * scale).view(batch, kv_heads, group, queries, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        visible = visible if visible.dim() == 2 else visible[:, :, None]
        scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:  # as one more key, whose weight nothing is multiplied with
        beside = sink.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, queries, 1)
        scores = torch.cat([scores, beside], dim=-1)
    if scores.shape[-1] == 0:
        lse = scores.new_full((batch, heads, queries), -torch.inf)
        weights = scores
    else:
        lse = torch.logsumexp(scores.detach(), dim=-1)
        top = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
        weights = torch.exp(scores - top)
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        lse = lse.view(batch, heads, queries)
    out = weights[..., :keys].reshape(batch, kv_heads, group * queries, keys) @ v.float()
    return out.view(batch, heads, queries, width).to(q.dtype), lse
