"""Sizes that the suites measure at, and random tensors of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from bench.machine import machine

AnyCase = TypeVar("AnyCase", bound="Case")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table; `str(case)` names it, so rows of equal sizes stand together.

    Attributes:
        device: "cpu" or "cuda", the only kind of machine that it is measured on.
        dtype: of the inputs.
    """

    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}"

    def draw(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of that shape and standard deviation."""
        return scale * torch.randn(shape, dtype=self.dtype, device=self.device)


def cases_here(*groups: dict[str, AnyCase]) -> dict[str, AnyCase]:
    """Those of the groups that this machine is measured at, by name."""
    return machine().fitted({name: case for group in groups for name, case in group.items()})
