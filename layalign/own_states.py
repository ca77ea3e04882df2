"""Fusion: what `layalign.fuse` adds to an LLM, from cross states of the caller's own to the gated cross-attention of its layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from layalign.fusion import CrossStates, drop_full
from layalign.kernels.dispatch import autocast_dtype, malformed
from layalign.kernels.files import whole_file
from layalign.modules import Gate
from layalign.projections import KeyValueProjection

States = torch.Tensor | Sequence[torch.Tensor]


@dataclass
class PreparedCross:
    """Cross keys and values of the fused layers, made once and read by any number of calls; `Fusion` makes them.

    Attributes:
        keys, values: a tensor (B, Hkv, T, D) for each fused layer.
        mask: (B, T) bool, True = attend; None: all are.
        uses: how many forward calls have read them.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    mask: torch.Tensor | None = None
    uses: int = 0

    @property
    def rows(self) -> int:
        """B."""
        return len(self.keys[0])


class Fusion(nn.Module):
    """What is trained of an LLM with gated cross-attention: the projection of the cross states, where there is one, and the gates.

    `layalign.fuse` makes it. The LLM is no submodule of it, nor it one of the LLM: `parameters()` and `state_dict()` are the trained
    part alone, and what the LLM saves is the bare LLM.

    Args:
        projections: of the fused layers.
        layers: their indices.
        sizes: "heads" (query heads of a layer), "llm" (Dl) and "cross" (De; None: cross states have the LLM's width and no projection).
        gate: "scalar", "head" or "dynamic".
        backend: of the fused operator.

    Attributes:
        project: nn.Linear from De to Dl, or None.
        gates: a Gate for each fused layer.
    """

    def __init__(
        self,
        projections: Sequence[KeyValueProjection],
        layers: Sequence[int],
        sizes: Mapping[str, int | None],
        gate: str = "scalar",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._dtype = dtype or torch.get_default_dtype()
        heads, width, cross_size = sizes["heads"], sizes["llm"], sizes["cross"]
        assert heads is not None and width is not None
        self.layers, self.gate, self.backend = list(layers), gate, backend
        self.cross_size, self.llm_size = cross_size, width
        self.project = None if cross_size is None else nn.Linear(cross_size, width)
        self.gates = nn.ModuleList(Gate(gate, heads, width) for _ in layers)
        self.projections = list(projections)

    def forward(self, cross_states: States, cross_mask: torch.Tensor | None = None) -> PreparedCross:
        """Cross keys and values, as `llm(..., cross_states=...)` makes them in every call: who decodes step by step makes them once
        and gives them in place of the states.

        Args:
            cross_states: (B, T, De) for all fused layers, or a sequence of as many such tensors as there are fused layers.
            cross_mask: (B, T), True or 1 = attend; None: all are real.

        Raises:
            ValueError: other shapes.
        """
        states = [cross_states] if isinstance(cross_states, torch.Tensor) else list(cross_states)
        self._check(cross_states, states, cross_mask)
        weight = next(self.projections[0].attention.parameters())
        dtype = autocast_dtype(weight) or _float_dtype(self.projections[0].attention, self._dtype)
        if self.project is not None:
            states = [self.project(state.to(self.project.weight.dtype)) for state in states]
        states = [state.to(dtype) for state in states]
        keys, values = [], []
        for index, projection in enumerate(self.projections):
            stream = states[index if len(states) > 1 else 0]
            place = next(projection.attention.parameters()).device
            if place.type != "meta":  # an offloaded layer's hooks fetch its weights, and move what it reads
                stream = stream.to(place)
            key, value = projection.split(*projection(stream, stream))
            keys.append(key.transpose(1, 2).to(states[0].device, dtype))
            values.append(value.transpose(1, 2).to(states[0].device, dtype))
        return PreparedCross(keys, values, None if cross_mask is None else cross_mask.bool())

    def extra_repr(self) -> str:
        """For print."""
        return f"layers={self.layers}, gate={self.gate!r}"

    def save(self, path: str | Path) -> None:
        """Write the trained part and its settings as one safetensors file, whole or not at all."""
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        with whole_file(path, "wb") as file:
            file.write(save(tensors, metadata={"layalign_fusion": json.dumps(self._settings())}))

    def load(self, path: str | Path) -> Fusion:
        """This Fusion with the weights that `save` wrote, of the same settings.

        Raises:
            ValueError: no such file, a damaged or another one, or one of other settings.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                saved = (file.metadata() or {}).get("layalign_fusion")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is missing, damaged or no safetensors file: {error}") from error
        if saved is None:
            raise ValueError(f"{str(path)!r} was not written by Fusion.save")
        mine, others = self._settings(), json.loads(saved)
        wrong = [
            f"{name} {others.get(name)!r} instead of {own!r}" for name, own in mine.items() if others.get(name) != own
        ]
        if wrong:
            raise ValueError(f"{str(path)!r} does not fit this Fusion: {', '.join(wrong)}")
        self.load_state_dict(weights)
        return self

    def _settings(self) -> dict[str, Any]:
        heads = [(projection.heads, projection.head_dim) for projection in self.projections]
        return {
            "layers": self.layers,
            "gate": self.gate,
            "cross_size": self.cross_size,
            "llm_size": self.llm_size,
            "key_heads": [list(pair) for pair in heads],
        }

    def _check(self, given: object, states: list[Any], mask: torch.Tensor | None) -> None:
        width = self.cross_size or self.llm_size
        count = len(self.layers)
        takes = f"(B, T, {width}), or a sequence of {count} such tensors, one for each fused layer"
        if len(states) not in (1, count) or not all(isinstance(state, torch.Tensor) for state in states):
            raise malformed("cross_states", f"a {type(given).__name__} of {len(states)}", takes)
        for state in states:
            if state.dim() != 3 or state.shape[-1] != width or state.shape[:2] != states[0].shape[:2]:
                raise malformed("cross_states", f"shape {tuple(state.shape)}", takes)
            if not state.is_floating_point():
                raise malformed("cross_states", state.dtype, "floating point numbers")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != states[0].shape[:2]):
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise malformed("cross_mask", got, f"{tuple(states[0].shape[:2])}, True or 1 = attend, or None")


class OwnCrossStates(CrossStates):
    """One forward call's CrossStates, of the caller's own states; the gates are the Fusion's, not the attention modules'.

    Args:
        prepared: keys and values.
        fusion: whose.
    """

    refuses_dropout = True

    def __init__(self, prepared: PreparedCross, fusion: Fusion):
        super().__init__(None, (), fusion.backend)
        self.keys, self.values = prepared.keys, prepared.values
        self.mask = None if prepared.mask is None else drop_full(prepared.mask)
        self.indices = {layer: index for index, layer in enumerate(fusion.layers)}
        self.gates = fusion.gates

    def gate(self, module: Any, call: Mapping[str, Any]) -> torch.Tensor:
        """The gate of a fused layer's call, as CrossStates has it."""
        made = call.get("fusion_gate")
        return self.gates[self.indices[module.layer_idx]](None) if made is None else made


def own_gate_hook(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of an attention module, as `dynamic_gate_hook`, for the gates of a Fusion."""
    states = kwargs.get("fusion")
    if not isinstance(states, OwnCrossStates) or module.layer_idx not in states.indices:
        return None
    hidden_states, gate = args[0] if args else kwargs["hidden_states"], states.gates[states.indices[module.layer_idx]]
    return args, kwargs | {"fusion_gate": gate(hidden_states.to(next(gate.parameters()).device))}


def _float_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype a frozen attention module computes in: of a quantised one, that of what is not quantised, or else the LLM's."""
    floating = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return floating[0] if floating else otherwise
