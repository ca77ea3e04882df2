"""How fast a machine multiplies matrices: a GPU by its name, or the present machine measured in a moment."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass

import torch

# Name -> dense bf16 FLOP/s and memory in bytes, from the makers' data sheets.
_GPUS = {
    "a100": (312e12, 80e9),
    "a100-40gb": (312e12, 40e9),
    "a10g": (70e12, 24e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "l4": (121e12, 24e9),
    "l40": (181e12, 48e9),
    "l40s": (362e12, 48e9),
    "rtx4090": (165e12, 24e9),
}
# Share of that which a training step is taken to reach. Of a measured product it reaches more.
_OF_PEAK, _OF_MEASURED = 0.4, 0.6


@dataclass(frozen=True)
class Machine:
    """Where one process is to run.

    Attributes:
        name: for the reader.
        flops_per_second: that a training step is taken to reach there.
        memory: bytes.
        is_cpu: whether there is no GPU.
    """

    name: str
    flops_per_second: float
    memory: int
    is_cpu: bool = False


def named_machine(name: str) -> Machine:
    """A GPU by its name.

    Raises:
        ValueError: none that is known.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in _GPUS:
        raise ValueError(f"gpu: got {name!r}, takes {', '.join(_GPUS)}")
    peak, size = _GPUS[key]
    return Machine(
        f"{key} ({peak / 1e12:.0f} TFLOP/s by its data sheet, {_OF_PEAK:.0%} of it taken)", peak * _OF_PEAK, int(size)
    )


def this_machine(bf16: bool, cpu: bool) -> Machine:
    """The present machine, by one product of matrices in the dtype of training.

    Args:
        bf16: whether training runs in it.
        cpu: whether a GPU stays unused.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    if not cpu and torch.cuda.is_available():
        rate = _measured(torch.device("cuda"), 8192, dtype)
        name, size, threads = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, ""
    else:
        rate = _measured(torch.device("cpu"), 1024, dtype)
        name, size = _cpu_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        threads = f", {torch.get_num_threads()} threads"
    shown = f"{rate / 1e12:.3g} TFLOP/s measured in {str(dtype).removeprefix('torch.')}, {_OF_MEASURED:.0%} of it taken"
    return Machine(f"{name}{threads} ({shown})", rate * _OF_MEASURED, size, is_cpu=cpu or not torch.cuda.is_available())


def _measured(device, size, dtype):
    """FLOP/s of a square product, the best of some."""
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
