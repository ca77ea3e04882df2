"""The layer-wise aligner (LayAlign, arXiv 2502.11405, equations 2 and 3): from all encoder layers to the cross keys and
values of all LLM layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocast_dtype, cast_for_autocast, choose_backend, malformed
from . import key_values, torch_backend
from .call import Call, check_cross_key_values, check_fold_key_values, check_layer_mix, check_stream_linear
from .folding import fold_pays
from .reference import (
    cross_key_values_reference,
    fold_key_values_reference,
    layer_mix_reference,
    stream_linear_reference,
)

__all__ = [
    "cross_key_values",
    "cross_key_values_reference",
    "fold_key_values",
    "fold_key_values_reference",
    "fold_pays",
    "layer_mix",
    "layer_mix_reference",
    "stream_linear",
    "stream_linear_reference",
]

# Name -> function of checked arguments; of `cross_key_values` and `fold_key_values`, of a Call.
_LAYER_MIX: dict[str, Callable[..., Any]] = {"torch": torch_backend.layer_mix, "reference": layer_mix_reference}
_STREAM_LINEAR: dict[str, Callable[..., Any]] = {
    "torch": torch_backend.stream_linear,
    "reference": stream_linear_reference,
}
if find_spec("triton"):  # there are systems without
    from .gpu import operator

    _LAYER_MIX["triton"] = operator.layer_mix
    _STREAM_LINEAR["triton"] = operator.stream_linear
    key_values.PRODUCTS["triton"] = operator.PRODUCTS
    # What "auto" takes where it chooses Triton: its kernels, and the library for the products that it does better.
    _STREAM_LINEAR["auto"] = partial(operator.stream_linear, with_library=True)
    key_values.PRODUCTS["auto"] = operator.LIBRARY_PRODUCTS
_CROSS_KEY_VALUES: dict[str, Callable[..., Any]] = {
    name: partial(key_values.cross_key_values, name) for name in key_values.PRODUCTS
}
_CROSS_KEY_VALUES["reference"] = lambda call, **options: cross_key_values_reference(*call, **options)
_FOLD_KEY_VALUES: dict[str, Callable[..., Any]] = {
    name: partial(key_values.fold_key_values, name) for name in key_values.PRODUCTS
}
_FOLD_KEY_VALUES["reference"] = lambda call: fold_key_values_reference(*call[3:])


def layer_mix(
    hidden_states: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """relu(sum_e weight[j, e] hidden_states[e] + bias[j]) for all streams j.

    Args:
        hidden_states: sequence of E tensors (B, T, De), or one (E, B, T, De), in fp32, fp16 or bf16.
        weight: (J, E). bias: (J,) or None. All of one dtype.
        backend: as `cross_key_values` takes it.

    Returns:
        (J, B, T, De). Gradients for weight, bias and the hidden states, where asked.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    return _run("layer_mix", _LAYER_MIX, check_layer_mix, (hidden_states, weight, bias), hidden_states, backend)


def stream_linear(streams: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """streams[j] @ weight[j]^T + bias[j] for all streams j.

    Args:
        streams: (J, B, T, De) in fp32, fp16 or bf16.
        weight: (Do, De) shared by the streams, or (J, Do, De).
        bias: (Do,) with a shared weight, (J, Do) otherwise, or None. All of one dtype.
        backend: as `cross_key_values` takes it.

    Returns:
        (J, B, T, Do). Gradients for weight, bias and streams, where asked.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    return _run("stream_linear", _STREAM_LINEAR, check_stream_linear, (streams, weight, bias), streams, backend)


def cross_key_values(
    hidden_states: Tensor | Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor | None,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    key_weights: Tensor | Sequence[Tensor],
    value_weights: Tensor | Sequence[Tensor],
    key_biases: Tensor | Sequence[Tensor] | None = None,
    value_biases: Tensor | Sequence[Tensor] | None = None,
    *,
    folded: bool | None = None,
    layers_at_once: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross keys and values of all L LLM layers.

    layer_mix into 2L streams, the shared projection, then each layer's own key projection of stream 2i and value
    projection of stream 2i + 1.

    Args:
        hidden_states: sequence of E tensors (B, T, De), or one (E, B, T, De), in fp32, fp16 or bf16.
        mix_weight: (2L, E). mix_bias: (2L,) or None.
        proj_weight: (Dl, De). proj_bias: (Dl,) or None. Both None: the key and value weights are (kv, De) and hold the
            projection already, as `fold_key_values` makes them.
        key_weights, value_weights: sequences of L tensors (kv, Dl), or one (L, kv, Dl).
        key_biases, value_biases: sequences of L tensors (kv,), one (L, kv), or None. All of one dtype.
        folded: multiply proj_weight into the key and value weights first (in fp32, rounded once); None does so where
            that takes fewer operations for B * T tokens, see `fold_pays`.
        layers_at_once: LLM layers worked on together. None: as many as keep their streams and folded weights within 1 GiB
            on a GPU, 64 MiB on a CPU. Apart from the results, memory grows with this and not with L.
        backend: "auto", "triton", "torch" or "reference". "auto" is "torch" but on the GPUs that Triton covers. There it is
            "triton", save that in half precision products of one tensor, or one stack, on either side are cuBLAS's. The
            same call gives the same bits; with "triton" those of a token do not depend on how many others there are, either.

    Returns:
        (keys, values), each (L, B, T, kv), side by side in one buffer. Gradients for everything that asks for one, and
        second ones by "reference" alone (a RuntimeError elsewhere). Only the arguments are kept for the backward pass; the mixed
        streams are computed again.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    projections = (proj_weight, proj_bias, key_weights, value_weights, key_biases, value_biases)
    call = Call(hidden_states, mix_weight, mix_bias, *projections)
    if folded not in (None, True, False):
        raise malformed("folded", repr(folded), "True, False or None")
    if layers_at_once is not None and (not isinstance(layers_at_once, int) or layers_at_once < 1):
        raise malformed("layers_at_once", repr(layers_at_once), "a positive int or None")
    options = dict(folded=folded, layers_at_once=layers_at_once)
    return _run("cross_key_values", _CROSS_KEY_VALUES, check_cross_key_values, call, hidden_states, backend, **options)


@torch.no_grad()
def fold_key_values(
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    key_weights: Tensor | Sequence[Tensor],
    value_weights: Tensor | Sequence[Tensor],
    key_biases: Tensor | Sequence[Tensor] | None = None,
    value_biases: Tensor | Sequence[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Key and value weights and biases that hold the projection, for many calls of `cross_key_values` without one.

    Args:
        As `cross_key_values` takes them.

    Returns:
        (key_weights, value_weights) (L, kv, De), accumulated in fp32 and rounded once, with a last stride of 1, and
        (key_biases, value_biases) (L, kv), or None where nothing brings one. They carry no gradients.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    call = Call(None, None, None, proj_weight, proj_bias, key_weights, value_weights, key_biases, value_biases)
    return _run("fold_key_values", _FOLD_KEY_VALUES, check_fold_key_values, call, proj_weight, backend)


def _run(operator, backends, check, arguments, where, backend, **options):
    """arguments: a Call, or the few of another operator; where: the tensor, or list of them, that says where it runs."""
    first = next(iter(where), None) if isinstance(where, (list, tuple)) else where
    if isinstance(first, torch.Tensor) and (dtype := autocast_dtype(first)) is not None:
        arguments = _cast(arguments, dtype)
        with torch.autocast(first.device.type, enabled=False):
            return _run_on(first, operator, backends, check, arguments, backend, **options)
    return _run_on(first, operator, backends, check, arguments, backend, **options)


def _run_on(first, operator, backends, check, arguments, backend, **options):
    name = choose_backend(backend, tuple(backends), operator, first)
    given = (arguments,) if isinstance(arguments, Call) else arguments
    check(*given, backend=name)
    if backend == "auto" and name == "triton":
        name = "auto" if "auto" in backends else name
    return backends[name](*given, **options)


def _cast(arguments, dtype):
    cast = [
        [cast_for_autocast(item, dtype) for item in argument]
        if isinstance(argument, (list, tuple))
        else cast_for_autocast(argument, dtype)
        for argument in arguments
    ]
    return Call(*cast) if isinstance(arguments, Call) else cast
