"""The specification of `adaptive_fusion_attention` in plain PyTorch. Tests and benchmarks use it; no backend does."""

import torch


def adaptive_fusion_attention_reference(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    *,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
    key_mask=None,
    cross_mask=None,
    query_start=None,
    cu_seqlens=None,
    cross_cu_seqlens=None,
    return_lse=False,
    upcast=True,
):
    """Arguments and results of `adaptive_fusion_attention`, unchecked.

    upcast=True computes in fp64 and rounds the results once to the dtype of q; upcast=False computes in the dtype of q,
    as eager PyTorch would.
    """
    dtype = q.dtype
    if upcast:
        q, k, v, cross_k, cross_v, gate = (x.double() for x in (q, k, v, cross_k, cross_v, gate))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cross_k.shape[0] != q.shape[0]:
        sharing = q.shape[0] // cross_k.shape[0]
        cross_k, cross_v = (x.repeat_interleave(sharing, dim=0) for x in (cross_k, cross_v))
        cross_mask = None if cross_mask is None else cross_mask.repeat_interleave(sharing, dim=0)

    if cu_seqlens is not None:
        bounds, cross_bounds = cu_seqlens.tolist(), cross_cu_seqlens.tolist()
        parts = [
            _one_batch(
                *(x[:, :, start:end] for x in (q, k, v)),
                *(x[:, :, cross_start:cross_end] for x in (cross_k, cross_v)),
                gate[:, :, start:end] if gate.dim() == 3 else gate,
                causal=causal,
                scale=scale,
                window=window,
                softcap=softcap,
                key_mask=None if key_mask is None else key_mask[:, start:end],
                cross_mask=None if cross_mask is None else cross_mask[:, cross_start:cross_end],
                query_start=0,
            )
            for start, end, cross_start, cross_end in zip(
                bounds[:-1], bounds[1:], cross_bounds[:-1], cross_bounds[1:], strict=True
            )
        ]
        if not parts:  # n = 0: S and T are 0 too
            parts = [_one_batch(q, k, v, cross_k, cross_v, gate, False, scale, None, None, None, None, 0)]
        out, self_lse, cross_lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    else:
        if query_start is None:
            query_start = k.shape[2] - q.shape[2]
        out, self_lse, cross_lse = _one_batch(
            q, k, v, cross_k, cross_v, gate, causal, scale, window, softcap, key_mask, cross_mask, query_start
        )
    out = out.to(dtype)
    return (out, self_lse.detach().float(), cross_lse.detach().float()) if return_lse else out


def _one_batch(q, k, v, cross_k, cross_v, gate, causal, scale, window, softcap, key_mask, cross_mask, query_start):
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        start = torch.as_tensor(query_start, device=q.device).reshape(-1, 1, 1, 1)
        query_index = start + torch.arange(queries, device=q.device)[:, None]
        key_index = torch.arange(keys, device=q.device)
        visible = visible & (key_index <= query_index)
        if window is not None:
            visible = visible & (query_index - key_index < window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    self_out, self_lse = _attention(q, k, v, visible, scale, softcap)

    cross_visible = torch.ones(batch, 1, queries, cross_k.shape[2], dtype=torch.bool, device=q.device)
    if cross_mask is not None:
        cross_visible = cross_visible & cross_mask[:, None, None, :]
    cross_out, cross_lse = _attention(q, cross_k, cross_v, cross_visible, scale, None)

    gate = gate[:, None, None] if gate.dim() == 1 else gate[..., None]
    return self_out + gate.to(self_out.dtype) * cross_out, self_lse, cross_lse


def _attention(q, k, v, visible, scale, softcap):
    """Softmax attention under `visible` (B, 1, S, N) bool, with its log-sum-exp (B, Hq, S)."""
    slot_used = visible.any(dim=2)[..., None]  # (B, 1, N, 1): a slot that no query sees may hold anything
    k, v = (torch.where(slot_used, x, 0.0).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if scores.shape[-1] == 0:
        return scores @ v, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (top + torch.log(total)).squeeze(-1)
    return (weights / torch.where(total == 0, 1.0, total)) @ v, lse
