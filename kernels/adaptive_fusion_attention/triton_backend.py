"""`adaptive_fusion_attention` by the Triton kernels: autograd, and opaque operators for torch.compile."""

import math

import torch
from torch import Tensor

from .triton_backward import backward
from .triton_call import empty_like
from .triton_decode import decode, decodes
from .triton_forward import forward


def fused_attention(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    *,
    causal,
    scale,
    window,
    softcap,
    key_mask,
    cross_mask,
    query_start,
    cu_seqlens,
    cross_cu_seqlens,
    return_lse,
):
    """Arguments and results of `adaptive_fusion_attention`, checked by it."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    start, index = (query_start, None) if isinstance(query_start, Tensor) else (None, query_start)
    softcap = None if softcap is None else float(softcap)
    tensors = (q, k, v, cross_k, cross_v, gate)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not training and cu_seqlens is None and decodes(q):
        run = _decode_operator if torch.compiler.is_compiling() else _decode
        results = run(*tensors, key_mask, cross_mask, start, index, causal, scale, window, softcap, return_lse)
        return results if return_lse else results[0]
    if training and cross_k.shape[0] != q.shape[0]:  # the gradients of shared rows are sums, which this makes
        sharing = q.shape[0] // cross_k.shape[0]
        cross_k, cross_v = (x.repeat_interleave(sharing, dim=0) for x in (cross_k, cross_v))
        cross_mask = None if cross_mask is None else cross_mask.repeat_interleave(sharing, dim=0)
        tensors = (q, k, v, cross_k, cross_v, gate)
    save_self = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    call = (key_mask, cross_mask, start, cu_seqlens, cross_cu_seqlens, index, causal, scale, window, softcap, save_self)
    out, self_lse, cross_lse = _FusedAttention.apply(*tensors, *call)
    return (out, self_lse * math.log(2), cross_lse * math.log(2)) if return_lse else out


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, both terms of the output before they were added, and both log-sum-exps."""

    @staticmethod
    def forward(ctx, *arguments):
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        out, self_out, cross_out, self_lse, cross_lse = run(*arguments)
        tensors, ctx.options = arguments[:11], arguments[11:-1]
        if arguments[3].shape[2] == 0:  # no cross keys: out is the self term
            self_out = out
        ctx.save_for_backward(self_out, cross_out, self_lse, cross_lse, *tensors)
        ctx.mark_non_differentiable(self_lse, cross_lse)
        return out, self_lse, cross_lse

    @staticmethod
    def backward(ctx, grad_out, grad_self_lse, grad_cross_lse):
        wanted = list(ctx.needs_input_grad[:6])
        if torch.compiler.is_compiling():
            grads = _backward_operator(grad_out, *ctx.saved_tensors, *ctx.options, wanted)
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        else:
            grads = _backward(grad_out, *ctx.saved_tensors, *ctx.options, wanted)
        return *grads, *(None,) * 11


def _forward(*arguments):
    with torch.cuda.device_of(arguments[0]):  # kernels start on the current device
        return forward(*_with_start(arguments[:-1]), arguments[-1])


def _backward(*arguments):
    with torch.cuda.device_of(arguments[0]):
        return backward(*arguments[:5], *_with_start(arguments[5:-1]), arguments[-1])


def _with_start(arguments):
    """`query_start` is one argument of the kernels, but a tensor and an int are two in an operator's schema."""
    *tensors, start, cu_seqlens, cross_cu_seqlens, index, causal, scale, window, softcap = arguments
    start = index if start is None else start
    cu_seqlens, cross_cu_seqlens = (x if x is None else x.contiguous() for x in (cu_seqlens, cross_cu_seqlens))
    return *tensors, start, cu_seqlens, cross_cu_seqlens, causal, scale, window, softcap


@torch.library.custom_op("layalign::adaptive_fusion_attention", mutates_args=())
def _forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    gate: Tensor,
    key_mask: Tensor | None,
    cross_mask: Tensor | None,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    cross_cu_seqlens: Tensor | None,
    index: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    save_self: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(
        q,
        k,
        v,
        cross_k,
        cross_v,
        gate,
        key_mask,
        cross_mask,
        start,
        cu_seqlens,
        cross_cu_seqlens,
        index,
        causal,
        scale,
        window,
        softcap,
        save_self,
    )


@_forward_operator.register_fake
def _(q, k, v, cross_k, cross_v, *rest):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    crossing, save_self = cross_k.shape[2] > 0, rest[-1]
    self_out, cross_out = (empty_like(q) if made else q.new_empty(0) for made in (crossing and save_self, crossing))
    return empty_like(q), self_out, cross_out, lse, torch.empty_like(lse)


@torch.library.custom_op("layalign::adaptive_fusion_attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    self_out: Tensor,
    cross_out: Tensor,
    self_lse: Tensor,
    cross_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    gate: Tensor,
    key_mask: Tensor | None,
    cross_mask: Tensor | None,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    cross_cu_seqlens: Tensor | None,
    index: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (self_out, cross_out, self_lse, cross_lse, q, k, v, cross_k, cross_v, gate)
    masks = (key_mask, cross_mask, start, cu_seqlens, cross_cu_seqlens)
    grads = _backward(grad_out, *tensors, *masks, index, causal, scale, window, softcap, wanted)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


@_backward_operator.register_fake
def _(grad_out, self_out, cross_out, self_lse, cross_lse, q, k, v, cross_k, cross_v, gate, *rest):
    inputs = (q, k, v, cross_k, cross_v, gate)
    return tuple(empty_like(x) if want else q.new_empty(0) for x, want in zip(inputs, rest[-1], strict=True))


def _decode(*arguments):
    *tensors, start, index, causal, scale, window, softcap, return_lse = arguments
    with torch.cuda.device_of(tensors[0]):
        return decode(*tensors, index if start is None else start, causal, scale, window, softcap, return_lse)


@torch.library.custom_op("layalign::adaptive_fusion_attention_decode", mutates_args=())
def _decode_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    gate: Tensor,
    key_mask: Tensor | None,
    cross_mask: Tensor | None,
    start: Tensor | None,
    index: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = (key_mask, cross_mask, start, index, causal, scale, window, softcap, return_lse)
    results = _decode(q, k, v, cross_k, cross_v, gate, *call)
    return tuple(q.new_empty(0) if x is None else x for x in results)


@_decode_operator.register_fake
def _(q, *rest):
    return_lse = rest[-1]
    lse = [q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else q.new_empty(0) for _ in range(2)]
    return empty_like(q), *lse
