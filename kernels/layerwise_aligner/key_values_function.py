"""`cross_key_values` in autograd and under torch.compile, for any backend's products."""

import torch
from torch import Tensor

from . import key_values as algorithm
from . import torch_backend

PRODUCTS = {"torch": torch_backend.PRODUCTS}  # by backend


def cross_key_values(backend, *arguments, folded=None, layers_at_once=None):
    """Arguments and results of `cross_key_values`, checked by it."""
    arguments = algorithm.Arguments(*arguments)
    counts, tensors = algorithm.flatten(arguments)
    out = _CrossKeyValues.apply(backend, *algorithm.plan(arguments, folded, layers_at_once), counts, *tensors)
    return out.unflatten(2, arguments.hidden_states[0].shape[:2]).unbind(1)


def fold_key_values(backend, *arguments):
    """Arguments and results of `fold_key_values`, checked by it."""
    return algorithm.fold_key_values(PRODUCTS[backend], *arguments)


class _CrossKeyValues(torch.autograd.Function):
    """Keys and values (L, 2, tokens, kv); saves its arguments only."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.options, tensors = arguments[:5], arguments[5:]
        ctx.save_for_backward(*tensors)
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        return run(list(tensors), *ctx.options)

    @staticmethod
    def backward(ctx, grad):
        run = _backward_operator if torch.compiler.is_compiling() else _backward
        wanted = list(ctx.needs_input_grad[5:])
        grads = run(grad, list(ctx.saved_tensors), *ctx.options, wanted)
        return *(None,) * 5, *(x if want else None for x, want in zip(grads, wanted, strict=True))


def _forward(tensors, backend, layers, folded, folded_backward, counts):
    plan = algorithm.Plan(layers, folded, folded_backward)
    with torch.cuda.device_of(_first(tensors)):  # kernels start on the current device
        return algorithm.forward(PRODUCTS[backend], algorithm.unflatten(counts, tensors), plan)


def _backward(grad, tensors, backend, layers, folded, folded_backward, counts, wanted):
    arguments, wanted = algorithm.unflatten(counts, tensors), algorithm.unflatten(counts, wanted)
    plan = algorithm.Plan(layers, folded, folded_backward)
    with torch.cuda.device_of(grad):
        grads = algorithm.backward(PRODUCTS[backend], grad, arguments, plan, wanted)
    return algorithm.flatten_gradients(counts, grads)


@torch.library.custom_op("layalign::cross_key_values", mutates_args=())
def _forward_operator(
    tensors: list[Tensor | None], backend: str, layers: int, folded: bool, folded_backward: bool, counts: list[int]
) -> Tensor:
    return _forward(tensors, backend, layers, folded, folded_backward, counts)


@_forward_operator.register_fake
def _(tensors, backend, layers, folded, folded_backward, counts):
    arguments = algorithm.unflatten(counts, tensors)
    state, keys = arguments.hidden_states[0], arguments.key_weights
    return state.new_empty(len(keys), 2, state.shape[0] * state.shape[1], keys[0].shape[0])


@torch.library.custom_op("layalign::cross_key_values_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    tensors: list[Tensor | None],
    backend: str,
    layers: int,
    folded: bool,
    folded_backward: bool,
    counts: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    grads = _backward(grad, tensors, backend, layers, folded, folded_backward, counts, wanted)
    # Results of an operator may not share memory, and those of a list are parts of one tensor.
    pairs = zip(grads, wanted, strict=True)
    return [x.clone(memory_format=torch.contiguous_format) if want else grad.new_empty(0) for x, want in pairs]


@_backward_operator.register_fake
def _(grad, tensors, backend, layers, folded, folded_backward, counts, wanted):
    pairs = zip(tensors, wanted, strict=True)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else grad.new_empty(0) for x, want in pairs
    ]


def _first(tensors):
    return next(x for x in tensors if x is not None)
