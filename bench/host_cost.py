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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.launch import pretending

LAYERS = 32  # that share a step's plan
EMPTY, EMPTY_BACKWARD = "an empty launch", "an empty backward"


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


class _Untouched(torch.autograd.Function):
    """As many inputs as the attention has, and a backward that has nothing to do."""

    @staticmethod
    def forward(ctx, grads, *inputs):
        ctx.grads = grads
        return inputs[0].detach()

    @staticmethod
    def backward(ctx, grad_out):
        return None, *ctx.grads


def calls() -> dict[str, Callable[[], Any]]:
    """What is measured, by name: of a model of 32 heads over 8 and few tokens, whose number costs the host nothing but allocations
    that a CPU's memory serves more slowly than a GPU's cache."""
    torch.manual_seed(0)

    def projected(heads, tokens):
        return torch.randn(1, tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2)

    attend = partial(adaptive_fusion_attention, backend="triton")
    token, prompt, gate = projected(32, 1), projected(32, 20), torch.ones(1)
    kv = [projected(8, tokens) for tokens in (40, 40, 30, 30)]
    masks = {"key_mask": torch.ones(1, 40, dtype=torch.bool), "cross_mask": torch.ones(1, 30, dtype=torch.bool)}
    leaves = [x.clone().requires_grad_() for x in (prompt, *kv, gate)]
    out, masked = attend(*leaves), attend(*leaves, **masks)
    grad_out = torch.ones_like(out)
    untouched = _Untouched.apply([x.detach() for x in leaves], *leaves)
    caches = [torch.randn(1, 8, 700, 64, dtype=torch.bfloat16) for _ in range(2)]
    steps = [[x[:, :, :keys] for x in caches] for keys in range(100, 700)]  # more than there are plans
    made = count()

    def grown():
        """One layer of 32 of a step, whose cache is longer by a key than the last step's."""
        attend(token, *steps[next(made) // LAYERS % len(steps)], *kv[2:], gate)

    grad = partial(torch.autograd.grad, inputs=leaves, grad_outputs=grad_out, retain_graph=True)
    return {
        EMPTY: empty_kernel[(1,)],
        EMPTY_BACKWARD: partial(grad, untouched),
        "decode": partial(attend, token, *kv, gate, query_start=40),
        "decode, masks": partial(attend, token, *kv, gate, query_start=40, **masks),
        "decode, growing cache": grown,
        "forward": partial(attend, prompt, *kv, gate),
        "forward, masks": partial(attend, prompt, *kv, gate, **masks),
        "forward, for gradients": partial(attend, *leaves),
        "backward": partial(grad, out),
        "backward, masks": partial(grad, masked),
    }


def measure(rounds: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """{call: {"seconds": of a call in each round, "without_a_plan": the same by the long way}}, of this process's own time.

    A round takes all calls in turn, each so many times.
    """
    with idle_gpu("sm_90"):
        works = calls()
        found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "without_a_plan": []} for name in works}
        for number in range(-1, rounds):  # one to warm up: a call is planned when first made, and rehearsed when next
            for (name, work), way in product(works.items(), ("seconds", "without_a_plan")):
                plans.enabled = way == "seconds"
                start = time.process_time()
                for _ in range(repetitions):
                    work()
                if number >= 0:
                    found[name][way].append((time.process_time() - start) / repetitions)
    return found


def above_least(found: Mapping[str, Mapping[str, Sequence[float]]], name: str, way: str = "seconds") -> float:
    """Median over the rounds of what a call took above the least that such a call can: an empty launch, and for a backward also
    that of an autograd function that has nothing to do. In seconds."""
    least = [EMPTY, EMPTY_BACKWARD] if name.startswith("backward") else [EMPTY]
    rounds = zip(found[name][way], *(found[other]["seconds"] for other in least), strict=True)
    return statistics.median(mine - sum(others) for mine, *others in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repetitions", type=int, default=200)
    options = parser.parse_args()
    print(json.dumps(measure(options.rounds, options.repetitions)))


if __name__ == "__main__":
    main()
