"""A pretended GPU: `pytest -p bench.first_light.rehearsal`. The cases of a GPU run in fp32 on this CPU, "triton" is this library's
PyTorch backend, and the kernels named in LAYALIGN_REHEARSAL fail as it says:

    LAYALIGN_REHEARSAL="stream_linear=resources,attention backward=wrong,decode=kills,layer_mix=hangs"
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch

from bench.machine import Machine, use

VARIABLE = "LAYALIGN_REHEARSAL"
NAME = "pretended GPU"


@dataclass(frozen=True)
class PretendedGPU(Machine):
    """faults: {kernel: "resources", "wrong", "nan", "kills" or "hangs"}."""

    faults: tuple[tuple[str, str], ...] = ()

    def fitted(self, cases: dict[str, Any]) -> dict[str, Any]:
        """A GPU's, moved."""
        on_gpu = {name: case for name, case in cases.items() if case.device == "cuda"}
        return {name: dataclasses.replace(x, device="cpu", dtype=torch.float32) for name, x in on_gpu.items()}

    def has_triton(self) -> bool:
        """So it pretends."""
        return True

    def by_backend(self, operator: Callable, backend: str) -> Callable:
        """The PyTorch backend, behind the faults where it stands for Triton."""
        run = partial(operator, backend="torch")
        return self._faulty(operator.__name__, run) if backend == "triton" else run

    def _faulty(self, operator, run):
        @wraps(run.func)
        def call(*arguments, **options):
            forward, backward = _kernels(operator, arguments)
            self._before(forward)
            out = run(*arguments, **options)
            if not isinstance(out, torch.Tensor):
                return out
            out = self._after(forward, out)
            return _Behind.apply(out, partial(self._gradient, backward)) if out.requires_grad else out

        return call

    def _before(self, kernel):
        fault = dict(self.faults).get(kernel)
        if fault == "resources":
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(264_192, 232_448, "shared memory")
        if fault == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(1e6)

    def _after(self, kernel, out):
        changed = {"wrong": 1.5, "nan": torch.nan}.get(dict(self.faults).get(kernel, ""))
        return out if changed is None else out * changed

    def _gradient(self, kernel, grad):
        self._before(kernel)
        return self._after(kernel, grad)


class _Behind(torch.autograd.Function):
    """The same tensor, with a function of its gradient."""

    @staticmethod
    def forward(ctx, out, change):
        ctx.change = change
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def _kernels(operator, arguments):
    """-> names of the forward's and of the backward's."""
    if operator != "adaptive_fusion_attention":
        return operator, f"{operator} backward"
    if arguments[0].shape[2] == 1 and not arguments[0].requires_grad:
        return "decode", "attention backward"
    return "attention forward", "attention backward"


def pytest_configure(config):
    given = os.environ.get(VARIABLE, "")
    faults = tuple(tuple(one.split("=")) for one in given.split(",") if one)
    use(PretendedGPU(device="cpu", name=NAME, faults=faults))
