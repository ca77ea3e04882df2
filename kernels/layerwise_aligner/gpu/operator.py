"""The layer-wise aligner by the Triton kernels: autograd, and opaque operators for torch.compile."""

import torch
from torch import Tensor

from ...dispatch import first_gradients_only
from ..projections import Products
from . import library, matmul, mix


def layer_mix(hidden_states, weight, bias=None):
    """Arguments and result of `layer_mix`, checked by it."""
    # Apart from one another, so that no state needs a gradient as large as all.
    states = hidden_states.unbind(0) if isinstance(hidden_states, Tensor) else hidden_states
    return _LayerMix.apply(weight, bias, *states)


def stream_linear(streams, weight, bias=None, with_library=False):
    """Arguments and result of `stream_linear`, checked by it; with_library: products as library.py says."""
    return _StreamLinear.apply(streams, weight, bias, with_library)


def prepare(hidden_states):
    """The states as the kernels take them: E contiguous tensors (tokens, De)."""
    return [state.contiguous().flatten(0, 1) for state in hidden_states]


PRODUCTS = Products(prepare, mix.mix, mix.mix_gradients, matmul.matmul, matmul.summed_matmul)
LIBRARY_PRODUCTS = Products(prepare, mix.mix, mix.mix_gradients, library.matmul, library.summed_matmul)


class _LayerMix(torch.autograd.Function):
    """(J, B, T, De); saves its inputs only."""

    @staticmethod
    def forward(ctx, weight, bias, *states):
        ctx.save_for_backward(weight, bias, *states)
        run = _mix_operator if torch.compiler.is_compiling() else _mix
        return run(weight, bias, list(states))

    @staticmethod
    @first_gradients_only
    def backward(ctx, grad):
        weight, bias, *states = ctx.saved_tensors
        wants_weight, wants_bias, *wants_states = ctx.needs_input_grad
        run = _mix_backward_operator if torch.compiler.is_compiling() else _mix_backward
        wanted = [any(wants_states), wants_weight, wants_bias]
        grad_states, grad_weight, grad_bias = run(grad, weight, bias, states, wanted)
        of_states = [grad_states[index] if want else None for index, want in enumerate(wants_states)]
        return grad_weight if wants_weight else None, grad_bias if wants_bias else None, *of_states


class _StreamLinear(torch.autograd.Function):
    """(J, B, T, Do); saves its inputs only."""

    @staticmethod
    def forward(ctx, streams, weight, bias, with_library):
        ctx.save_for_backward(streams, weight)
        ctx.with_library = with_library
        run = _linear_operator if torch.compiler.is_compiling() else _linear
        return run(streams, weight, bias, with_library)

    @staticmethod
    @first_gradients_only
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        run = _linear_backward_operator if torch.compiler.is_compiling() else _linear_backward
        grads = run(grad, *ctx.saved_tensors, wanted, ctx.with_library)
        return *(x if want else None for x, want in zip(grads, wanted, strict=True)), None


def _mix(weight, bias, states):
    with torch.cuda.device_of(weight):  # kernels start on the current device
        return mix.mix(prepare(states), weight, bias).unflatten(1, states[0].shape[:2])


def _mix_backward(grad, weight, bias, states, wanted):
    with torch.cuda.device_of(weight):
        grad = grad.contiguous().flatten(1, 2)
        grads = mix.mix_gradients(grad, prepare(states), weight, bias, *wanted, weight.dtype)
    grad_states, *of_parameters = grads
    # Copies: they are parts of one tensor, which results of an operator may not be.
    grad_weight, grad_bias = (x if x is None else x.to(weight.dtype, copy=True) for x in of_parameters)
    return grad_states if grad_states is None else grad_states.unflatten(1, states[0].shape[:2]), grad_weight, grad_bias


def _linear(streams, weight, bias, with_library):
    with torch.cuda.device_of(streams):
        flat = streams.contiguous().flatten(1, 2)
        return _products(with_library).matmul(flat, weight, bias, transpose_b=True).unflatten(1, streams.shape[1:3])


def _linear_backward(grad, streams, weight, wanted, with_library):
    """Gradients of streams, weight and bias; None where not wanted."""
    wants_streams, wants_weight, wants_bias = wanted
    products = _products(with_library)
    grad, flat = grad.contiguous().flatten(1, 2), streams.contiguous().flatten(1, 2)
    grad_streams = grad_weight = grad_bias = None
    with torch.cuda.device_of(streams):
        if wants_streams:
            grad_streams = products.matmul(grad, weight).view(streams.shape)
        if wants_weight and weight.dim() == 2:
            total = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            products.summed_matmul(grad, flat, total)
            grad_weight = total.to(weight.dtype)
        elif wants_weight:
            grad_weight = products.matmul(grad, flat, transpose_a=True)
    if wants_bias:
        grad_bias = grad.sum((0, 1)) if weight.dim() == 2 else grad.sum(1)
    return grad_streams, grad_weight, grad_bias


def _products(with_library):
    return LIBRARY_PRODUCTS if with_library else PRODUCTS


def _given(grads, like):
    """An operator gives tensors only: an empty one for None."""
    return tuple(like.new_empty(0) if x is None else x for x in grads)


@torch.library.custom_op("layalign::layer_mix", mutates_args=())
def _mix_operator(weight: Tensor, bias: Tensor | None, states: list[Tensor]) -> Tensor:
    return _mix(weight, bias, states)


@_mix_operator.register_fake
def _(weight, bias, states):
    return states[0].new_empty(weight.shape[0], *states[0].shape)


@torch.library.custom_op("layalign::layer_mix_backward", mutates_args=())
def _mix_backward_operator(
    grad: Tensor, weight: Tensor, bias: Tensor | None, states: list[Tensor], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _given(_mix_backward(grad, weight, bias, states, wanted), weight)


@_mix_backward_operator.register_fake
def _(grad, weight, bias, states, wanted):
    shapes = (len(states), *states[0].shape), weight.shape, weight.shape[:1]
    return _given([weight.new_empty(x) if want else None for x, want in zip(shapes, wanted, strict=True)], weight)


@torch.library.custom_op("layalign::stream_linear", mutates_args=())
def _linear_operator(streams: Tensor, weight: Tensor, bias: Tensor | None, with_library: bool = False) -> Tensor:
    return _linear(streams, weight, bias, with_library)


@_linear_operator.register_fake
def _(streams, weight, bias, with_library=False):
    return streams.new_empty(*streams.shape[:3], weight.shape[-2])


@torch.library.custom_op("layalign::stream_linear_backward", mutates_args=())
def _linear_backward_operator(
    grad: Tensor, streams: Tensor, weight: Tensor, wanted: list[bool], with_library: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return _given(_linear_backward(grad, streams, weight, wanted, with_library), streams)


@_linear_backward_operator.register_fake
def _(grad, streams, weight, wanted, with_library=False):
    shapes = streams.shape, weight.shape, weight.shape[:-1]
    return _given([streams.new_empty(x) if want else None for x, want in zip(shapes, wanted, strict=True)], streams)
