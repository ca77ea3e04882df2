"""The checks of the layer-wise aligner's operators, in the order of their arguments."""

import torch

from ..dispatch import check_tensors, malformed


def check_layer_mix(hidden_states, weight, bias, *, backend):
    layers, _ = _check_hidden_states(hidden_states)
    check_tensors(backend, {**_named("hidden_states", hidden_states), "weight": weight}, {"bias": bias})
    _check_shape("weight", weight, (None, layers), f"(J, {layers}), one column for each of the hidden states")
    _check_optional("bias", bias, (weight.shape[0],))


def check_stream_linear(streams, weight, bias, *, backend):
    check_tensors(backend, {"streams": streams, "weight": weight}, {"bias": bias})
    _check_shape("streams", streams, (None, None, None, None), "(J, B, T, De)")
    count, width = streams.shape[0], streams.shape[3]
    if weight.dim() == 2:
        _check_shape("weight", weight, (None, width), f"(Do, {width}) or ({count}, Do, {width})")
        _check_optional("bias", bias, (weight.shape[0],))
    else:
        _check_shape("weight", weight, (count, None, width), f"(Do, {width}) or ({count}, Do, {width})")
        _check_optional("bias", bias, (count, weight.shape[1]))


def check_cross_key_values(
    hidden_states,
    mix_weight,
    mix_bias,
    proj_weight,
    proj_bias,
    key_weights,
    value_weights,
    key_biases,
    value_biases,
    *,
    backend,
):
    layers, shape = _check_hidden_states(hidden_states)
    required = {**_named("hidden_states", hidden_states), "mix_weight": mix_weight}
    biases = {"mix_bias": mix_bias, "proj_weight": proj_weight, "proj_bias": proj_bias}
    _check_tensors(backend, required, biases, key_weights, value_weights, key_biases, value_biases)
    llm_layers = _count("key_weights", key_weights)
    streams = 2 * llm_layers
    takes = f"({streams}, {layers}), two streams for each of key_weights"
    _check_shape("mix_weight", mix_weight, (streams, layers), takes)
    _check_optional("mix_bias", mix_bias, (streams,))
    width = shape[2]
    if proj_weight is not None:
        width = _check_projection(proj_weight, proj_bias, width)
    elif proj_bias is not None:
        raise malformed("proj_bias", "a tensor", "None where proj_weight is None")
    _check_key_values(width, key_weights, value_weights, key_biases, value_biases)


def check_fold_key_values(proj_weight, proj_bias, key_weights, value_weights, key_biases, value_biases, *, backend):
    required = {"proj_weight": proj_weight}
    _check_tensors(backend, required, {"proj_bias": proj_bias}, key_weights, value_weights, key_biases, value_biases)
    width = _check_projection(proj_weight, proj_bias, None)
    _check_key_values(width, key_weights, value_weights, key_biases, value_biases)


def _check_tensors(backend, required, optional, key_weights, value_weights, key_biases, value_biases):
    required = {**required, **_named("key_weights", key_weights), **_named("value_weights", value_weights)}
    for name, items in (("key_biases", key_biases), ("value_biases", value_biases)):
        optional.update(_named(name, items))
    check_tensors(backend, required, optional)


def _check_projection(proj_weight, proj_bias, encoder_width):
    """-> Dl."""
    _check_shape("proj_weight", proj_weight, (None, encoder_width), f"(Dl, {encoder_width or 'De'})")
    _check_optional("proj_bias", proj_bias, (proj_weight.shape[0],))
    return proj_weight.shape[0]


def _check_key_values(width, key_weights, value_weights, key_biases, value_biases):
    layers = _count("key_weights", key_weights)
    kv_width = key_weights[0].shape[0] if key_weights[0].dim() == 2 else None
    for name, weights in (("key_weights", key_weights), ("value_weights", value_weights)):
        _check_each(name, weights, layers, (kv_width, width), f"(kv, {width}), one kv for all")
    for name, biases in (("key_biases", key_biases), ("value_biases", value_biases)):
        if biases is not None:
            _check_each(name, biases, layers, (kv_width,), f"({kv_width},)")


def _check_hidden_states(hidden_states):
    """-> number of layers, (B, T, De)."""
    layers = _count("hidden_states", hidden_states)
    if isinstance(hidden_states, torch.Tensor):
        _check_shape("hidden_states", hidden_states, (None,) * 4, "a sequence of (B, T, De), or one (E, B, T, De)")
        return layers, tuple(hidden_states.shape[1:])
    first = hidden_states[0]
    if not isinstance(first, torch.Tensor) or first.dim() != 3:
        got = f"first item of shape {tuple(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise malformed("hidden_states", got, "a sequence of (B, T, De), or one (E, B, T, De)")
    _check_each("hidden_states", hidden_states, layers, tuple(first.shape), "one shape (B, T, De) for all")
    return layers, tuple(first.shape)


def _count(name, items):
    if not isinstance(items, (list, tuple, torch.Tensor)):
        raise malformed(name, type(items).__name__, "a list, a tuple or one stacked tensor")
    if isinstance(items, torch.Tensor) and items.dim() == 0:
        raise malformed(name, "shape ()", "a list, a tuple or one stacked tensor")
    if len(items) == 0:
        raise malformed(name, "no layers", "at least one")
    return len(items)


def _named(name, items):
    if isinstance(items, (list, tuple)):
        return {f"{name}[{index}]": item for index, item in enumerate(items)}
    return {name: items}


def _check_shape(name, tensor, shape, takes):
    """`shape` holds None where any size will do."""
    if tensor.dim() != len(shape) or any(
        want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    ):
        raise malformed(name, f"shape {tuple(tensor.shape)}", takes)


def _check_optional(name, tensor, shape):
    if tensor is not None:
        _check_shape(name, tensor, shape, f"{shape} or None")


def _check_each(name, items, count, shape, takes):
    if isinstance(items, torch.Tensor):
        _check_shape(name, items, (count, *shape), f"{count} x {takes}")
        return
    if _count(name, items) != count:
        raise malformed(name, f"{len(items)} tensors", f"{count}")
    for index, item in enumerate(items):
        if not isinstance(item, torch.Tensor):
            raise malformed(f"{name}[{index}]", type(item).__name__, "a tensor")
        _check_shape(f"{name}[{index}]", item, shape, takes)
