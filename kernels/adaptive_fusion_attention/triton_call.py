"""From the arguments of `adaptive_fusion_attention` to those of its kernels."""

from typing import NamedTuple

import torch
import triton

from .. import autotuning
from ..launch import LaunchConfig, architecture, dot_precision, launch
from .launch_table import launch_candidates, launch_config
from .triton_tiles import list_used_tiles_kernel

# What a tuned configuration depends on besides sizes.
_TUNED_BY = ("GROUP", "CAUSAL", "WINDOWED", "CAPPED")
LONGEST_WINDOW = 2**30  # the kernels add it to lengths in 32 bits


class Rows(NamedTuple):
    """A (B, H, S, D) tensor with unit last stride, or a (B, H, S) one: its pointer and other strides."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int


class Slots(NamedTuple):
    """A (B, N) mask and its lists of the tiles that hold a True: see `list_used_tiles_kernel`."""

    mask: torch.Tensor
    stride: int
    tiles: torch.Tensor
    ranks: torch.Tensor


def rows(x):
    return Rows(x, *x.stride()[:3])


def rows_or_none(x):
    return None if x is None else rows(x)


def unit_stride(x):
    """x itself, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_like(x):
    """As x, with a contiguous last dimension: the kernels write in the order of memory."""
    return torch.empty_like(unit_stride(x))


def gate_rows(gate, q):
    """The gate as (B, Hq, S) by strides alone."""
    if gate.dim() == 1:
        return Rows(gate, 0, gate.stride(0) if gate.shape[0] > 1 else 0, 0)
    return rows(gate.expand(q.shape[:3]))


def used_slots(mask, bounds, sequences, block):
    """The tiles of `block` slots that a mask leaves to visit; None for no mask."""
    if mask is None:
        return None
    mask = unit_stride(mask)
    count, length = mask.shape
    if bounds is None:
        sequences = count
        places = count * triton.cdiv(length, block)
    else:
        places = length // block + sequences
    tiles = torch.empty(places, dtype=torch.int32, device=mask.device)
    ranks = torch.empty(places + sequences, dtype=torch.int32, device=mask.device)
    config = LaunchConfig(block_m=1, block_n=block, warps=4, stages=1)
    stride = mask.stride(0)
    launch(list_used_tiles_kernel, (sequences,), config, mask, stride, bounds, length, tiles, ranks, BLOCK_N=block)
    return Slots(mask, stride, tiles, ranks)


def geometry(q, k, cross_k, query_start, cu_seqlens, cross_cu_seqlens, causal, scale, window, softcap):
    """-> the arguments and constants that all attention kernels share."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if cu_seqlens is not None:
        query_start = 0
    elif query_start is None:
        query_start = keys - queries
    per_row = isinstance(query_start, torch.Tensor)
    if per_row:
        query_start = query_start.expand(batch).contiguous()
        windowed = window is not None
        window = min(window, LONGEST_WINDOW) if windowed else 0
    else:
        # Past the last key only the distance to the window counts: both stay within the kernels' 32 bits.
        windowed = window is not None and window < query_start + queries
        window = max(window - max(query_start - keys, 0), -LONGEST_WINDOW) if windowed else 0
        query_start = min(query_start, keys)
    arguments = (
        cu_seqlens,
        cross_cu_seqlens,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        queries,
        keys,
        cross_k.shape[2],
        query_start,
        window,
        scale,
        softcap or 0.0,
    )
    constants = dict(
        HEADS=heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        CAUSAL=causal,
        WINDOWED=windowed,
        CAPPED=softcap is not None,
        START_PER_ROW=per_row,
        PRECISION=dot_precision(q.dtype, architecture(q.device)),
    )
    return arguments, constants


def tile_count(length, bounds, block):
    """Programs per head: whole tiles of every sequence."""
    return triton.cdiv(length, block) if bounds is None else length // block + bounds.shape[0] - 1


def start(kernel, run, q, k, cross_k, bounds, constants, plain):
    """run(config) with the launch table's configuration, or the fastest of its lines where LAYALIGN_AUTOTUNE=1.

    Lengths of packed sequences are unknown and must not decide: the bits of one do not depend on what it is packed with.
    """
    length = None if bounds is not None else q.shape[2]
    call = dict(architecture=architecture(q.device), dtype=q.dtype, head_dim=q.shape[3], length=length, plain=plain)
    config = launch_config(kernel, **call)
    if autotuning.enabled() and q.device.type == "cuda":
        sizes = [] if bounds is not None else [triton.next_power_of_2(x.shape[2]) for x in (q, k, cross_k)]
        key = call | {"length": sizes} | {name: str(constants[name]) for name in _TUNED_BY}
        config = autotuning.tuned(kernel, key | {"dtype": str(q.dtype)}, launch_candidates(kernel, **call), run)
    run(config)


def is_plain(tensors, key_mask, cross_mask, bounds, constants):
    """Whether a call reads whole tiles only, by strides that tensor descriptors take."""
    if any(x is not None for x in (key_mask, cross_mask, bounds)) or constants["WINDOWED"] or constants["CAPPED"]:
        return False
    # Descriptors address multiples of 16 bytes.
    return all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in tensors
    )
