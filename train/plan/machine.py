"""How fast a machine multiplies matrices: a GPU by its name, or the present machine measured in a moment."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

# Name -> dense FLOP/s in bf16 and in fp32 (whose products are not rounded to TF32 unless a user asks PyTorch for that), and memory
# in bytes, from the makers' data sheets.
_GPUS = {
    "a100": (312e12, 19.5e12, 80e9),
    "a100-40gb": (312e12, 19.5e12, 40e9),
    "a10g": (70e12, 35e12, 24e9),
    "h100": (989e12, 67e12, 80e9),
    "h200": (989e12, 67e12, 141e9),
    "l4": (121e12, 30.3e12, 24e9),
    "l40": (181e12, 90.5e12, 48e9),
    "l40s": (362e12, 91.6e12, 48e9),
    "rtx4090": (165e12, 82.6e12, 24e9),
}
# Share of that which a training step is taken to reach. Of a measured product it reaches more.
_OF_PEAK, _OF_MEASURED = 0.4, 0.6


@dataclass(frozen=True)
class Machine:
    """Where one process is to run.

    Attributes:
        name: for the reader.
        flops_per_second: that a training step is taken to reach there, by precision ("bf16", "fp32"; those that are asked for).
        memory: bytes.
        is_cpu: whether there is no GPU.
    """

    name: str
    flops_per_second: Mapping[str, float]
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
    *rates, size = _GPUS[key]
    peaks = dict(zip(("bf16", "fp32"), rates, strict=True))
    shown = f"{_listed(peaks)} by its data sheet, {_OF_PEAK:.0%} of it taken"
    return Machine(f"{key} ({shown})", {name: peak * _OF_PEAK for name, peak in peaks.items()}, int(size))


def this_machine(precisions: Iterable[str], cpu: bool) -> Machine:
    """The present machine, by one product of matrices in each dtype of training.

    Args:
        precisions: that stages train in, "bf16" or "fp32".
        cpu: whether a GPU stays unused.
    """
    dtypes = {name: torch.bfloat16 if name == "bf16" else torch.float32 for name in sorted(precisions)}
    if not cpu and torch.cuda.is_available():
        rates = {name: _measured(torch.device("cuda"), 8192, dtype) for name, dtype in dtypes.items()}
        name, size, threads = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, ""
    else:
        rates = {name: _measured(torch.device("cpu"), 1024, dtype) for name, dtype in dtypes.items()}
        name, size = _cpu_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        threads = f", {torch.get_num_threads()} threads"
    shown = f"{_listed(rates)} measured, {_OF_MEASURED:.0%} of it taken"
    reached = {name: rate * _OF_MEASURED for name, rate in rates.items()}
    return Machine(f"{name}{threads} ({shown})", reached, size, is_cpu=cpu or not torch.cuda.is_available())


def _listed(rates):
    return " and ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in rates.items())


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
