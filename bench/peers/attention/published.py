"""The published attention, written anew: self- and cross-attention on their own, key heads repeated for the query heads that
share them, and the gated sum."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.peers import everywhere


def eager(q: Tensor, k: Tensor, v: Tensor, cross_k: Tensor, cross_v: Tensor, gate: Tensor) -> Tensor:
    """Arguments of `adaptive_fusion_attention`, gate (1,). Scores and probabilities are written out."""
    visible = _causal_mask(q.shape[2], k.shape[2], q.device) if q.shape[2] > 1 else None
    return _eager(q, k, v, visible) + gate * _eager(q, cross_k, cross_v, None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, cross_k: Tensor, cross_v: Tensor, gate: Tensor) -> Tensor:
    """The same by PyTorch's attention."""
    k, v, cross_k, cross_v = (_repeated(x, q) for x in (k, v, cross_k, cross_v))
    self_out = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    return self_out + gate * scaled_dot_product_attention(q, cross_k, cross_v)


def _eager(q, k, v, visible):
    k, v = _repeated(k, q), _repeated(v, q)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _repeated(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


@cache
def _causal_mask(queries, keys, device):
    """(S, N) bool, made once: a model makes one for all of its layers."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


_PUBLISHED = {"published eager": everywhere(eager), "published sdpa": everywhere(sdpa)}
PEERS = {"attention": _PUBLISHED, "decode": _PUBLISHED}
