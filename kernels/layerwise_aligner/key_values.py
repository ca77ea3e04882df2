"""Cross keys and values of all LLM layers and their gradients, a few layers at a time, over a backend's products.

Stream 2i makes the keys of layer i and stream 2i + 1 its values, so that both are one product over 2L groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import first_gradients_only
from . import torch_backend
from .call import Call, flatten, flatten_gradients, items, unflatten
from .folding import augment, fold, fold_pays
from .projections import Folded, OneStep, Products, TwoSteps

PRODUCTS = {"torch": torch_backend.PRODUCTS}  # by backend
# Bytes of streams and what is made of them at a time. Every chunk of layers reads all encoder states again: where 4 layers are
# a chunk, the mix of 24 states into 64 streams reads and writes 2.9 times what it does in one.
WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}


class Plan(NamedTuple):
    """How one call goes: LLM layers at a time, and whether their weights are folded, forward and backward."""

    layers: int
    folded: bool
    folded_backward: bool


def plan(call: Call, folded: bool | None, layers_at_once: int | None) -> Plan:
    """The Plan of a call; `folded` and `layers_at_once` as `cross_key_values` takes them."""
    state, key_weight = call.hidden_states[0], call.key_weights[0]
    tokens, encoder_width = state.shape[:-1].numel(), state.shape[-1]
    kv_width, llm_width = key_weight.shape
    if call.proj_weight is None:
        forward_folded = backward_folded = False
    elif folded is None:
        sizes = (tokens, encoder_width, llm_width, kv_width)
        forward_folded, backward_folded = fold_pays(*sizes), fold_pays(*sizes, backward=True)
    else:
        forward_folded = backward_folded = folded
    layers = len(call.key_weights)
    if layers_at_once is None:
        besides = kv_width * encoder_width if forward_folded or backward_folded else tokens * llm_width
        bytes_of_layer = 2 * (2 * tokens * encoder_width + besides) * state.element_size()
        space = WORKSPACE["cpu" if state.device.type == "cpu" else "cuda"]
        chunks = -(-layers * bytes_of_layer // space)
        layers_at_once = -(-layers // max(1, min(chunks, layers)))
    return Plan(min(layers_at_once, layers), forward_folded, backward_folded)


def forward(products: Products, call: Call, plan: Plan) -> Tensor:
    """-> (L, 2, tokens, kv): keys and values of every layer."""
    state, key_weight = call.hidden_states[0], call.key_weights[0]
    states, projection = products.prepare(call.hidden_states), _projection(products, call, plan.folded)
    shape = 2 * len(call.key_weights), state.shape[:2].numel(), key_weight.shape[0]
    out = torch.empty(shape, dtype=state.dtype, device=state.device)
    for chunk in _chunks(call, plan):
        streams = products.mix(states, *_mix(call, chunk))
        projection.forward(streams, chunk, out[chunk])
    return out.unflatten(0, (-1, 2))


def fold_key_values(backend: str, call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The results of `fold_key_values` for a checked Call."""
    if backend == "torch":  # whose operators look after the device, and which torch.compile traces
        return _fold(PRODUCTS[backend], call)
    with torch.cuda.device_of(call.proj_weight):  # kernels start on the current device
        return _fold(PRODUCTS[backend], call)


def _fold(products, call):
    weights, biases = _interleaved(call)
    augmented = augment(call.proj_weight, call.proj_bias)
    weights, biases = fold(products, weights, biases, augmented, call.proj_weight.shape[1])
    return weights[0::2], weights[1::2], *((None, None) if biases is None else (biases[0::2], biases[1::2]))


def backward(products: Products, grad: Tensor, call: Call, plan: Plan, wanted: Call) -> Call:
    """Gradients of the Call from that of `forward`; None where `wanted` holds no True."""
    wants = Call(*(any(items(want)) for want in wanted))
    wants_mix = (wants.hidden_states, wants.mix_weight, wants.mix_bias)
    wants_proj = wants.proj_weight or wants.proj_bias
    wants_weights = wants.key_weights or wants.value_weights
    wants_biases = wants.key_biases or wants.value_biases
    states = products.prepare(call.hidden_states)
    projection = _projection(products, call, plan.folded_backward)
    grad = grad.contiguous().flatten(0, 1)
    grad_states = None
    of_mix: list[Any] = []
    grad_weights: list[Tensor] = []
    grad_biases: list[Tensor] = []
    chunks = list(_chunks(call, plan))
    # In fp32 where several add up.
    state_dtype = torch.float32 if len(chunks) > 1 else call.mix_weight.dtype
    for chunk in chunks:
        grads, mix = grad[chunk], _mix(call, chunk)
        streams = products.mix(states, *mix) if wants_proj or wants_weights else None
        grad_streams, of_weights = projection.backward(grads, streams, chunk, any(wants_mix), wants_proj, wants_weights)
        if wants_weights:
            grad_weights.extend(of_weights)
        if wants_biases:
            grad_biases.extend(grads.sum(1))
        if any(wants_mix):
            of_states, *of_parameters = products.mix_gradients(grad_streams, states, *mix, *wants_mix, state_dtype)
            of_mix.append(of_parameters)
            grad_states = of_states if grad_states is None else grad_states.add_(of_states)
    grad_mix_weight, grad_mix_bias = zip(*of_mix, strict=True) if of_mix else ((), ())
    gradients = Call(
        grad_states,
        torch.cat(grad_mix_weight) if wants.mix_weight else None,
        torch.cat(grad_mix_bias) if wants.mix_bias else None,
        projection.grad_proj_weight if wants.proj_weight else None,
        projection.grad_proj_bias if wants.proj_bias else None,
        grad_weights[0::2] if wants.key_weights else None,
        grad_weights[1::2] if wants.value_weights else None,
        grad_biases[0::2] if wants.key_biases else None,
        grad_biases[1::2] if wants.value_biases else None,
    )
    return Call(*(_as_given(gradient, argument) for gradient, argument in zip(gradients, call, strict=True)))


def _mix(call, chunk):
    """Weight and bias of the mix into the streams of `chunk`."""
    return call.mix_weight[chunk], None if call.mix_bias is None else call.mix_bias[chunk]


def _interleaved(call):
    """Weights of all streams (a list) and their biases (2L, kv) or None."""
    weights = [_rows(weight) for pair in zip(call.key_weights, call.value_weights, strict=True) for weight in pair]
    if call.key_biases is None and call.value_biases is None:
        return weights, None
    zeros = [weights[0].new_zeros(weights[0].shape[0])] * len(call.key_weights)
    given = (zeros if biases is None else biases for biases in (call.key_biases, call.value_biases))
    return weights, torch.stack([bias for pair in zip(*given, strict=True) for bias in pair])


def _projection(products, call, folded):
    weights, biases = _interleaved(call)
    if call.proj_weight is None:
        return OneStep(products, weights, biases)
    way = Folded if folded else TwoSteps
    return way(products, weights, biases, call.proj_weight, call.proj_bias)


def _chunks(call, plan):
    """Slices of the 2L streams."""
    layers = len(call.key_weights)
    for first in range(0, layers, plan.layers):
        yield slice(2 * first, 2 * min(first + plan.layers, layers))


def _rows(matrix):
    """With a unit last stride and rows that do not overlap."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _as_given(grad, argument):
    """In the dtype and form of its argument: a list for a sequence, one tensor otherwise."""
    if grad is None:
        return None
    if isinstance(argument, (list, tuple)):
        return [g.to(a.dtype).view_as(a) for g, a in zip(grad, argument, strict=True)]
    return (torch.stack(list(grad)) if isinstance(grad, (list, tuple)) else grad).to(argument.dtype).view_as(argument)


def cross_key_values(
    backend: str, call: Call, *, folded: bool | None = None, layers_at_once: int | None = None
) -> tuple[Tensor, ...]:
    """The results of `cross_key_values` for a checked Call."""
    counts, tensors = flatten(call)
    # Planned within: a plan hangs on the number of tokens, and made here it would tie a compiled graph to a range of these.
    out = _CrossKeyValues.apply(backend, folded, layers_at_once, counts, *tensors)
    return out.unflatten(2, call.hidden_states[0].shape[:2]).unbind(1)


class _CrossKeyValues(torch.autograd.Function):
    """Keys and values (L, 2, tokens, kv); saves its arguments only."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.options, tensors = arguments[:4], arguments[4:]
        ctx.save_for_backward(*tensors)
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        return run(list(tensors), *ctx.options)

    @staticmethod
    @first_gradients_only
    def backward(ctx, grad):
        run = _backward_operator if torch.compiler.is_compiling() else _backward
        wanted = list(ctx.needs_input_grad[4:])
        grads = run(grad, list(ctx.saved_tensors), *ctx.options, wanted)
        return *(None,) * 4, *(x if want else None for x, want in zip(grads, wanted, strict=True))


def _forward(tensors, backend, folded, layers_at_once, counts):
    call = unflatten(counts, tensors)
    with torch.cuda.device_of(_first(tensors)):  # kernels start on the current device
        return forward(PRODUCTS[backend], call, plan(call, folded, layers_at_once))


def _backward(grad, tensors, backend, folded, layers_at_once, counts, wanted):
    call, wanted = unflatten(counts, tensors), unflatten(counts, wanted)
    with torch.cuda.device_of(grad):
        grads = backward(PRODUCTS[backend], grad, call, plan(call, folded, layers_at_once), wanted)
    return flatten_gradients(counts, grads)


@torch.library.custom_op("layalign::cross_key_values", mutates_args=())
def _forward_operator(
    tensors: list[Tensor | None], backend: str, folded: bool | None, layers_at_once: int | None, counts: list[int]
) -> Tensor:
    return _forward(tensors, backend, folded, layers_at_once, counts)


@_forward_operator.register_fake
def _(tensors, backend, folded, layers_at_once, counts):
    call = unflatten(counts, tensors)
    state, keys = call.hidden_states[0], call.key_weights
    return state.new_empty(len(keys), 2, state.shape[0] * state.shape[1], keys[0].shape[0])


@torch.library.custom_op("layalign::cross_key_values_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    tensors: list[Tensor | None],
    backend: str,
    folded: bool | None,
    layers_at_once: int | None,
    counts: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    grads = _backward(grad, tensors, backend, folded, layers_at_once, counts, wanted)
    # Results of an operator may not share memory, and those of a list are parts of one tensor.
    pairs = zip(grads, wanted, strict=True)
    return [x.clone(memory_format=torch.contiguous_format) if want else grad.new_empty(0) for x, want in pairs]


@_backward_operator.register_fake
def _(grad, tensors, backend, folded, layers_at_once, counts, wanted):
    pairs = zip(tensors, wanted, strict=True)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else grad.new_empty(0) for x, want in pairs
    ]


def _first(tensors):
    return next(x for x in tensors if x is not None)
