"""The two ceilings of a machine, measured in the run that compares with them: copy bandwidth and matrix product rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from bench.clocks import seconds_by


@dataclass(frozen=True)
class Ceilings:
    """Bytes read and written, and floating-point operations of products of one dtype, a second."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, flops: float, moved: float) -> float:
        """The seconds under which no implementation comes that computes `flops` and moves `moved` bytes."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


@cache
def ceilings(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Ceilings:
    """Of the largest sizes that are worth the time: 2 GiB copied and 8,192-wide products on a GPU."""
    seconds_of = seconds_by(device, clock)
    words, width = (2**28, 8192) if device.type == "cuda" else (2**24, 1024)
    source = torch.randn(words, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = _median_seconds(lambda: target.copy_(source), seconds_of)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    multiplying = _median_seconds(lambda: left @ right, seconds_of)
    return Ceilings(2 * source.nbytes / copying, 2 * width**3 / multiplying)


def _median_seconds(work, seconds_of):
    work()
    return statistics.median(seconds_of(work) for _ in range(11))
