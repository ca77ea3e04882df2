"""The published aligner's way to the cross keys and values, written anew: the encoder states are stacked and permuted for
one linear layer and a ReLU, permuted back for the shared projection, and each LLM layer projects two streams of its own."""

import torch
from torch.nn.functional import linear


def published_mix(hidden_states, weight, bias):
    """E states (B, T, De), weight (2L, E) -> streams (2L, B, T, De)."""
    states = torch.stack(list(hidden_states)).permute(1, 2, 3, 0)
    return torch.relu(linear(states, weight, bias)).permute(3, 0, 1, 2)


def published_cross_key_values(hidden_states, mix_weight, mix_bias, proj_weight, proj_bias, key_weights, value_weights):
    """Arguments of `cross_key_values` -> L keys and L values, each (B, T, kv)."""
    projected = linear(published_mix(hidden_states, mix_weight, mix_bias), proj_weight, proj_bias)
    keys = [linear(projected[2 * layer], weight) for layer, weight in enumerate(key_weights)]
    values = [linear(projected[2 * layer + 1], weight) for layer, weight in enumerate(value_weights)]
    return keys, values
