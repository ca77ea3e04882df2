"""Products for `backend="auto"`: by PyTorch's library (cuBLAS), where it can express them in one call, else by this folder's kernels.

What it can: half precision, one tensor or a stack of them on either side. Lists of weights would be a call each, of which one
does not fill a GPU (GQA: 64 tiles for 132 multiprocessors), and a bias for each group is written out and read again first (64
groups of 2,048 tokens and width 1,024: 537 MB, by the floors 125 us beside a product of 700); both stay with the kernels. So do
fp32, whose library calls leave tensor cores unused unless torch.set_float32_matmul_precision allows less exact ones, and users
of torch.use_deterministic_algorithms, for whom the library raises without a setting of the environment.

The library chooses its algorithm by the shapes: the same call gives the same bits, but those of a token may depend on how many
others there are. With `backend="triton"` they never do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import matmul as kernels
from .operands import aligned, matrices


def matmul(
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """a[g] @ b[g] + bias[g] for all groups g -> (G, M, N), in `out` where given. As `torch_backend.matmul`."""
    if _serves(a, b):
        left, right = a.mT if transpose_a else a, b.mT if transpose_b else b
        if out is None:
            out = a.new_empty(len(a), left.shape[1], right.shape[-1])
        if b.dim() == 3:
            if bias is None:
                return torch.bmm(left, right, out=out)
            if not (aligned(matrices(a, len(a))) and aligned(matrices(b, len(a)))):
                return torch.baddbmm(bias[:, None], left, right, out=out)  # the kernels read two bytes at a time there
        elif left.is_contiguous() and out.is_contiguous():
            tall, into = left.view(-1, left.shape[2]), out.view(-1, out.shape[2])
            torch.mm(tall, right, out=into) if bias is None else torch.addmm(bias, tall, right, out=into)
            return out
    return kernels.matmul(a, b, bias, transpose_a=transpose_a, transpose_b=transpose_b, out=out)


def summed_matmul(a: Tensor | Sequence[Tensor], b: Tensor, out: Tensor) -> None:
    """Add a[g]^T @ b[g] of all groups g to `out` (M, N) fp32. As `torch_backend.summed_matmul`."""
    if _serves(a, b) and a.is_cuda and torch.version.hip is None and a.is_contiguous() and b.is_contiguous():
        out += torch.mm(a.view(-1, a.shape[2]).T, b.view(-1, b.shape[2]), out_dtype=torch.float32)
    else:
        kernels.summed_matmul(a, b, out)


def _serves(a, b):
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or torch.are_deterministic_algorithms_enabled():
        return False
    return a.dtype in (torch.float16, torch.bfloat16)
