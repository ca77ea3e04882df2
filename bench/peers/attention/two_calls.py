"""Two calls of PyTorch's attention and the gated sum in one more pass over the outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.peers import everywhere

Attention = Callable[..., Tensor]


def two_calls(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, cross_k: Tensor, cross_v: Tensor, gate: Tensor
) -> Tensor:
    """attention: function of q, k, v and is_causal."""
    self_out = attention(q, k, v, is_causal=q.shape[2] > 1)
    return torch.addcmul(self_out, gate, attention(q, cross_k, cross_v, is_causal=False))


def sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, backend: SDPBackend | None = None) -> Tensor:
    """By the backend that PyTorch chooses, or by this one alone."""
    call = partial(scaled_dot_product_attention, q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel(backend):
        return call()


BACKENDS = {
    "two calls": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SDPA = {name: everywhere(partial(two_calls, partial(sdpa, backend=backend))) for name, backend in BACKENDS.items()}
PEERS = {"attention": _SDPA, "decode": _SDPA}
