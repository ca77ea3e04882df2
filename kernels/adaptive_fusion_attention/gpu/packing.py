"""`packing.repaired` in one launch for both bounds of a call, which also notes that there was something to repair.

The note is a word of host memory that the kernel writes: no later call waits for it, and the first one that finds it raises.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import malformed
from ...launch import LaunchConfig, launch
from ...plans import fresh, lasting
from ..call import Call

_CONFIG = LaunchConfig(block_m=1, block_n=256, warps=4, stages=1)  # bounds at a time


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def repair(bounds, out, fault, sequences, length, BLOCK_N: tl.constexpr):
    """Write bounds[0] .. bounds[sequences] to `out` repaired, and 1 to `fault` where that changed any."""
    reached = 0
    wrong = 0
    for first in range(0, sequences + 1, BLOCK_N):
        # [BN]
        o_bound = first + tl.arange(0, BLOCK_N)
        m_bound = o_bound <= sequences
        b_given = tl.load(bounds + o_bound, mask=m_bound, other=0)
        b_bound = tl.where(o_bound == 0, 0, tl.minimum(tl.maximum(b_given, 0), length))
        b_bound = tl.maximum(tl.associative_scan(b_bound, 0, larger), reached)
        b_bound = tl.where(o_bound == sequences, length, b_bound)
        tl.store(out + o_bound, b_bound, mask=m_bound)
        reached = tl.max(b_bound, 0)
        wrong += tl.sum((m_bound & (b_bound != b_given)).to(tl.int32), 0)
    if wrong > 0:
        tl.store(fault, 1)


@triton.jit(do_not_specialize=["sequences", "length", "cross_length"])
def repair_bounds_kernel(
    bounds, cross_bounds, out, cross_out, faults, sequences, length, cross_length, BLOCK_N: tl.constexpr
):
    """One of the two bounds a program; faults: a number for each."""
    if tl.program_id(0) == 0:
        repair(bounds, out, faults, sequences, length, BLOCK_N)
    else:
        repair(cross_bounds, cross_out, faults + 1, sequences, cross_length, BLOCK_N)


def repaired_bounds(call: Call) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both bounds of a call as its kernels may read them, (n + 1,) int32 and contiguous, (None, None) without packing."""
    if call.cu_seqlens is None:
        return None, None
    faults = _faults(call.q.device)
    given = call.cu_seqlens.contiguous(), call.cross_cu_seqlens.contiguous()
    out = fresh(torch.empty_like(given[0])), fresh(torch.empty_like(given[1]))
    lengths = call.q.shape[2], call.cross_k.shape[2]
    sequences = given[0].shape[0] - 1
    launch(repair_bounds_kernel, (2,), _CONFIG, *given, *out, faults, sequences, *lengths, BLOCK_N=_CONFIG.block_n)
    return out


def raise_faults(device: torch.device) -> None:
    """Raises ValueError once where an earlier call on this device, by now finished, had bounds that needed repair."""
    faults = _faults(device)
    if faults.device.type == "meta" or not any(found := faults.tolist()):
        return
    faults.zero_()
    name = "cu_seqlens" if found[0] else "cross_cu_seqlens"
    got = "bounds in an earlier call that do not start at 0, fall or do not end at the length"
    raise malformed(name, got, "good ones (it read them cut to the length, each at least the one before)")


@cache
def _faults(device):
    """Two words that kernels on the device write and the host reads without asking the device."""
    place = {"pin_memory": True} if device.type == "cuda" else {"device": device}
    with torch.inference_mode(False):  # where it is first asked for must not matter to who writes to it
        return lasting(torch.zeros(2, dtype=torch.int32, **place))
