"""Sizes and random tensors of the attention benchmarks, and the work that no implementation can do without."""

import dataclasses
from dataclasses import dataclass
from itertools import product

import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference


@dataclass(frozen=True, kw_only=True)
class Case:
    """queries S of q stand behind keys N - S of k and v, causally; cross: T."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    width: int
    queries: int
    keys: int
    cross: int

    def __str__(self):
        names = f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.width}"
        lengths = f"S{self.queries} N{self.keys} T{self.cross}"
        return f"{self.device} {str(self.dtype).removeprefix('torch.')} {names} {lengths}"

    @property
    def sizes(self):
        numbers = (self.batch, self.heads, self.kv_heads, self.width, self.queries, self.keys, self.cross)
        return dict(zip(("B", "Hq", "Hkv", "D", "S", "N", "T"), numbers, strict=True))

    def small(self):
        lengths = {name: max(2, getattr(self, name) // 16) for name in ("keys", "cross")}
        queries = 1 if self.queries == 1 else lengths["keys"]
        return dataclasses.replace(self, batch=2, width=min(self.width, 32), queries=queries, **lengths)

    def forward_flops(self):
        """Two products of D for each pair of a query and a key that it attends to: S (S + 1) / 2 of the causal S x S."""
        pairs = self.queries * (self.keys + self.cross) - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * self.width * pairs

    def backward_flops(self):
        """Five products: the scores again, and what the gradients of weights, q, k and v take. Kernels without atomics
        that keep no scores do seven, 7/5 of this."""
        return self.forward_flops() * 5 // 2

    def key_value_bytes(self):
        """k, v, cross_k and cross_v, each once: what decoding reads."""
        return 2 * self.batch * self.kv_heads * (self.keys + self.cross) * self.width * self.dtype.itemsize

    def query_bytes(self):
        """Of q, and as much of the output and the gradients of both."""
        return self.batch * self.heads * self.queries * self.width * self.dtype.itemsize

    def forward_bytes(self):
        """Keys, values and q read, the output written; the two log-sum-exps of a training step are 1 % more."""
        return self.key_value_bytes() + 2 * self.query_bytes()

    def backward_bytes(self):
        """The forward's and the output's gradient read, the other gradients written."""
        return 2 * self.key_value_bytes() + 4 * self.query_bytes()

    def inputs(self, *, trained=False):
        """q, k, v, cross_k, cross_v and gate, with gradients where `trained`.

        Softmaxes of scores around 3 pick out few keys: each output element is near 1, as the error's yardstick is, and
        cross values of mean 1/2 keep the gate's gradient, a sum over everything, from cancelling.
        """
        shapes = [(self.heads, self.queries), *[(self.kv_heads, self.keys)] * 2, *[(self.kv_heads, self.cross)] * 2]
        tensors = [self.draw(self.batch, heads, length, self.width) for heads, length in shapes]
        tensors[0] *= 3
        tensors[4] += 0.5
        gate = torch.full((1,), 0.75, dtype=self.dtype, device=self.device)
        return [x.requires_grad_(trained) for x in (*tensors, gate)]

    def output_gradient(self):
        return self.draw(self.batch, self.heads, self.queries, self.width) + 0.5

    def draw(self, *shape):
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def results_of(function, inputs, grad=None):
    """[output], followed by the gradients of all inputs where the output's is given."""
    out = function(*inputs)
    if grad is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def exact_results(case, inputs, grad=None):
    """`results_of` in fp64, a key head of a row at a time: all scores together take gigabytes."""
    group = case.heads // case.kv_heads
    *tensors, gate = (x.detach().double() for x in inputs)
    parts = []
    for row, head in product(range(case.batch), range(case.kv_heads)):
        theirs, queries = slice(head, head + 1), slice(head * group, (head + 1) * group)
        heads = [queries, *[theirs] * 4]
        leaves = [x[row : row + 1, h] for x, h in zip(tensors, heads, strict=True)] + [gate]
        leaves = [x.detach().requires_grad_(grad is not None) for x in leaves]
        part_grad = None if grad is None else grad[row : row + 1, queries].double()
        parts.append(results_of(_reference, leaves, part_grad))
    results = [torch.cat(x).view(case.batch, -1, *x[0].shape[2:]) for x in list(zip(*parts, strict=True))[:6]]
    return results if grad is None else [*results, sum(part[6] for part in parts)]


def _reference(*inputs):
    return adaptive_fusion_attention_reference(*inputs, upcast=False)


def causal(device, dtype, batch, heads, kv_heads, width, length, cross):
    return Case(
        device=device,
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        queries=length,
        keys=length,
        cross=cross,
    )


def last_token(case):
    """The case's decoding step: one query behind all keys."""
    return dataclasses.replace(case, queries=1)


CPU, GPU = ("cpu", torch.float32), ("cuda", torch.bfloat16)
# Of the default run: on a GPU (a), (b) and (c) of a 7B LLM, on a CPU a small one's.
CASES = {
    "cpu_gqa": causal(*CPU, 4, 9, 3, 64, 192, 64),
    "cpu_mha": causal(*CPU, 4, 9, 9, 64, 192, 64),
    "cpu_s64": causal(*CPU, 4, 9, 3, 64, 64, 64),
    "cpu_s512": causal(*CPU, 4, 9, 3, 64, 512, 64),
    "gpu_a_mha": causal(*GPU, 8, 32, 32, 128, 512, 256),
    "gpu_a_gqa": causal(*GPU, 8, 32, 8, 128, 512, 256),
    "gpu_b_mha": causal(*GPU, 8, 32, 32, 128, 1024, 512),
}
# One size differs from a case above: it is what plots are drawn over.
SWEEP = {
    "cpu_s128": causal(*CPU, 4, 9, 3, 64, 128, 64),
    "cpu_s1024": causal(*CPU, 4, 9, 3, 64, 1024, 64),
    "cpu_t256": causal(*CPU, 4, 9, 3, 64, 192, 256),
    "cpu_d128": causal(*CPU, 4, 9, 3, 128, 192, 64),
    "gpu_s128": causal(*GPU, 8, 32, 32, 128, 128, 256),
    "gpu_s2048": causal(*GPU, 8, 32, 32, 128, 2048, 256),
    "gpu_s4096": causal(*GPU, 8, 32, 32, 128, 4096, 256),
    "gpu_d64": causal(*GPU, 8, 32, 32, 64, 512, 256),
}
# Gradients are not swept over these: the time goes into compiling FlexAttention's.
FORWARD_SWEEP = {
    "cpu_b16": causal(*CPU, 16, 9, 3, 64, 192, 64),
    "gpu_s1024": causal(*GPU, 8, 32, 32, 128, 1024, 256),
    "gpu_t64": causal(*GPU, 8, 32, 32, 128, 512, 64),
    "gpu_t1024": causal(*GPU, 8, 32, 32, 128, 512, 1024),
    "gpu_d256": causal(*GPU, 8, 32, 32, 256, 512, 256),
    "gpu_mqa": causal(*GPU, 8, 32, 1, 128, 512, 256),
    "gpu_b1": causal(*GPU, 1, 32, 32, 128, 512, 256),
    "gpu_b32": causal(*GPU, 32, 32, 32, 128, 512, 256),
}
DECODING = {
    "cpu_gqa": last_token(causal(*CPU, 4, 9, 3, 64, 192, 64)),
    "cpu_mha": last_token(causal(*CPU, 4, 9, 9, 64, 192, 64)),
    "gpu_c_gqa": last_token(causal(*GPU, 32, 32, 8, 128, 1024, 256)),
    "gpu_c_mha": last_token(causal(*GPU, 32, 32, 32, 128, 1024, 256)),
}
DECODING_SWEEP = {
    "cpu_n1024": last_token(causal(*CPU, 4, 9, 3, 64, 1024, 64)),
    "cpu_b16": last_token(causal(*CPU, 16, 9, 3, 64, 192, 64)),
    "gpu_n256": last_token(causal(*GPU, 32, 32, 8, 128, 256, 256)),
    "gpu_n4096": last_token(causal(*GPU, 32, 32, 8, 128, 4096, 256)),
    "gpu_n16384": last_token(causal(*GPU, 32, 32, 8, 128, 16384, 256)),
    "gpu_b1": last_token(causal(*GPU, 1, 32, 8, 128, 1024, 256)),
    "gpu_b8": last_token(causal(*GPU, 8, 32, 8, 128, 1024, 256)),
    "gpu_mqa": last_token(causal(*GPU, 32, 32, 1, 128, 1024, 256)),
}


def cases_here(*groups):
    """Those of the groups that this machine is measured at, by name."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: case for group in groups for name, case in group.items() if case.device == here}
