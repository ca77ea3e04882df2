"""What a call costs on the host above an empty Triton launch, without a GPU: `python -m bench.host_cost` prints JSON.

Kernels are neither compiled nor run: a driver takes launches and does nothing with them. All else is what a call does on a GPU:
Triton's binder, or plans in its place, checks, autograd, and allocations, which are a CPU's here. An empty launch, of a kernel
without arguments through Triton, takes turns with the calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.launch import pretending

GOALS = {"decode": 10.0, "forward": 15.0, "backward": 30.0}  # microseconds above an empty launch


@triton.jit
def empty_kernel():
    """Does nothing."""


class IdleGPU:
    """A Triton driver whose kernels are compiled by nobody. Each launch goes to `launched`(compiled, grid, arguments), if given."""

    def __init__(self, architecture: str, launched: Callable[..., None] | None = None) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.launched = launched

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def compile(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
        """Instead of triton.compile."""
        compiled = object.__new__(CompiledKernel)
        compiled.src, compiled.name, compiled.hash = src, src.fn.__name__, src.hash()
        compiled.module = compiled._module_pid = None
        compiled.function, compiled.packed_metadata = id(compiled), (options["num_warps"], 1, 0)
        compiled._init_handles = lambda: None
        launched = self.launched

        def start(grid_0, grid_1, grid_2, stream, function, packed, metadata, enter, leave, *arguments):
            if launched is not None:
                launched(compiled, (grid_0, grid_1, grid_2), arguments)

        compiled._run = start
        return compiled


@contextmanager
def idle_gpu(architecture: str, launched: Callable[..., None] | None = None) -> Iterator[None]:
    """Within, CPU tensors pass for such a GPU's. For a process of its own: it leaves traces in Triton's kernels."""
    gpu = IdleGPU(architecture, launched)
    triton.runtime.driver.set_active(gpu)
    triton.compiler.compile = gpu.compile
    with pretending(architecture):
        yield


def calls() -> dict[str, Callable[[], Any]]:
    """What is measured, by name: of a model of 32 heads over 8, its projections' layout, few tokens: lengths cost the host nothing."""
    torch.manual_seed(0)

    def projected(heads, tokens, **options):
        return torch.randn(2, tokens, heads, 128, dtype=torch.bfloat16, **options).transpose(1, 2)

    gate = torch.ones(1)
    q, *kv = projected(32, 16), *(projected(8, tokens) for tokens in (64, 64, 32, 32))
    prompt = projected(32, 64)
    leaves = [x.clone().requires_grad_() for x in (prompt, *kv, gate)]
    token, mask = projected(32, 1), torch.ones(2, 64, dtype=torch.bool)
    attend = adaptive_fusion_attention
    out = attend(*leaves, backend="triton")
    grad_out = torch.ones_like(out)

    def step(**options):
        return lambda: attend(token, *kv, gate, query_start=40, backend="triton", **options)

    return {
        "decode": step(),
        "decode, masks": step(key_mask=mask, cross_mask=mask[:, :32]),
        "forward": lambda: attend(prompt, *kv, gate, backend="triton"),
        "forward, masks": lambda: attend(prompt, *kv, gate, key_mask=mask, cross_mask=mask[:, :32], backend="triton"),
        "forward, for gradients": lambda: attend(*leaves, backend="triton"),
        "backward": lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True),
    }


def measure(rounds: int, repetitions: int) -> dict[str, dict[str, float]]:
    """{call: microseconds, with and without plans, and above the empty launch of the same rounds}: medians over `rounds` of so many
    repetitions. The clock is of this process: what else a machine does costs less."""
    with idle_gpu("sm_90"):
        works = calls()
        empty = empty_kernel[(1,)]
        seconds: dict[str, list[float]] = {}
        for planned in (False, True):
            plans.enabled = planned
            for name, work in {"an empty launch": empty, **works}.items():
                for _ in range(4):  # the first is planned, the second rehearsed
                    work()
        for _ in range(rounds):
            for planned in (True, False):
                plans.enabled = planned
                for name, work in {"an empty launch": empty, **works}.items():
                    start = time.process_time()
                    for _ in range(repetitions):
                        work()
                    took = (time.process_time() - start) / repetitions * 1e6
                    seconds.setdefault(name if planned else f"{name}, no plan", []).append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    least = median["an empty launch"]
    return {
        name: {
            "microseconds": median[name],
            "without_a_plan": median[f"{name}, no plan"],
            "above_an_empty_launch": median[name] - least,
            "fastest_round": min(seconds[name]) - min(seconds["an empty launch"]),
        }
        for name in ("an empty launch", *works)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repetitions", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.repetitions), indent=1))


if __name__ == "__main__":
    main()
