"""Seconds of one piece of work, by the clock of the device it runs on."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def seconds_by(device: torch.device, clock: Callable[[], float]) -> Callable[[Callable], float]:
    """A function from work to its seconds: on a GPU between two events around it, on a CPU by `clock`."""
    return DeviceClock(device) if device.type == "cuda" else partial(_host_seconds, clock)


def allocate_as_later() -> None:
    """Set glibc's two thresholds to where they rise in a process that has run long; elsewhere nothing.

    Else which tensors take fresh pages at every call, 1.6 times the time of a mix of 28 MB, depends on what the process
    happened to free before. Tensors over 32 MB always do: keeping these too halved the published aligner's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def _host_seconds(clock, work):
    start = clock()
    work()
    return clock() - start


class DeviceClock:
    """Seconds between two events around the work, which finds none of its data in the L2 cache."""

    def __init__(self, device: torch.device):
        # More than the cache holds: filling 512 MB keeps the GPU busy for over 0.1 ms, in which the host runs ahead.
        size = max(2**29, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, work: Callable) -> float:
        self.flushed.zero_()
        self.events[0].record()
        work()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000

    @staticmethod
    def capture(work: Callable) -> Callable:
        """The same work as the replay of a CUDA graph."""
        work()  # whatever is compiled or chosen at the first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay
