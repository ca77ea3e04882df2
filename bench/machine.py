"""The machine that is measured: whose cases, on which device, with which backends. A rehearsal puts a pretended one in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """The one at hand.

    device: "cuda" or "cpu", where tensors lie and whose clock counts. left_out: names of implementations not to measure. name: of a
    pretended one.
    """

    device: str
    left_out: frozenset[str] = frozenset()
    name: str | None = None

    def fitted(self, cases: dict[str, Any]) -> dict[str, Any]:
        """Those of the cases, by name, that are measured here."""
        return {name: case for name, case in cases.items() if case.device == self.device}

    def has_triton(self) -> bool:
        """Whether there is something that Triton's kernels run on."""
        return self.device == "cuda"

    def by_backend(self, operator: Callable, backend: str) -> Callable:
        """This library's operator by one of its backends."""
        return partial(operator, backend=backend)


_machine: Machine | None = None


def machine() -> Machine:
    """The present one."""
    global _machine
    if _machine is None:
        _machine = Machine("cuda" if torch.cuda.is_available() else "cpu")
    return _machine


def use(another: Machine) -> None:
    """From here on, in this process."""
    global _machine
    _machine = another
