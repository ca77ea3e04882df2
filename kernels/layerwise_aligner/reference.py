"""The specification of the layer-wise aligner in plain PyTorch. Tests and benchmarks use it; no backend does.

upcast=True computes in fp64 and rounds the results once to the dtype of the inputs; upcast=False computes in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def layer_mix_reference(
    hidden_states: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, upcast: bool = True
) -> Tensor:
    """Arguments and result of `layer_mix`, unchecked."""
    dtype = weight.dtype
    hidden_states, weight, bias = _prepared(upcast, hidden_states, weight, bias)
    mixed = torch.einsum("je,ebtd->jbtd", weight, hidden_states)
    if bias is not None:
        mixed = mixed + bias[:, None, None, None]
    return torch.relu(mixed).to(dtype)


def stream_linear_reference(
    streams: Tensor, weight: Tensor, bias: Tensor | None = None, *, upcast: bool = True
) -> Tensor:
    """Arguments and result of `stream_linear`, unchecked."""
    dtype = streams.dtype
    streams, weight, bias = _prepared(upcast, streams, weight, bias)
    if weight.dim() == 2:
        weight = weight.expand(streams.shape[0], *weight.shape)
        bias = None if bias is None else bias.expand(streams.shape[0], *bias.shape)
    out = torch.einsum("jbti,joi->jbto", streams, weight)
    if bias is not None:
        out = out + bias[:, None, None]
    return out.to(dtype)


def cross_key_values_reference(
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
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `cross_key_values`, unchecked; `folded` and `layers_at_once` change the order of operations
    only, and are not followed."""
    dtype = mix_weight.dtype
    projection = _prepared(upcast, proj_weight, proj_bias)
    keys_projection = _prepared(upcast, key_weights, key_biases)
    values_projection = _prepared(upcast, value_weights, value_biases)
    streams = layer_mix_reference(*_prepared(upcast, hidden_states, mix_weight, mix_bias), upcast=False)
    if proj_weight is not None:
        streams = stream_linear_reference(streams, *projection, upcast=False)
    keys = stream_linear_reference(streams[0::2], *keys_projection, upcast=False)
    values = stream_linear_reference(streams[1::2], *values_projection, upcast=False)
    return keys.to(dtype), values.to(dtype)


def fold_key_values_reference(
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    key_weights: Tensor | Sequence[Tensor],
    value_weights: Tensor | Sequence[Tensor],
    key_biases: Tensor | Sequence[Tensor] | None = None,
    value_biases: Tensor | Sequence[Tensor] | None = None,
    *,
    upcast: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Arguments and results of `fold_key_values`, unchecked."""
    dtype = proj_weight.dtype
    prepared = _prepared(upcast, proj_weight, proj_bias, key_weights, value_weights, key_biases, value_biases)
    proj_weight, proj_bias, *projections = prepared
    weights, biases = projections[:2], projections[2:]
    biased = proj_bias is not None or any(bias is not None for bias in biases)
    folded = [weight @ proj_weight for weight in weights] + [None, None]
    for kind, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if biased:
            through = 0 if proj_bias is None else weight @ proj_bias
            own = 0 if bias is None else bias
            folded[2 + kind] = through + own + weight.new_zeros(weight.shape[:2])
    results: list[Any] = [x if x is None else x.to(dtype) for x in folded]
    return results[0], results[1], results[2], results[3]


def _prepared(upcast, *arguments):
    """Sequences become one tensor, everything fp64 where asked."""
    stacked = [torch.stack(list(x)) if isinstance(x, (list, tuple)) else x for x in arguments]
    return [x.double() if upcast and x is not None else x for x in stacked]
