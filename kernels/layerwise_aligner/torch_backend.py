"""The layer-wise aligner as PyTorch matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .projections import Products


def layer_mix(hidden_states, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments and result of `layer_mix`, checked by it."""
    return mix(prepare(hidden_states), weight, bias).unflatten(1, hidden_states[0].shape[:2])


def stream_linear(streams: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments and result of `stream_linear`, checked by it."""
    if weight.dim() == 2:
        return linear(streams, weight, bias)
    flat = streams.flatten(1, 2)
    if bias is None:
        out = torch.bmm(flat, weight.transpose(1, 2))
    else:
        out = torch.baddbmm(bias[:, None], flat, weight.transpose(1, 2))
    return out.view(*streams.shape[:3], weight.shape[1])


def prepare(hidden_states):
    """The states as `mix` takes them: (E, tokens, De), a copy where they are a sequence."""
    if isinstance(hidden_states, (list, tuple)):
        hidden_states = torch.stack(list(hidden_states))
    return hidden_states.flatten(1, 2)


def mix(states, weight, bias):
    """relu(weight (G, E) @ states + bias (G,) or None) -> (G, tokens, De)."""
    flat = states.flatten(1)
    mixed = weight @ flat if bias is None else torch.addmm(bias[:, None], weight, flat)
    return torch.relu_(mixed).view(weight.shape[0], *states.shape[1:])


def mix_gradients(grad, states, weight, bias, wants_states, wants_weight, wants_bias, state_dtype=torch.float32):
    """Gradients of what `mix` takes, in fp32, of the states in state_dtype, from that of its result; None where not wanted."""
    grad = torch.ops.aten.threshold_backward(grad, mix(states, weight, bias), 0)
    grad_states = grad_weight = grad_bias = None
    if wants_states:
        grad_states = (weight.T @ grad.flatten(1)).to(state_dtype).view(states.shape)
    if wants_weight:
        # Token by token: one sum over all their numbers was 4 times less exact, 8e-6 of its value. Half precision, which
        # would round every token's share, is summed in fp32 as it is.
        if grad.dtype == torch.float32:
            grad_weight = (grad.transpose(0, 1) @ states.permute(1, 2, 0)).sum(0)
        else:
            grad_weight = (grad.flatten(1) @ states.flatten(1).T).float()
    if wants_bias:
        grad_bias = grad.sum((1, 2), dtype=torch.float32)
    return grad_states, grad_weight, grad_bias


def matmul(a, b, bias=None, *, transpose_a=False, transpose_b=False, out=None):
    """a[g] @ b[g] + bias[g] for all groups g -> (G, M, N), in `out` where given.

    a: (G, M, K) or a list of G (M, K); b: (G, K, N), a list of G, or one (K, N) for all; with rows and columns exchanged
    where said so; bias: (G, N), or (N,) for all, or None.
    """
    shared = isinstance(b, torch.Tensor) and b.dim() == 2
    if out is None:
        first = b if shared else b[0]
        out = first.new_empty(len(a), a[0].shape[transpose_a], first.shape[1 - transpose_b])
    if shared and isinstance(a, torch.Tensor) and a.is_contiguous() and not transpose_a:
        a, b, groups = a.view(1, -1, a.shape[2]), [b], out.view(1, -1, out.shape[2])
    else:
        b, groups = [b] * len(a) if shared else b, out
    for index, into in enumerate(groups):
        left, right = a[index].mT if transpose_a else a[index], b[index].mT if transpose_b else b[index]
        if bias is None:
            torch.mm(left, right, out=into)
        else:
            torch.addmm(bias if bias.dim() == 1 else bias[index], left, right, out=into)
    return out


def summed_matmul(a, b, out):
    """Add a[g]^T @ b[g] of all groups g to `out` (M, N) fp32; a and b: (G, K, M) and (G, K, N), or lists of G."""
    for left, right in zip(a, b, strict=True):
        if left.dtype == torch.float32:
            out.addmm_(left.mT, right)
        else:
            out += left.mT @ right


PRODUCTS = Products(prepare, mix, mix_gradients, matmul, summed_matmul)
