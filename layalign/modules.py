"""The trained part: adapter, layer-wise aligner, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from layalign.kernels.layerwise_aligner import cross_key_values, fold_key_values, layer_mix, stream_linear
from layalign.offloading import at_hand
from layalign.projections import KeyValueProjection


class Adapter(nn.Module):
    """Maps the encoder's last state (B, T, De) to soft prompt embeddings (B, T, Dl); holds the learned boundary embedding (Dl,).

    Args:
        kind: "mlp", "gelu" or "linear", as in LayAlignConfig.
        encoder_size, llm_size: De and Dl.
        width: between the two linear layers; None: 2 De.
    """

    def __init__(self, kind: str, encoder_size: int, llm_size: int, width: int | None = None):
        super().__init__()
        inner = width or 2 * encoder_size
        self.linear1 = None if kind == "linear" else nn.Linear(encoder_size, inner)
        self._activation = torch.nn.functional.gelu if kind == "gelu" else torch.relu
        self.linear2 = nn.Linear(encoder_size if self.linear1 is None else inner, llm_size)
        self.boundary = nn.Parameter(torch.zeros(llm_size))

    def draw_boundary(self, embeddings: torch.Tensor) -> None:
        """Random values for the boundary, as large as those of the LLM's embeddings (V, Dl); on the meta device nothing has any."""
        if not (embeddings.is_meta or self.boundary.is_meta):
            nn.init.normal_(self.boundary, std=embeddings.float().std().item())

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """The encoder's last state (B, T, De) -> (B, T, Dl), in the adapter's dtype."""
        state = state.to(self.linear2.weight.dtype)
        if self.linear1 is not None:
            state = self._activation(self.linear1(state))
        return self.linear2(state)


class LayerwiseAligner(nn.Module):
    """Mixes E encoder states into 2L streams (keys and values of L LLM layers) and projects them to the LLM's width.

    Stream 2i feeds the keys of the i-th fused layer, stream 2i+1 its values. `mix` is (2L, E), `project` (Dl, De); kind "mlp" adds a
    ReLU and `project2` (Dl, Dl); a width W adds `inner` (W, De) and SiLU before `project`, which then is (Dl, W). The projection into
    each layer's keys and values uses the LLM's own frozen weights.

    Args:
        kind: "linear" or "mlp", as in LayAlignConfig.
        states, layers: E and L.
        encoder_size, llm_size: De and Dl.
        average: mix the mean of the E states instead of these.
        width: W; None: there is no `inner`.
    """

    def __init__(
        self,
        kind: str,
        states: int,
        layers: int,
        encoder_size: int,
        llm_size: int,
        average: bool = False,
        width: int | None = None,
    ):
        super().__init__()
        self.average = average
        self.mix = nn.Linear(1 if average else states, 2 * layers)
        self.inner = None if width is None else nn.Linear(encoder_size, width)
        self.project = nn.Linear(width or encoder_size, llm_size)
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
            projections: those of the L layers. The streams of plain ones are never made, others are called on theirs.
            dtype: of the mixing, the projecting and the results.
            backend: of the operators.
            fold: use folded weights, and keep them, where `folded_weights` has them.
        """
        if self.average:
            states = [torch.stack([state.float() for state in states]).mean(0)]
        states = [state.to(dtype) for state in states]
        plain = self._plain(projections)
        called = [index for index in range(len(projections)) if index not in plain]
        folded = self.folded_weights(projections, dtype, backend) if fold else None
        if not called:
            return self._multiplied(states, plain, projections, folded, backend)
        pairs = dict(zip(called, self._called(states, called, projections, backend), strict=True))
        if plain:
            made = self._multiplied(states, plain, projections, folded, backend)
            pairs |= zip(plain, zip(*made, strict=True), strict=True)
        keys, values = zip(*(pairs[layer] for layer in range(len(projections))), strict=True)
        return torch.stack(keys).to(dtype), torch.stack(values).to(dtype)

    def _multiplied(
        self,
        states: list[torch.Tensor],
        layers: list[int],
        projections: Sequence[KeyValueProjection],
        folded: tuple[Any, ...] | None,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layers whose projections are plain, by their weights."""
        dtype, mix = states[0].dtype, self._mix_of(layers, states[0].dtype)
        if folded is not None:
            return cross_key_values(states, *mix, None, None, *folded, backend=backend)
        project = _weight_and_bias(self.project, dtype)
        mine = [projections[layer] for layer in layers]
        if any(projection.is_sharded for projection in mine):
            return _layer_by_layer(states, mix, project, mine, backend)
        return cross_key_values(states, *mix, *project, *_layer_weights(mine, dtype), backend=backend)

    def _called(
        self,
        states: list[torch.Tensor],
        layers: list[int],
        projections: Sequence[KeyValueProjection],
        backend: str,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (B, T, kv) of each of the layers whose projections are called, on streams that are made."""
        dtype, place = states[0].dtype, states[0].device
        project = _weight_and_bias(self.project, dtype)
        mixed = layer_mix(states, *self._mix_of(layers, dtype), backend=backend)
        if self.inner is not None:
            mixed = stream_linear(mixed, *_weight_and_bias(self.inner, dtype), backend=backend)
            mixed = torch.nn.functional.silu(mixed)
        streams = stream_linear(mixed, *project, backend=backend)
        if self.project2 is not None:
            streams = stream_linear(torch.relu(streams), *_weight_and_bias(self.project2, dtype), backend=backend)
        pairs = [projections[layer](streams[2 * i], streams[2 * i + 1]) for i, layer in enumerate(layers)]
        # The layers of an LLM that is spread over devices leave theirs elsewhere.
        return [(key.to(place), value.to(place)) for key, value in pairs]

    def _mix_of(self, layers: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixing weights (2N, E) and biases (2N,) of N layers' streams."""
        weight, bias = _weight_and_bias(self.mix, dtype)
        if 2 * len(layers) == len(weight):
            return weight, bias
        rows = torch.tensor([row for layer in layers for row in (2 * layer, 2 * layer + 1)], device=weight.device)
        return weight.index_select(0, rows), bias.index_select(0, rows)

    def folded_weights(
        self, projections: Sequence[KeyValueProjection], dtype: torch.dtype, backend: str = "auto"
    ) -> tuple[Any, ...] | None:
        """Key and value weights and biases of the plain projections with `project` multiplied into them, as `cross_key_values`
        takes them; kept until what they were made from changes, the module moves, is trained or is copied.

        None in training mode, where a gradient is wanted, under torch.compile, for kind "mlp" and a width, without plain projections,
        for sharded ones, which folding would gather for good, and where a parameter is offloaded or an inference tensor: its changes
        leave no trace. Nor do changes through `.data` in place, by another process, or of an optimizer replayed as a CUDA graph.
        """
        projections = [projections[layer] for layer in self._plain(projections)]
        if not projections:
            # Adapters may be merged into what these were made from, and that through `.data`.
            self._kept = None
        if self.training or torch.compiler.is_compiling() or not projections:
            return None
        if any(projection.is_sharded for projection in projections):
            return None
        sources = [self.project.weight, self.project.bias]
        sources += [parameter for projection in projections for parameter in projection.sources()]
        if any(parameter.device.type == "meta" for parameter in sources):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in (*self.mix.parameters(), *sources)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            seen, steps = [part for parameter in sources for part in _parts(parameter)], _steps
            if any(part.is_inference() for part in seen):
                return None
            kept = self._kept
            if kept is None or kept.dtype != dtype or not kept.made_from(seen, steps):
                self._kept = None  # freed before the new ones are made
                made = fold_key_values(
                    self.project.weight.to(dtype),
                    self.project.bias.to(dtype),
                    *_layer_weights(projections, dtype),
                    backend=backend,
                )
                aliases = [part.detach() for part in seen]
                kept = self._kept = FoldedWeights(made, dtype, aliases, [part._version for part in seen], steps)
        return kept.weights

    def forget_folded(self) -> None:
        """Fold anew in the next call."""
        self._kept = None

    def _plain(self, projections: Sequence[KeyValueProjection]) -> list[int]:
        """The layers whose streams need not be made."""
        if self.project2 is not None or self.inner is not None:
            return []
        return [layer for layer, projection in enumerate(projections) if projection.is_plain]

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


def _weight_and_bias(module: nn.Linear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a trained layer, at hand also where they are offloaded."""
    return at_hand(module, "weight").to(dtype), at_hand(module, "bias").to(dtype)


_steps = 0  # of all optimizers of this process


def _count_step(*_: Any) -> None:
    """Fused optimizers change parameters without a trace on them: any step may have. In training mode nothing is folded, so that only
    a model that answers while another is trained folds more often for it."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class FoldedWeights(NamedTuple):
    """Folded weights and the tensors they were made from: aliases of these, so that their memory goes to no other tensor meanwhile."""

    weights: tuple[Any, ...]
    dtype: torch.dtype
    sources: list[torch.Tensor]
    versions: list[int]
    steps: int

    def made_from(self, tensors: list[torch.Tensor], steps: int) -> bool:
        """Whether they are these tensors, unchanged, and no optimizer has taken a step since (`_count_step`)."""
        if len(tensors) != len(self.sources) or steps != self.steps:
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


def _layer_by_layer(
    states: list[torch.Tensor],
    mix: tuple[torch.Tensor, torch.Tensor],
    project: tuple[torch.Tensor, torch.Tensor],
    projections: Sequence[KeyValueProjection],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (L, B, T, kv), with the sharded weights of one layer at a time: they are gathered once for the forward and
    once for the backward pass, and none is kept between these."""
    made, dtype = [], states[0].dtype
    for index, projection in enumerate(projections):
        weights = _layer_weights([projection], dtype)
        mine = slice(2 * index, 2 * index + 2)
        with torch.autograd.graph.saved_tensors_hooks(*_gathering_again(projection, weights, dtype)):
            made.append(cross_key_values(states, mix[0][mine], mix[1][mine], *project, *weights, backend=backend))
    keys, values = zip(*made, strict=True)
    return torch.cat(keys), torch.cat(values)


def _gathering_again(
    projection: KeyValueProjection, weights: list[Any], dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]:
    """Hooks for saved tensors: of gathered weights only their place in the list is saved, the backward pass gathers them again."""
    # Known by where they lie: what is saved may be another object for the same memory.
    kinds = {(part.data_ptr(), part.shape): kind for kind, parts in enumerate(weights) for part in parts or ()}
    again: dict[int, torch.Tensor] = {}

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if packed not in again:
            again.update({kind: parts[0] for kind, parts in enumerate(_layer_weights([projection], dtype)) if parts})
        return again.pop(packed)  # given up once all have been asked for

    return lambda tensor: kinds.get((tensor.data_ptr(), tensor.shape), tensor), unpack


def _layer_weights(projections: Sequence[KeyValueProjection], dtype: torch.dtype) -> list[Any]:
    """Key weights, value weights, key biases and value biases of plain projections, as the operators take them."""
    kinds = zip(*(projection.weights() for projection in projections), strict=True)
    return [None if kind[0] is None else [tensor.to(dtype) for tensor in kind] for kind in kinds]


class Gate(nn.Module):
    """The gate of one LLM layer, 0 at first so that training begins at the bare LLM; it lives on the layer's attention module.

    Args:
        kind: "scalar", "head" or "dynamic", as in LayAlignConfig; None: no gate, which is 1 for ever and neither trained nor saved.
        heads: query heads of the layer.
        llm_size: Dl.
    """

    value: torch.Tensor

    def __init__(self, kind: str | None, heads: int, llm_size: int):
        super().__init__()
        self.kind = kind
        if kind == "dynamic":
            self.linear = nn.Linear(llm_size, 1)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        elif kind is None:
            self.register_buffer("value", torch.ones(1), persistent=False)
        else:
            self.value = nn.Parameter(torch.zeros(heads if kind == "head" else 1))

    def forward(self, hidden_states: torch.Tensor | None) -> torch.Tensor:
        """hidden_states (B, S, Dl), which only "dynamic" reads -> (1,), (Hq,) or (B, 1, S), as `adaptive_fusion_attention` takes gates."""
        if hidden_states is None or self.kind != "dynamic":
            return self.value
        return self.linear(hidden_states.to(self.linear.weight.dtype)).transpose(1, 2)
