"""A plain product by PyTorch, cuBLAS's on a GPU: one for a shared weight, a batched one for a weight per stream."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from bench.peers import everywhere


def product(streams: Tensor, weight: Tensor) -> Tensor:
    """streams (2L, B, T, De), weight (Dl, De) or (2L, Dl, De) -> (2L, B, T, Dl)."""
    if weight.dim() == 2:
        flat = linear(streams.flatten(0, 2), weight)
    else:
        flat = streams.flatten(1, 2) @ weight.mT
    return flat.view(*streams.shape[:-1], weight.shape[-2])


PEERS = {"stream_linear": {"plain product": everywhere(product)}}
