"""Cross keys and values of all LLM layers and their gradients, a few layers at a time, over a backend's products.

Stream 2i makes the keys of layer i and stream 2i + 1 its values, so that both are one product over 2L groups.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch

from .folding import augment, fold, fold_pays
from .stream_projections import Folded, OneStep, TwoSteps

# Bytes of streams and what is made of them at a time. Every chunk of layers reads all encoder states again: where 4 layers are
# a chunk, the mix of 24 states into 64 streams reads and writes 2.9 times what it does in one.
WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}


class Products(NamedTuple):
    """What a backend brings; torch_backend.py says what they take and give."""

    prepare: Callable
    mix: Callable
    mix_gradients: Callable
    matmul: Callable
    summed_matmul: Callable


class Arguments(NamedTuple):
    """Those of `cross_key_values`: the tensors, what asks for gradients, or the gradients."""

    hidden_states: Any
    mix_weight: Any
    mix_bias: Any
    proj_weight: Any
    proj_bias: Any
    key_weights: Any
    value_weights: Any
    key_biases: Any
    value_biases: Any


class Plan(NamedTuple):
    """How one call goes: LLM layers at a time, and whether their weights are folded, forward and backward."""

    layers: int
    folded: bool
    folded_backward: bool


def flatten(arguments):
    """-> how many items each argument is a sequence of (-1 where it is one tensor), and all of them in one list."""
    counts = [len(argument) if isinstance(argument, (list, tuple)) else -1 for argument in arguments]
    return counts, [item for argument in arguments for item in _items(argument)]


def unflatten(counts, flat):
    """The Arguments that `flatten` took apart."""
    flat = iter(flat)
    return Arguments(*(next(flat) if count < 0 else list(islice(flat, count)) for count in counts))


def flatten_gradients(counts, grads):
    """One gradient, or None, for each tensor that `flatten` gave."""
    flat = []
    for count, grad in zip(counts, grads, strict=True):
        flat.extend([grad] if count < 0 else [None] * count if grad is None else grad)
    return flat


def plan(arguments, folded, layers_at_once):
    """The Plan of a call; `folded` and `layers_at_once` as `cross_key_values` takes them."""
    state, key_weight = arguments.hidden_states[0], arguments.key_weights[0]
    tokens, encoder_width = state.shape[:-1].numel(), state.shape[-1]
    kv_width, llm_width = key_weight.shape
    folded_backward = folded
    if arguments.proj_weight is None:
        folded = folded_backward = False
    elif folded is None:
        sizes = (tokens, encoder_width, llm_width, kv_width)
        folded, folded_backward = fold_pays(*sizes), fold_pays(*sizes, backward=True)
    layers = len(arguments.key_weights)
    if layers_at_once is None:
        besides = kv_width * encoder_width if folded or folded_backward else tokens * llm_width
        bytes_of_layer = 2 * (2 * tokens * encoder_width + besides) * state.element_size()
        space = WORKSPACE["cpu" if state.device.type == "cpu" else "cuda"]
        chunks = -(-layers * bytes_of_layer // space)
        layers_at_once = -(-layers // max(1, min(chunks, layers)))
    return Plan(min(layers_at_once, layers), folded, folded_backward)


def forward(products, arguments, plan):
    """-> (L, 2, tokens, kv): keys and values of every layer."""
    state, key_weight = arguments.hidden_states[0], arguments.key_weights[0]
    states, projection = products.prepare(arguments.hidden_states), _projection(products, arguments, plan.folded)
    shape = 2 * len(arguments.key_weights), state.shape[:2].numel(), key_weight.shape[0]
    out = torch.empty(shape, dtype=state.dtype, device=state.device)
    for chunk in _chunks(arguments, plan):
        streams = products.mix(states, *_mix(arguments, chunk))
        projection.forward(streams, chunk, out[chunk])
    return out.unflatten(0, (-1, 2))


def fold_key_values(products, proj_weight, proj_bias, *projections):
    """Arguments and results of `fold_key_values`."""
    weights, biases = _interleaved(*projections)
    weights, biases = fold(products, weights, biases, augment(proj_weight, proj_bias), proj_weight.shape[1])
    return weights[0::2], weights[1::2], *((None, None) if biases is None else (biases[0::2], biases[1::2]))


def backward(products, grad, arguments, plan, wanted):
    """Gradients of the Arguments from that of `forward`; None where `wanted` holds no True."""
    wants = Arguments(*(any(_items(want)) for want in wanted))
    wants_mix = (wants.hidden_states, wants.mix_weight, wants.mix_bias)
    wants_proj = wants.proj_weight or wants.proj_bias
    wants_weights = wants.key_weights or wants.value_weights
    wants_biases = wants.key_biases or wants.value_biases
    states = products.prepare(arguments.hidden_states)
    projection = _projection(products, arguments, plan.folded_backward)
    grad = grad.contiguous().flatten(0, 1)
    grad_states, of_mix, grad_weights, grad_biases = None, [], [], []
    for chunk in _chunks(arguments, plan):
        grads, mix = grad[chunk], _mix(arguments, chunk)
        streams = products.mix(states, *mix) if wants_proj or wants_weights else None
        grad_streams, of_weights = projection.backward(grads, streams, chunk, any(wants_mix), wants_proj, wants_weights)
        if wants_weights:
            grad_weights.extend(of_weights)
        if wants_biases:
            grad_biases.extend(grads.sum(1))
        if any(wants_mix):
            of_states, *of_parameters = products.mix_gradients(grad_streams, states, *mix, *wants_mix)
            of_mix.append(of_parameters)
            grad_states = of_states if grad_states is None else grad_states.add_(of_states)
    grad_mix_weight, grad_mix_bias = zip(*of_mix, strict=True) if of_mix else ((), ())
    gradients = Arguments(
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
    return Arguments(*(_as_given(gradient, argument) for gradient, argument in zip(gradients, arguments, strict=True)))


def _items(argument):
    return argument if isinstance(argument, (list, tuple)) else (argument,)


def _mix(arguments, chunk):
    """Weight and bias of the mix into the streams of `chunk`."""
    return arguments.mix_weight[chunk], None if arguments.mix_bias is None else arguments.mix_bias[chunk]


def _interleaved(key_weights, value_weights, key_biases, value_biases):
    """Weights of all streams (a list) and their biases (2L, kv) or None."""
    weights = [_rows(weight) for pair in zip(key_weights, value_weights, strict=True) for weight in pair]
    if key_biases is None and value_biases is None:
        return weights, None
    zeros = weights[0].new_zeros(weights[0].shape[0])
    given = ([zeros] * len(key_weights) if biases is None else biases for biases in (key_biases, value_biases))
    return weights, torch.stack([bias for pair in zip(*given, strict=True) for bias in pair])


def _projection(products, arguments, folded):
    weights, biases = _interleaved(*arguments[5:])
    if arguments.proj_weight is None:
        return OneStep(products, weights, biases)
    way = Folded if folded else TwoSteps
    return way(products, weights, biases, arguments.proj_weight, arguments.proj_bias)


def _chunks(arguments, plan):
    """Slices of the 2L streams."""
    layers = len(arguments.key_weights)
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
