"""A call of `cross_key_values` as one object, its flat form for torch.library, and the checks of the aligner's operators."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import check_tensors, malformed


class Call(NamedTuple):
    """The tensors of `cross_key_values` as it documents them; what of them asks for gradients; or the gradients.

    Of `fold_key_values` all but the hidden states and the mix, which are None.
    """

    hidden_states: Any
    mix_weight: Any
    mix_bias: Any
    proj_weight: Any
    proj_bias: Any
    key_weights: Any
    value_weights: Any
    key_biases: Any = None
    value_biases: Any = None


def items(argument: Any) -> Any:
    """The tensors of an argument that is one tensor, None, or a sequence."""
    return argument if isinstance(argument, (list, tuple)) else (argument,)


def flatten(call: Call) -> tuple[list[int], list[Tensor | None]]:
    """-> how many items each field is a sequence of (-1 where it is one tensor), and all of them in one list."""
    counts = [len(field) if isinstance(field, (list, tuple)) else -1 for field in call]
    return counts, [item for field in call for item in items(field)]


def unflatten(counts: list[int], flat: Any) -> Call:
    """The Call that `flatten` took apart."""
    flat = iter(flat)
    return Call(*(next(flat) if count < 0 else list(islice(flat, count)) for count in counts))


def flatten_gradients(counts: list[int], grads: Call) -> list[Tensor | None]:
    """One gradient, or None, for each tensor that `flatten` gave."""
    flat: list[Tensor | None] = []
    for count, grad in zip(counts, grads, strict=True):
        flat.extend([grad] if count < 0 else [None] * count if grad is None else grad)
    return flat


def check_layer_mix(hidden_states: Any, weight: Any, bias: Any, *, backend: str) -> None:
    """Raises ValueError for what is wrong with a call of `layer_mix`."""
    layers, _ = _check_hidden_states(hidden_states)
    check_tensors(backend, {**_named("hidden_states", hidden_states), "weight": weight}, {"bias": bias})
    _check_shape("weight", weight, (None, layers), f"(J, {layers}), one column for each of the hidden states")
    _check_optional("bias", bias, (weight.shape[0],))


def check_stream_linear(streams: Any, weight: Any, bias: Any, *, backend: str) -> None:
    """Raises ValueError for what is wrong with a call of `stream_linear`."""
    check_tensors(backend, {"streams": streams, "weight": weight}, {"bias": bias})
    _check_shape("streams", streams, (None, None, None, None), "(J, B, T, De)")
    count, width = streams.shape[0], streams.shape[3]
    if weight.dim() == 2:
        _check_shape("weight", weight, (None, width), f"(Do, {width}) or ({count}, Do, {width})")
        _check_optional("bias", bias, (weight.shape[0],))
    else:
        _check_shape("weight", weight, (count, None, width), f"(Do, {width}) or ({count}, Do, {width})")
        _check_optional("bias", bias, (count, weight.shape[1]))


def check_cross_key_values(call: Call, *, backend: str) -> None:
    """Raises ValueError for what is wrong with a call of `cross_key_values`."""
    layers, shape = _check_hidden_states(call.hidden_states)
    required = {**_named("hidden_states", call.hidden_states), "mix_weight": call.mix_weight}
    _check_tensors(call, backend, required, ("mix_bias", "proj_weight", "proj_bias"))
    streams = 2 * _count("key_weights", call.key_weights)
    takes = f"({streams}, {layers}), two streams for each of key_weights"
    _check_shape("mix_weight", call.mix_weight, (streams, layers), takes)
    _check_optional("mix_bias", call.mix_bias, (streams,))
    width = shape[2]
    if call.proj_weight is not None:
        width = _check_projection(call, width)
    elif call.proj_bias is not None:
        raise malformed("proj_bias", "a tensor", "None where proj_weight is None")
    _check_key_values(call, width)


def check_fold_key_values(call: Call, *, backend: str) -> None:
    """Raises ValueError for what is wrong with a call of `fold_key_values`."""
    _check_tensors(call, backend, {"proj_weight": call.proj_weight}, ("proj_bias",))
    _check_key_values(call, _check_projection(call, None))


def _check_tensors(call, backend, required, optional):
    """required: {name: tensor}, optional: names of fields, both before those of the layers."""
    required = {**required, **_named("key_weights", call.key_weights), **_named("value_weights", call.value_weights)}
    given = {name: getattr(call, name) for name in optional}
    for name in ("key_biases", "value_biases"):
        given.update(_named(name, getattr(call, name)))
    check_tensors(backend, required, given)


def _check_projection(call, encoder_width):
    """-> Dl."""
    weight = call.proj_weight
    _check_shape("proj_weight", weight, (None, encoder_width), f"(Dl, {encoder_width or 'De'})")
    _check_optional("proj_bias", call.proj_bias, (weight.shape[0],))
    return weight.shape[0]


def _check_key_values(call, width):
    layers, first = _count("key_weights", call.key_weights), call.key_weights[0]
    kv_width = first.shape[0] if first.dim() == 2 else None
    for name in ("key_weights", "value_weights"):
        _check_each(name, getattr(call, name), layers, (kv_width, width), f"(kv, {width}), one kv for all")
    for name in ("key_biases", "value_biases"):
        if (biases := getattr(call, name)) is not None:
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
