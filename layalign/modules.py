"""The trained part: adapter, layer-wise aligner, gates."""

import torch
from torch import nn

from layalign.kernels.layerwise_aligner import cross_key_values, layer_mix, stream_linear


class Adapter(nn.Module):
    """Maps the encoder's last state (B, T, De) to soft prompt embeddings (B, T, Dl); holds the learned boundary embedding (Dl,)."""

    def __init__(self, kind, encoder_size, llm_size):
        super().__init__()
        if kind == "mlp":
            self.linear1 = nn.Linear(encoder_size, 2 * encoder_size)
            self.linear2 = nn.Linear(2 * encoder_size, llm_size)
        else:
            self.linear1 = None
            self.linear2 = nn.Linear(encoder_size, llm_size)
        self.boundary = nn.Parameter(torch.zeros(llm_size))

    def forward(self, state):
        state = state.to(self.linear2.weight.dtype)
        if self.linear1 is not None:
            state = torch.relu(self.linear1(state))
        return self.linear2(state)


class LayerwiseAligner(nn.Module):
    """Mixes E encoder states into 2L streams (keys and values of L LLM layers) and projects them to the LLM's width.

    Stream 2i feeds the keys of the i-th fused layer, stream 2i+1 its values. `mix` is (2L, E), `project` (Dl, De); kind "mlp" adds a
    ReLU and `project2` (Dl, Dl). The projection into each layer's keys and values uses the LLM's own frozen weights.
    """

    def __init__(self, kind, states, layers, encoder_size, llm_size, average=False):
        super().__init__()
        self.average = average
        self.mix = nn.Linear(1 if average else states, 2 * layers)
        self.project = nn.Linear(encoder_size, llm_size)
        self.project2 = nn.Linear(llm_size, llm_size) if kind == "mlp" else None

    def forward(self, states, projections, dtype, backend="auto"):
        """states: E tensors (B, T, De); projections: L KeyValueProjection. Returns keys and values (L, B, T, kv) in `dtype`."""
        if self.average:
            states = [torch.stack([state.float() for state in states]).mean(0)]
        states = [state.to(dtype) for state in states]
        mix_weight, mix_bias = self.mix.weight.to(dtype), self.mix.bias.to(dtype)
        weight, bias = self.project.weight.to(dtype), self.project.bias.to(dtype)
        if self.project2 is None and all(projection.is_plain for projection in projections):
            return cross_key_values(
                states,
                mix_weight,
                mix_bias,
                weight,
                bias,
                [projection.key_weight.to(dtype) for projection in projections],
                [projection.value_weight.to(dtype) for projection in projections],
                _biases([projection.key_bias for projection in projections], dtype),
                _biases([projection.value_bias for projection in projections], dtype),
                backend=backend,
            )
        streams = stream_linear(layer_mix(states, mix_weight, mix_bias, backend=backend), weight, bias, backend=backend)
        if self.project2 is not None:
            second = self.project2
            streams = stream_linear(
                torch.relu(streams), second.weight.to(dtype), second.bias.to(dtype), backend=backend
            )
        keys = [projection.key(streams[2 * i]) for i, projection in enumerate(projections)]
        values = [projection.value(streams[2 * i + 1]) for i, projection in enumerate(projections)]
        return torch.stack(keys).to(dtype), torch.stack(values).to(dtype)


def _biases(biases, dtype):
    return None if biases[0] is None else [bias.to(dtype) for bias in biases]


class Gate(nn.Module):
    """The gate of one LLM layer, 0 at the start so that training begins at the bare LLM; it lives on the layer's attention module."""

    def __init__(self, kind, heads, llm_size):
        super().__init__()
        self.kind = kind
        if kind == "dynamic":
            self.linear = nn.Linear(llm_size, 1)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            self.value = nn.Parameter(torch.zeros(heads if kind == "head" else 1))

    def forward(self, hidden_states):
        """hidden_states (B, S, Dl) -> (1,), (Hq,) or (B, 1, S), as `adaptive_fusion_attention` takes gates."""
        if self.kind != "dynamic":
            return self.value
        return self.linear(hidden_states.to(self.linear.weight.dtype)).transpose(1, 2)
