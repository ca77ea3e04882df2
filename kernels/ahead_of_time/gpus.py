"""What the model of time knows of a GPU, and from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Threads of a warp that a pipe takes in one cycle on one of a multiprocessor's four schedulers: a quarter of CUDA's programming
# guide's table "Throughput of Native Arithmetic Instructions", which counts a multiprocessor's.
_LANES_80 = {"fma": 16, "int_multiply": 16, "alu": 16, "mufu": 4, "half": 32, "uniform": 32}
_LANES_90 = {"fma": 32, "int_multiply": 16, "alu": 16, "mufu": 4, "half": 32, "uniform": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class GPU:
    """Rates and latencies of one GPU. Cycles are those of its multiprocessors.

    multiprocessors, clock (Hz under load), registers, warps, shared_bytes: a multiprocessor's.
    lanes: threads a cycle and scheduler, by pipe. flops: half-precision operations a cycle and multiprocessor on tensor cores.
    shared_rate, fill_rate: bytes a cycle and multiprocessor, of shared memory and from the L2 cache.
    bytes_per_second, flops_per_second: what a copy and a large product reach, measured.
    latencies in cycles: shared memory, L2 hit, what a bulk copy (TMA) adds, a barrier of a block after the last arrival, a fence,
    a result of a special function, of a tensor core after its last cycle. launch: seconds until a kernel's first instruction and
    after its last, which a time on the GPU includes.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    registers: int
    warps: int
    shared_bytes: int
    lanes: Mapping[str, int]
    flops: int
    shared_rate: int
    fill_rate: float
    bytes_per_second: float
    flops_per_second: float
    shared_latency: int
    cache_latency: int
    memory_latency: int
    bulk_latency: int
    barrier_latency: int
    fence_latency: int
    function_latency: int
    tensor_latency: int
    launch: float


# Latencies of memory: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (arXiv 2402.13499), table of
# pointer chases: A100 29 / 261 / 466 cycles and H100 29 / 263 / 479; there too that a bulk copy takes about 170 cycles more than
# a load. L2 to multiprocessors: 5,120 bytes a cycle for both (A100 whitepaper; H100's is not published and measured no lower).
# Not from a source but set once by hand, before any comparison: barrier, fence, special functions, the tensor cores' depth, launch.
_GUESSED: dict[str, Any] = dict(
    barrier_latency=24, fence_latency=20, function_latency=24, tensor_latency=32, launch=3e-6
)

A100 = GPU(
    name="a100",
    architecture="sm_80",
    multiprocessors=108,
    clock=1.41e9,
    registers=65536,
    warps=64,
    shared_bytes=167_936,
    lanes=_LANES_80,
    flops=2048,
    shared_rate=128,
    fill_rate=5120 / 108,
    bytes_per_second=1.75e12,  # of 2.04 (80 GB)
    flops_per_second=2.7e14,  # of 312
    shared_latency=29,
    cache_latency=261,
    memory_latency=466,
    bulk_latency=0,
    **_GUESSED,
)
_HOPPER: dict[str, Any] = dict(
    architecture="sm_90",
    multiprocessors=132,
    clock=1.755e9,
    registers=65536,
    warps=64,
    shared_bytes=233_472,
    lanes=_LANES_90,
    flops=4096,
    shared_rate=128,
    fill_rate=5120 / 132,
    flops_per_second=7.9e14,  # of 989: the power limit lowers the clock; an 8,192-wide bf16 product measured 769 to 798 on both
    shared_latency=29,
    cache_latency=263,
    memory_latency=479,
    bulk_latency=170,
    **_GUESSED,
)
H100 = GPU(name="h100", bytes_per_second=3.0e12, **_HOPPER)  # a copy, read and written; HBM3's 3.35
H200 = GPU(name="h200", bytes_per_second=4.3e12, **_HOPPER)  # a copy; HBM3e's 4.8

GPUS = {gpu.name: gpu for gpu in (H100, H200, A100)}


def resident_blocks(gpu: GPU, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at a time. registers: a thread's; shared_bytes, warps: a block's."""
    by_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time to a warp
    limits = (gpu.registers // (by_warp * warps), gpu.shared_bytes // (shared_bytes + 1024), gpu.warps // warps, 32)
    return max(0, min(limits))
