"""`adaptive_fusion_attention` by the Triton kernels: autograd, and opaque operators for torch.compile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..call import FLAT_NUMBERS, FLAT_TENSORS, SCHEMA, Call, flatten, unflatten, with_rows_repeated
from .arguments import empty_like
from .backward import backward
from .decode import decode, decodes
from .forward import ForwardResults, forward


def fused_attention(call: Call, return_lse: bool) -> Tensor | tuple[Tensor, ...]:
    """The results of `adaptive_fusion_attention` for a checked Call."""
    training = torch.is_grad_enabled() and any(x.requires_grad for x in call[:6])
    if not training and call.cu_seqlens is None and decodes(call.q):
        run = torch.ops.layalign.adaptive_fusion_attention_decode if torch.compiler.is_compiling() else _decode
        results = run(*flatten(call), return_lse)
        return results if return_lse else results[0]
    if training:  # the gradients of shared rows are sums, which this makes
        call = with_rows_repeated(call)
    save_self = torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad)
    out, self_lse, cross_lse = _FusedAttention.apply(*flatten(call), save_self)
    return (out, self_lse * math.log(2), cross_lse * math.log(2)) if return_lse else out


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, both terms of the output before they were added, and both log-sum-exps."""

    @staticmethod
    def forward(ctx, *arguments):
        run = torch.ops.layalign.adaptive_fusion_attention if torch.compiler.is_compiling() else _forward
        out, self_out, cross_out, self_lse, cross_lse = run(*arguments)
        flat = arguments[:-1]
        if unflatten(flat).cross_k.shape[2] == 0:  # no cross keys: out is the self term
            self_out = out
        ctx.save_for_backward(self_out, cross_out, self_lse, cross_lse, *flat[:FLAT_TENSORS])
        ctx.numbers = flat[FLAT_TENSORS:]
        ctx.mark_non_differentiable(self_lse, cross_lse)
        return out, self_lse, cross_lse

    @staticmethod
    def backward(ctx, grad_out, grad_self_lse, grad_cross_lse):
        wanted = list(ctx.needs_input_grad[:6])
        arguments = (grad_out, *ctx.saved_tensors, *ctx.numbers, wanted)
        if torch.compiler.is_compiling():
            grads = torch.ops.layalign.adaptive_fusion_attention_backward(*arguments)
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        else:
            grads = _backward(*arguments)
        return *grads, *(None,) * (FLAT_TENSORS + FLAT_NUMBERS + 1 - len(wanted))


def _forward(*arguments):
    *flat, save_self = arguments
    with torch.cuda.device_of(flat[0]):  # kernels start on the current device
        return forward(unflatten(flat), save_self)


def _backward(*arguments):
    grad_out, self_out, cross_out, self_lse, cross_lse, *flat, wanted = arguments
    call = unflatten(flat)
    with torch.cuda.device_of(call.q):
        return backward(grad_out, ForwardResults(None, self_out, cross_out, self_lse, cross_lse), call, wanted)


def _decode(*arguments):
    *flat, return_lse = arguments
    with torch.cuda.device_of(flat[0]):
        return decode(unflatten(flat), return_lse)


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention",
    mutates_args=(),
    schema=f"({SCHEMA}, bool save_self) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_operator(*arguments):
    return tuple(_forward(*arguments))


@_forward_operator.register_fake
def _(*arguments):
    *flat, save_self = arguments
    call = unflatten(flat)
    q, crossing = call.q, call.cross_k.shape[2] > 0
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    self_out, cross_out = (empty_like(q) if made else q.new_empty(0) for made in (crossing and save_self, crossing))
    return empty_like(q), self_out, cross_out, lse, torch.empty_like(lse)


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor self_out, Tensor cross_out, Tensor self_lse, Tensor cross_lse, {SCHEMA}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(*arguments):
    grads = _backward(*arguments)
    return tuple(arguments[0].new_empty(0) if grad is None else grad for grad in grads)


@_backward_operator.register_fake
def _(*arguments):
    _, _, _, _, _, *flat, wanted = arguments
    call = unflatten(flat)
    return tuple(empty_like(x) if want else call.q.new_empty(0) for x, want in zip(call[:6], wanted, strict=True))


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention_decode",
    mutates_args=(),
    schema=f"({SCHEMA}, bool return_lse) -> (Tensor, Tensor, Tensor)",
)
def _decode_operator(*arguments):
    return tuple(arguments[0].new_empty(0) if x is None else x for x in _decode(*arguments))


@_decode_operator.register_fake
def _(*arguments):
    q, return_lse = arguments[0], arguments[-1]
    lse = [q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else q.new_empty(0) for _ in range(2)]
    return empty_like(q), *lse
