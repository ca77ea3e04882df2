"""The published aligner's way to the cross keys and values, written anew: the encoder states are stacked and permuted for
one linear layer and a ReLU, permuted back for the shared projection, and each LLM layer projects two streams of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.peers import everywhere


class KeyValues(NamedTuple):
    """L tensors (B, T, kv) each."""

    keys: list[Tensor]
    values: list[Tensor]


def mix(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """E states (B, T, De), weight (2L, E), bias (2L,) -> streams (2L, B, T, De)."""
    states = torch.stack(list(hidden_states)).permute(1, 2, 3, 0)
    return torch.relu(linear(states, weight, bias)).permute(3, 0, 1, 2)


def cross_key_values(
    hidden_states: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
) -> KeyValues:
    """Arguments of `layalign.cross_key_values`."""
    projected = linear(mix(hidden_states, mix_weight, mix_bias), proj_weight, proj_bias)
    keys = [linear(projected[2 * layer], weight) for layer, weight in enumerate(key_weights)]
    values = [linear(projected[2 * layer + 1], weight) for layer, weight in enumerate(value_weights)]
    return KeyValues(keys, values)


PEERS = {
    "layer_mix": {"published": everywhere(mix)},
    "cross_key_values": {"published": everywhere(cross_key_values)},
}
