"""Sizes and random tensors of the layer-wise aligner's benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case


@dataclass(frozen=True, kw_only=True)
class AlignerCase(Case):
    """E encoder layers of width De, L LLM layers of width Dl with keys of width kv, `batch` x `length` encoder tokens."""

    encoder_layers: int
    encoder_width: int
    llm_layers: int
    llm_width: int
    kv: int
    batch: int
    length: int

    def __str__(self) -> str:
        names = f"E{self.encoder_layers} De{self.encoder_width} L{self.llm_layers} Dl{self.llm_width} kv{self.kv}"
        return f"{super().__str__()} {names} tokens{self.tokens}"

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.batch * self.length

    @property
    def sizes(self) -> dict[str, int]:
        """By the letter that reports call them."""
        sizes = {"E": self.encoder_layers, "De": self.encoder_width, "L": self.llm_layers, "Dl": self.llm_width}
        return sizes | {"kv": self.kv, "tokens": self.tokens}

    @property
    def streams(self) -> int:
        """2 L: one for the keys and one for the values of each LLM layer."""
        return 2 * self.llm_layers

    def small(self) -> AlignerCase:
        """For --small."""
        return dataclasses.replace(
            self, encoder_layers=3, encoder_width=32, llm_layers=2, llm_width=48, kv=16, length=5
        )

    def states(self) -> list[Tensor]:
        """E tensors (B, T, De), as an encoder returns them."""
        return [self.draw(self.batch, self.length, self.encoder_width) for _ in range(self.encoder_layers)]

    def mix(self) -> list[Tensor]:
        """(2L, E) and (2L,): what training changes."""
        weight = self.draw(self.streams, self.encoder_layers, scale=self.encoder_layers**-0.5)
        return [x.requires_grad_() for x in (weight, self.draw(self.streams))]

    def projection(self) -> list[Tensor]:
        """(Dl, De) and (Dl,): what training changes."""
        weight = self.draw(self.llm_width, self.encoder_width, scale=self.encoder_width**-0.5)
        return [x.requires_grad_() for x in (weight, self.draw(self.llm_width))]

    def key_value_weights(self) -> list[list[Tensor]]:
        """Two lists of L weights (kv, Dl), frozen."""
        scale = self.llm_width**-0.5
        return [[self.draw(self.kv, self.llm_width, scale=scale) for _ in range(self.llm_layers)] for _ in range(2)]


CPU = {"device": "cpu", "dtype": torch.float32, "encoder_layers": 12, "encoder_width": 768, "llm_layers": 16}
GPU = {"device": "cuda", "dtype": torch.bfloat16, "encoder_layers": 24, "encoder_width": 2048, "llm_layers": 32}
CASES = {
    "cpu_gqa": AlignerCase(**CPU, llm_width=1024, kv=256, batch=4, length=256),
    "cpu_mha": AlignerCase(**CPU, llm_width=1024, kv=1024, batch=4, length=64),
    "gpu_gqa": AlignerCase(**GPU, llm_width=4096, kv=1024, batch=8, length=256),
    "gpu_mha": AlignerCase(**GPU, llm_width=4096, kv=4096, batch=8, length=256),
}
# Of the mix and the shared projection alone, for which kv is nothing.
OPERATORS = {
    "cpu": AlignerCase(**CPU | {"llm_layers": 12}, llm_width=768, kv=256, batch=4, length=64),
    "gpu": CASES["gpu_mha"],
}
FOLDING = {"cpu": OPERATORS["cpu"], "gpu_gqa": CASES["gpu_gqa"], "gpu_mha": CASES["gpu_mha"]}


def in_fp64(argument: Any) -> Any:
    """A tensor, or a list of them, as fp64 leaves."""
    if isinstance(argument, list):
        return [in_fp64(x) for x in argument]
    return argument.detach().double().requires_grad_(argument.requires_grad)


def flat(arguments: Iterable[Tensor | list]) -> list[Tensor]:
    """All tensors of arguments that are tensors and lists of tensors."""
    return [x for argument in arguments for x in (argument if isinstance(argument, (list, tuple)) else [argument])]
