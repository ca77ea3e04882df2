"""The trained part: adapter, layer-wise aligner, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from layalign.kernels.layerwise_aligner import cross_key_values, fold_key_values, layer_mix, stream_linear
from layalign.projections import KeyValueProjection


class Adapter(nn.Module):
    """Maps the encoder's last state (B, T, De) to soft prompt embeddings (B, T, Dl); holds the learned boundary embedding (Dl,).

    Args:
        kind: "mlp", "gelu" or "linear", as in LayAlignConfig.
        encoder_size, llm_size: De and Dl.
    """

    def __init__(self, kind: str, encoder_size: int, llm_size: int):
        super().__init__()
        inner = 2 * encoder_size
        self.linear1 = None if kind == "linear" else nn.Linear(encoder_size, inner)
        self._activation = torch.nn.functional.gelu if kind == "gelu" else torch.relu
        self.linear2 = nn.Linear(encoder_size if self.linear1 is None else inner, llm_size)
        self.boundary = nn.Parameter(torch.zeros(llm_size))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """The encoder's last state (B, T, De) -> (B, T, Dl), in the adapter's dtype."""
        state = state.to(self.linear2.weight.dtype)
        if self.linear1 is not None:
            state = self._activation(self.linear1(state))
        return self.linear2(state)


class LayerwiseAligner(nn.Module):
    """Mixes E encoder states into 2L streams (keys and values of L LLM layers) and projects them to the LLM's width.

    Stream 2i feeds the keys of the i-th fused layer, stream 2i+1 its values. `mix` is (2L, E), `project` (Dl, De); kind "mlp" adds a
    ReLU and `project2` (Dl, Dl). The projection into each layer's keys and values uses the LLM's own frozen weights.

    Args:
        kind: "linear" or "mlp", as in LayAlignConfig.
        states, layers: E and L.
        encoder_size, llm_size: De and Dl.
        average: mix the mean of the E states instead of these.
    """

    def __init__(self, kind: str, states: int, layers: int, encoder_size: int, llm_size: int, average: bool = False):
        super().__init__()
        self.average = average
        self.mix = nn.Linear(1 if average else states, 2 * layers)
        self.project = nn.Linear(encoder_size, llm_size)
        self.project2 = nn.Linear(llm_size, llm_size) if kind == "mlp" else None
        self._kept: FoldedWeights | None = None

    def forward(
        self,
        states: Sequence[torch.Tensor],
        projections: Sequence[KeyValueProjection],
        dtype: torch.dtype,
        backend: str = "auto",
        fold: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (L, B, T, kv) in `dtype`, which may be strided.

        Args:
            states: E tensors (B, T, De).
            projections: those of the L layers. Where one is not plain, all streams are made and each layer's projection is called.
            dtype: of the mixing, the projecting and the results.
            backend: of the operators.
            fold: use folded weights, and keep them, where `folded_weights` has them.
        """
        if self.average:
            states = [torch.stack([state.float() for state in states]).mean(0)]
        states = [state.to(dtype) for state in states]
        mix = self.mix.weight.to(dtype), self.mix.bias.to(dtype)
        folded = self.folded_weights(projections, dtype, backend) if fold else None
        if folded is not None:
            return cross_key_values(states, *mix, None, None, *folded, backend=backend)
        project = self.project.weight.to(dtype), self.project.bias.to(dtype)
        if self._is_plain(projections):
            return cross_key_values(states, *mix, *project, *_layer_weights(projections, dtype), backend=backend)
        streams = stream_linear(layer_mix(states, *mix, backend=backend), *project, backend=backend)
        if self.project2 is not None:
            second = self.project2.weight.to(dtype), self.project2.bias.to(dtype)
            streams = stream_linear(torch.relu(streams), *second, backend=backend)
        pairs = [projection(streams[2 * i], streams[2 * i + 1]) for i, projection in enumerate(projections)]
        place = states[0].device  # the layers of an LLM that is spread over devices leave theirs elsewhere
        keys, values = ([made.to(place) for made in part] for part in zip(*pairs, strict=True))
        return torch.stack(keys).to(dtype), torch.stack(values).to(dtype)

    def folded_weights(
        self, projections: Sequence[KeyValueProjection], dtype: torch.dtype, backend: str = "auto"
    ) -> tuple[Any, ...] | None:
        """Key and value weights and biases with `project` multiplied into them, as `cross_key_values` takes them; kept until what
        they were made from changes, the module moves, is trained or is copied.

        None in training mode, where a gradient is wanted, under torch.compile, for kind "mlp" and for projections that are not
        plain, and where a parameter is an inference tensor: its changes leave no trace. Nor do changes through `.data` in place.
        """
        if self.training or torch.compiler.is_compiling() or not self._is_plain(projections):
            return None
        sources = [self.project.weight, self.project.bias]
        sources += [parameter for projection in projections for parameter in projection.sources()]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in (*self.mix.parameters(), *sources)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            seen = [part for parameter in sources for part in _parts(parameter)]
            if any(part.is_inference() for part in seen):
                return None
            kept = self._kept
            if kept is None or kept.dtype != dtype or not kept.made_from(seen):
                self._kept = None  # freed before the new ones are made
                made = fold_key_values(
                    self.project.weight.to(dtype),
                    self.project.bias.to(dtype),
                    *_layer_weights(projections, dtype),
                    backend=backend,
                )
                aliases = [part.detach() for part in seen]
                kept = self._kept = FoldedWeights(made, dtype, aliases, [part._version for part in seen])
        return kept.weights

    def _is_plain(self, projections: Sequence[KeyValueProjection]) -> bool:
        return self.project2 is None and all(projection.is_plain for projection in projections)

    def train(self, mode: bool = True) -> LayerwiseAligner:
        """Training mode; folded weights are given up."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> LayerwiseAligner:
        """What `to`, `half`, `cuda` and the like go through."""
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles fold anew."""
        return self.__dict__ | {"_kept": None}


class FoldedWeights(NamedTuple):
    """Folded weights and the tensors they were made from: aliases of these, so that their memory goes to no other tensor meanwhile."""

    weights: tuple[Any, ...]
    dtype: torch.dtype
    sources: list[torch.Tensor]
    versions: list[int]

    def made_from(self, tensors: list[torch.Tensor]) -> bool:
        """Whether they are these tensors, unchanged."""
        if len(tensors) != len(self.sources):
            return False
        return all(
            tensor._version == version and _place(tensor) == _place(source)
            for tensor, source, version in zip(tensors, self.sources, self.versions, strict=True)
        )


def _parts(parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors whose versions and places tell of a change: of a sharded one itself and its shard."""
    return (parameter, parameter.to_local()) if hasattr(parameter, "to_local") else (parameter,)


class _Place(NamedTuple):
    pointer: int | None
    stride: tuple[int, ...] | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _place(tensor: torch.Tensor) -> _Place:
    """Where a tensor's values lie, the same for an alias; of a sharded one its shard tells."""
    pointer, stride = (None, None) if hasattr(tensor, "to_local") else (tensor.data_ptr(), tensor.stride())
    return _Place(pointer, stride, tensor.shape, tensor.dtype, tensor.device)


def _layer_weights(projections: Sequence[KeyValueProjection], dtype: torch.dtype) -> list[Any]:
    """Key weights, value weights, key biases and value biases of plain projections, as the operators take them."""
    kinds = zip(*(projection.weights() for projection in projections), strict=True)
    return [None if kind[0] is None else [tensor.to(dtype) for tensor in kind] for kind in kinds]


class Gate(nn.Module):
    """The gate of one LLM layer, 0 at first so that training begins at the bare LLM; it lives on the layer's attention module.

    Args:
        kind: "scalar", "head" or "dynamic", as in LayAlignConfig.
        heads: query heads of the layer.
        llm_size: Dl.
    """

    def __init__(self, kind: str, heads: int, llm_size: int):
        super().__init__()
        self.kind = kind
        if kind == "dynamic":
            self.linear = nn.Linear(llm_size, 1)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            self.value = nn.Parameter(torch.zeros(heads if kind == "head" else 1))

    def forward(self, hidden_states: torch.Tensor | None) -> torch.Tensor:
        """hidden_states (B, S, Dl), which only "dynamic" reads -> (1,), (Hq,) or (B, 1, S), as `adaptive_fusion_attention` takes gates."""
        if hidden_states is None or self.kind != "dynamic":
            return self.value
        return self.linear(hidden_states.to(self.linear.weight.dtype)).transpose(1, 2)
