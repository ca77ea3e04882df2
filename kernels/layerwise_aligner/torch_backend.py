"""The layer-wise aligner as PyTorch matrix products; `cross_key_values` keeps only its arguments for backward."""

from itertools import islice

import torch
from torch.nn.functional import linear

from .folding import fold_pays, fold_projection


def layer_mix(hidden_states, weight, bias=None):
    """Arguments and result of `layer_mix`, checked by it."""
    hidden_states = _stacked(hidden_states)
    flat = hidden_states.flatten(1)
    mixed = weight @ flat if bias is None else torch.addmm(bias[:, None], weight, flat)
    return torch.relu_(mixed).view(weight.shape[0], *hidden_states.shape[1:])


def stream_linear(streams, weight, bias=None):
    """Arguments and result of `stream_linear`, checked by it."""
    if weight.dim() == 2:
        return linear(streams, weight, bias)
    flat = streams.flatten(1, 2)
    if bias is None:
        out = torch.bmm(flat, weight.transpose(1, 2))
    else:
        out = torch.baddbmm(bias[:, None], flat, weight.transpose(1, 2))
    return out.view(*streams.shape[:3], weight.shape[1])


def cross_key_values(
    hidden_states,
    mix_weight,
    mix_bias,
    proj_weight,
    proj_bias,
    key_weights,
    value_weights,
    key_biases=None,
    value_biases=None,
    *,
    folded=None,
):
    """Arguments and results of `cross_key_values`, checked by it."""
    arguments = (
        hidden_states,
        mix_weight,
        mix_bias,
        proj_weight,
        proj_bias,
        key_weights,
        value_weights,
        key_biases,
        value_biases,
    )
    batch, length = hidden_states[0].shape[:2]
    if folded is None:
        kv_width, llm_width = key_weights[0].shape
        folded = fold_pays(batch * length, proj_weight.shape[1], llm_width, kv_width)
    counts = tuple(len(argument) if isinstance(argument, (list, tuple)) else None for argument in arguments)
    tensors = [tensor for argument in arguments for tensor in _items(argument)]
    keys, values = _CrossKeyValues.apply(folded, counts, *tensors)
    return keys.unflatten(1, (batch, length)), values.unflatten(1, (batch, length))


class _CrossKeyValues(torch.autograd.Function):
    """Keys and values, each (L, B * T, kv)."""

    @staticmethod
    def forward(ctx, folded, counts, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.counts = counts
        hidden_states, mix_weight, mix_bias, proj_weight, proj_bias, *projections = _grouped(counts, tensors)
        key_weights, value_weights, key_biases, value_biases = projections
        streams = layer_mix(hidden_states, mix_weight, mix_bias).flatten(1, 2)
        outputs = []
        for kind, (weights, biases) in enumerate(((key_weights, key_biases), (value_weights, value_biases))):
            output = streams.new_empty(len(weights), streams.shape[1], weights[0].shape[0])
            for layer, weight in enumerate(weights):
                stream, bias = streams[2 * layer + kind], None if biases is None else biases[layer]
                if folded:
                    weight, bias = fold_projection(weight, bias, proj_weight, proj_bias)
                else:
                    stream = linear(stream, proj_weight, proj_bias)
                output[layer] = linear(stream, weight, bias)
            outputs.append(output)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        """In the folded form, whichever the forward took: a training batch has tokens enough for it to pay."""
        hidden_states, mix_weight, mix_bias, proj_weight, proj_bias, *projections = _grouped(
            ctx.counts, ctx.saved_tensors
        )
        wanted = _grouped(ctx.counts, ctx.needs_input_grad[2:])
        wants_states, wants_mix, wants_mix_bias, wants_proj, wants_proj_bias, *wants_projections = map(_any, wanted)
        hidden_states = _stacked(hidden_states)
        streams = layer_mix(hidden_states, mix_weight, mix_bias).flatten(1, 2)
        grad_streams = torch.empty_like(streams) if wants_states or wants_mix or wants_mix_bias else None
        # Summed over the streams in fp32, whatever the dtype of the weights.
        grad_proj = torch.zeros_like(proj_weight, dtype=torch.float32) if wants_proj else None
        grad_proj_bias = torch.zeros_like(proj_bias, dtype=torch.float32) if wants_proj_bias else None
        grad_projections = [[], [], [], []]

        for kind, grad_output in enumerate(grad_outputs):
            wants_weight, wants_bias = wants_projections[kind], wants_projections[kind + 2]
            for layer, weight in enumerate(projections[kind]):
                stream, grad = streams[2 * layer + kind], grad_output[layer]
                if wants_proj or wants_weight:
                    grad_folded = grad.T @ stream
                if wants_proj_bias or wants_bias or wants_weight:
                    grad_sum = grad.sum(dim=0)
                if wants_proj:
                    grad_proj += weight.T @ grad_folded
                if wants_proj_bias:
                    grad_proj_bias += weight.T @ grad_sum
                if wants_weight:
                    grad_weight = grad_folded @ proj_weight.T
                    if proj_bias is not None:
                        grad_weight += torch.outer(grad_sum, proj_bias)
                    grad_projections[kind].append(grad_weight)
                if wants_bias:
                    grad_projections[kind + 2].append(grad_sum)
                if grad_streams is not None:
                    folded_weight, _ = fold_projection(weight, None, proj_weight, None)
                    grad_streams[2 * layer + kind] = (grad @ folded_weight) * (stream > 0)

        grad_states = grad_mix = grad_mix_bias = None
        if wants_states:
            grad_states = torch.einsum("je,jnd->end", mix_weight, grad_streams).view_as(hidden_states)
        if wants_mix:
            grad_mix = grad_streams.flatten(1) @ hidden_states.flatten(1).T
        if wants_mix_bias:
            grad_mix_bias = grad_streams.sum(dim=(1, 2))
        grad_arguments = (
            grad_states,
            grad_mix,
            grad_mix_bias,
            _like(grad_proj, proj_weight),
            _like(grad_proj_bias, proj_bias),
        )
        grads = [*grad_arguments, *(grads if grads else None for grads in grad_projections)]
        return None, None, *_ungrouped(ctx.counts, grads)


def _items(argument):
    return argument if isinstance(argument, (list, tuple)) else (argument,)


def _grouped(counts, flat):
    """The arguments again: a list of `count` items, or one item where count is None."""
    items = iter(flat)
    return [next(items) if count is None else list(islice(items, count)) for count in counts]


def _ungrouped(counts, arguments):
    """One gradient for each tensor: a list for a sequence, one tensor for a stacked argument, or None for all of it."""
    flat = []
    for count, argument in zip(counts, arguments, strict=True):
        if count is not None:
            flat.extend([None] * count if argument is None else argument)
        else:
            flat.append(_stacked(argument))
    return flat


def _any(wanted):
    return any(_items(wanted))


def _like(grad, parameter):
    return None if grad is None else grad.to(parameter.dtype)


def _stacked(items):
    return torch.stack(list(items)) if isinstance(items, (list, tuple)) else items
