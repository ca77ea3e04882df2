"""Sizes and random tensors of the attention benchmarks, and the work that no implementation can do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.cases import Case
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """queries S of q stand behind keys N - S of k and v, causally; cross: T."""

    batch: int
    heads: int
    kv_heads: int
    width: int
    queries: int
    keys: int
    cross: int

    def __str__(self) -> str:
        names = f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.width}"
        return f"{super().__str__()} {names} S{self.queries} N{self.keys} T{self.cross}"

    @property
    def sizes(self) -> dict[str, int]:
        """By the letter that reports call them."""
        numbers = (self.batch, self.heads, self.kv_heads, self.width, self.queries, self.keys, self.cross)
        return dict(zip(("B", "Hq", "Hkv", "D", "S", "N", "T"), numbers, strict=True))

    def small(self) -> AttentionCase:
        """For --small."""
        lengths = {name: max(2, getattr(self, name) // 16) for name in ("keys", "cross")}
        queries = 1 if self.queries == 1 else lengths["keys"]
        return dataclasses.replace(self, batch=2, width=min(self.width, 32), queries=queries, **lengths)

    def forward_flops(self) -> int:
        """Two products of D for each pair of a query and a key that it attends to: S (S + 1) / 2 of the causal S x S."""
        pairs = self.queries * (self.keys + self.cross) - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * self.width * pairs

    def backward_flops(self) -> int:
        """Five products: the scores again, and what the gradients of weights, q, k and v take. Kernels without atomics
        that keep no scores do seven, 7/5 of this."""
        return self.forward_flops() * 5 // 2

    def key_value_bytes(self) -> int:
        """k, v, cross_k and cross_v, each once: what decoding reads."""
        return 2 * self.batch * self.kv_heads * (self.keys + self.cross) * self.width * self.dtype.itemsize

    def query_bytes(self) -> int:
        """Of q, and as much of the output and the gradients of both."""
        return self.batch * self.heads * self.queries * self.width * self.dtype.itemsize

    def forward_bytes(self) -> int:
        """Keys, values and q read, the output written; the two log-sum-exps of a training step are 1 % more."""
        return self.key_value_bytes() + 2 * self.query_bytes()

    def backward_bytes(self) -> int:
        """The forward's and the output's gradient read, the other gradients written."""
        return 2 * self.key_value_bytes() + 4 * self.query_bytes()

    def inputs(self, *, trained: bool = False) -> list[Tensor]:
        """q (B, Hq, S, D), k and v (B, Hkv, N, D), cross_k and cross_v (B, Hkv, T, D) and gate (1,), with gradients where
        `trained`.

        Softmaxes of scores around 3 pick out few keys: each output element is near 1, as the error's yardstick is, and
        cross values of mean 1/2 keep the gate's gradient, a sum over everything, from cancelling.
        """
        shapes = [(self.heads, self.queries), *[(self.kv_heads, self.keys)] * 2, *[(self.kv_heads, self.cross)] * 2]
        tensors = [self.draw(self.batch, heads, length, self.width) for heads, length in shapes]
        tensors[0] *= 3
        tensors[4] += 0.5
        gate = torch.full((1,), 0.75, dtype=self.dtype, device=self.device)
        return [x.requires_grad_(trained) for x in (*tensors, gate)]

    def output_gradient(self) -> Tensor:
        """(B, Hq, S, D)."""
        return self.draw(self.batch, self.heads, self.queries, self.width) + 0.5


def results_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """[output], followed by the gradients of all inputs where the output's is given."""
    out = function(*inputs)
    if grad is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def exact_results(
    case: AttentionCase, inputs: Sequence[Tensor], grad: Tensor | None = None, **by_row: Tensor
) -> list[Tensor]:
    """`results_of` in fp64, a key head of a row at a time: all scores together take gigabytes.

    by_row: further arguments of the reference, each with a row of its own for every row of the batch.
    """
    group = case.heads // case.kv_heads
    *tensors, gate = (x.detach().double() for x in inputs)
    parts = []
    for row, head in product(range(case.batch), range(case.kv_heads)):
        theirs, queries = slice(head, head + 1), slice(head * group, (head + 1) * group)
        heads = [queries, *[theirs] * 4]
        leaves = [x[row : row + 1, h] for x, h in zip(tensors, heads, strict=True)] + [gate]
        leaves = [x.detach().requires_grad_(grad is not None) for x in leaves]
        part_grad = None if grad is None else grad[row : row + 1, queries].double()
        options = {name: x[row : row + 1] for name, x in by_row.items()}
        parts.append(results_of(partial(_reference, **options), leaves, part_grad))
    results = [torch.cat(x).view(case.batch, -1, *x[0].shape[2:]) for x in list(zip(*parts, strict=True))[:6]]
    return results if grad is None else [*results, sum(part[6] for part in parts)]


def _reference(*inputs, **options):
    return adaptive_fusion_attention_reference(*inputs, **options, upcast=False)


def on_cpu(kv_heads: int, length: int) -> AttentionCase:
    """A small LLM's attention in fp32 over a text of that length."""
    sizes = {"batch": 4, "heads": 9, "width": 64, "cross": 64}
    return AttentionCase(device="cpu", dtype=torch.float32, kv_heads=kv_heads, queries=length, keys=length, **sizes)


def on_gpu(kv_heads: int, length: int, cross: int, batch: int = 8) -> AttentionCase:
    """A 7B LLM's attention in bf16 over a text of that length."""
    sizes = {"batch": batch, "heads": 32, "width": 128, "cross": cross}
    return AttentionCase(device="cuda", dtype=torch.bfloat16, kv_heads=kv_heads, queries=length, keys=length, **sizes)


def last_token(case: AttentionCase) -> AttentionCase:
    """The case's decoding step: one query behind all keys."""
    return dataclasses.replace(case, queries=1)


SIZES = {"b": ["batch"], "d": ["width"], "n": ["keys"], "s": ["queries", "keys"], "t": ["cross"]}


def swept(base: AttentionCase, letter: str, *values: int) -> dict[str, AttentionCase]:
    """{"cpu_s128": the case with S = N = 128, ...}: cases that differ in one size alone are what plots are drawn over."""
    machine = {"cpu": "cpu", "cuda": "gpu"}[base.device]
    return {
        f"{machine}_{letter}{value}": dataclasses.replace(base, **dict.fromkeys(SIZES[letter], value))
        for value in values
    }


# Of the default run: on a GPU (a), (b) and (c) of a 7B LLM, on a CPU a small one's.
CASES = {
    "cpu_gqa": on_cpu(3, 192),
    "cpu_mha": on_cpu(9, 192),
    **swept(on_cpu(3, 192), "s", 64, 512),
    "gpu_a_mha": on_gpu(32, 512, 256),
    "gpu_a_gqa": on_gpu(8, 512, 256),
    "gpu_b_mha": on_gpu(32, 1024, 512),
}
SMALL, LARGE = CASES["cpu_gqa"], CASES["gpu_a_mha"]
SWEEP = {
    **swept(SMALL, "s", 128, 1024),
    **swept(SMALL, "t", 256),
    **swept(SMALL, "d", 128),
    **swept(LARGE, "s", 128, 2048, 4096),
    **swept(LARGE, "d", 64),
}
# Gradients are not swept over these: the time goes into compiling FlexAttention's.
FORWARD_SWEEP = {
    **swept(SMALL, "b", 16),
    **swept(LARGE, "s", 1024),
    **swept(LARGE, "t", 64, 1024),
    **swept(LARGE, "d", 256),
    "gpu_mqa": on_gpu(1, 512, 256),
    **swept(LARGE, "b", 1, 32),
}
DECODING = {
    "cpu_gqa": last_token(on_cpu(3, 192)),
    "cpu_mha": last_token(on_cpu(9, 192)),
    "gpu_c_gqa": last_token(on_gpu(8, 1024, 256, batch=32)),
    "gpu_c_mha": last_token(on_gpu(32, 1024, 256, batch=32)),
}
DECODING_SWEEP = {
    **swept(DECODING["cpu_gqa"], "n", 1024),
    **swept(DECODING["cpu_gqa"], "b", 16),
    **swept(DECODING["gpu_c_gqa"], "n", 256, 4096, 16384),
    **swept(DECODING["gpu_c_gqa"], "b", 1, 8),
    "gpu_mqa": last_token(on_gpu(1, 1024, 256, batch=32)),
}
