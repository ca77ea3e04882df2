"""Modules with the functions of flash-attn 2, 3 and 4, as published: their parameters, layouts, alignment and results, in plain
PyTorch on any device. What the library passes to one of them, the real one takes."""

import types
from itertools import pairwise

import torch


def modules(version):
    """{import name: module} of one version."""
    name = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[version]
    module = types.ModuleType(name)
    module.flash_attn_func, module.flash_attn_varlen_func = _FUNCTIONS[version]
    return {"flash_attn": types.ModuleType("flash_attn")} | {name: module}  # version 4 leaves its parent empty


def _dense_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False
):  # fmt: skip
    out, lse = _dense(q, k, v, softmax_scale, causal, _endless(window_size), softcap, deterministic, torch.inf)
    return (out, lse, None) if return_attn_probs else out


def _packed_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None
):  # fmt: skip
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = _packed(q, k, v, bounds, softmax_scale, causal, _endless(window_size), softcap, deterministic, torch.inf)
    return (out, lse, None) if return_attn_probs else out


def _dense_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False
):  # fmt: skip
    out, lse = _dense(q, k, v, softmax_scale, causal, _endless(window_size), softcap, deterministic, -torch.inf)
    return (out, lse) if return_attn_probs else out


def _packed_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False
):  # fmt: skip
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = _packed(
        q, k, v, bounds, softmax_scale, causal, _endless(window_size), softcap, deterministic, -torch.inf
    )
    return (out, lse) if return_attn_probs else out


def _dense_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False
):  # fmt: skip
    out, lse = _dense(q, k, v, softmax_scale, causal, window_size, softcap, deterministic, -torch.inf)
    return out, lse if return_lse else None


def _packed_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False
):  # fmt: skip
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = _packed(q, k, v, bounds, softmax_scale, causal, window_size, softcap, deterministic, -torch.inf)
    return out, lse if return_lse else None


_FUNCTIONS = {2: (_dense_2, _packed_2), 3: (_dense_3, _packed_3), 4: (_dense_4, _packed_4)}


def _endless(window_size):
    """Versions 2 and 3 write -1 for a side without an end."""
    return tuple(None if side < 0 else side for side in window_size)


def _dense(q, k, v, scale, causal, window_size, softcap, deterministic, nothing):
    """(B, S, H, D) -> the same and (B, H, S)."""
    assert deterministic
    assert q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[1] and k.shape[1]
    (queries, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    dtype = q.dtype
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(queries)[:, None] + keys - queries  # the last query is aligned to the last key
    key = torch.arange(keys)
    back, ahead = (window_size[0], 0) if causal else window_size
    assert all(side is None or 0 <= side < 2**31 for side in (back, ahead))
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if ahead is not None:
        visible &= key <= place + ahead
    if back is not None:
        visible &= key >= place - back
    scores = scores.masked_fill(~visible, -torch.inf)
    some = visible.any(dim=1)[:, None]
    weights = torch.softmax(scores.masked_fill(~some, 0.0), dim=-1).masked_fill(~some, 0.0)
    lse = torch.logsumexp(scores, dim=-1) if keys else scores.new_full(scores.shape[:3], -torch.inf)
    return (weights @ v).transpose(1, 2).to(dtype), torch.where(lse == -torch.inf, nothing, lse)


def _packed(q, k, v, bounds, *numbers):
    """(total, H, D) -> the same and (H, total)."""
    *bounds, longest_queries, longest_keys = bounds
    bounds = [x.tolist() for x in bounds]
    for x, ends, longest in zip((q, k), bounds, (longest_queries, longest_keys), strict=True):
        assert ends[0] == 0 and ends[-1] == x.shape[0]
        assert all(0 <= end - begin <= longest for begin, end in pairwise(ends))
    outs, lses = [], []
    for own, other in zip(*map(pairwise, bounds), strict=True):
        parts = [x[slice(*ends)][None] for x, ends in ((q, own), (k, other), (v, other))]
        if own[0] == own[1]:
            continue
        if other[0] == other[1]:
            out, lse = torch.zeros_like(parts[0]), torch.full((1, q.shape[1], own[1] - own[0]), numbers[-1])
        else:
            out, lse = _dense(*parts, *numbers)
        outs.append(out[0])
        lses.append(lse[0])
    used = sum(x[:0].sum() for x in (q, k, v)).to(q.dtype)  # by one call: a tensor that nobody sees has a gradient of 0
    return torch.cat(outs) + used, torch.cat(lses, dim=1)
