"""Attention of a few queries without gradients: one program for each batch row and key head reads its keys once.

Every chunk of keys, counted from key 0, has a softmax of its own, and chunks merge in their order. A program does both; where
programs are too few for the GPU, several share the chunks of a key head and a second launch merges: the same numbers in the
same order, so that neither the batch nor the number of splits changes a bit.
"""

from functools import cache

import torch
import triton

from ..launch import architecture, dot_precision, launch, multiprocessors
from .launch_table import combine_config, decode_config
from .triton_call import LONGEST_WINDOW, empty_like, gate_rows, rows, unit_stride
from .triton_decode_kernels import BESIDE_VALUES, combine_kernel, decode_kernel

MOST_QUERIES = 16
_UNSPLIT_CHUNKS = 4  # a program reads so many in about the time that a second launch takes


def decodes(q):
    """Whether `decode` takes these queries: there are few, and the launch table has a line for them."""
    call = dict(architecture=architecture(q.device), dtype=q.dtype, head_dim=q.shape[3], rows=1)
    return 1 <= q.shape[2] <= MOST_QUERIES and q.shape[0] > 0 and decode_config(**call) is not None


def decode(q, k, v, cross_k, cross_v, gate, key_mask, cross_mask, query_start, causal, scale, window, softcap, lse):
    """-> out, and with `lse` both log-sum-exps (B, Hq, S) fp32, else None twice. At least one query, one batch row."""
    batch, heads, queries, width = q.shape
    kv_heads, keys, cross_keys = k.shape[1], k.shape[2], cross_k.shape[2]
    group, crossing = heads // kv_heads, cross_keys > 0
    q, k, v, cross_k, cross_v = (unit_stride(x) for x in (q, k, v, cross_k, cross_v))
    out = empty_like(q)
    self_lse = cross_lse = None
    if lse:
        self_lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        cross_lse = self_lse.new_empty(self_lse.shape) if crossing else torch.full_like(self_lse, -torch.inf)

    arch = architecture(q.device)
    config = decode_config(architecture=arch, dtype=q.dtype, head_dim=width, rows=group * queries)
    start, stride, window, chunks = _place(query_start, queries, keys, window, causal, config.block_n)
    chunks += triton.cdiv(cross_keys, config.block_n)
    programs = batch * kv_heads * triton.cdiv(group * queries, config.block_m)
    splits = split_count(programs, chunks, q.device)
    partials = _nothing(q.device)
    if splits > 1:
        size = batch * heads * queries * chunks * (width + BESIDE_VALUES.value)
        partials = q.new_empty(size, dtype=torch.float32)
    results = gate_rows(gate, q), rows(out), self_lse, cross_lse
    masks = *_flags(key_mask), *_flags(cross_mask if crossing else None)
    sharing = batch // cross_k.shape[0]
    numbers = queries, keys, cross_keys, start, stride, 0 if window is None else window, scale, sharing
    constants = dict(
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        CAUSAL=causal,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        CROSS=crossing,
        START_PER_ROW=isinstance(start, torch.Tensor),
        BLOCK_N=config.block_n,
    )
    launch(
        decode_kernel,
        (programs, splits),
        config,
        *(rows(x) for x in (q, k, v, cross_k, cross_v)),
        *results,
        partials,
        *masks,
        *numbers,
        softcap or 0.0,
        chunks,
        splits,
        **constants,
        PRECISION=dot_precision(q.dtype, arch),
        BLOCK_M=config.block_m,
    )
    if splits > 1:
        config = combine_config(arch)
        launch(
            combine_kernel,
            (batch * kv_heads * triton.cdiv(group * queries, config.block_m),),
            config,
            partials,
            *results,
            *masks,
            *numbers,
            chunks,
            **constants,
            EXACT=q.dtype == torch.float32,
            BLOCK_M=config.block_m,
            CHUNKS=config.block_k,
        )
    return out, self_lse, cross_lse


def split_count(programs, chunks, device):
    """How many programs share a key head's chunks: 1 unless most of the GPU would be idle."""
    side_by_side = multiprocessors(device)
    if chunks <= _UNSPLIT_CHUNKS or programs >= 0.8 * side_by_side:
        return 1
    return max(1, min(side_by_side // programs, chunks))


def _place(query_start, queries, keys, window, causal, block):
    """-> the first query's key index, an int or a tensor with its stride, the window, and the most chunks that queries see.

    Nothing here decides what is compiled: the index changes with every token.
    """
    if not causal:
        return 0, 0, None, triton.cdiv(keys, block)
    if isinstance(query_start, torch.Tensor):
        stride = query_start.stride(0) if query_start.dim() else 0
        return query_start, stride, None if window is None else min(window, LONGEST_WINDOW), triton.cdiv(keys, block)
    start = keys - queries if query_start is None else query_start
    end, begin = min(start + queries, keys), 0
    if window is not None:
        # Past the last key only the distance to the window counts: both stay within the kernels' 32 bits.
        window = min(max(window - max(start - keys, 0), -LONGEST_WINDOW), LONGEST_WINDOW)
    start = min(start, keys)
    if window is not None:
        begin = min(max(start - window + 1, 0), end)
    return start, 0, window, triton.cdiv(end, block) - begin // block


def _flags(mask):
    """A mask with unit last stride, and its other stride."""
    if mask is None:
        return None, 0
    mask = unit_stride(mask)
    return mask, mask.stride(0)


@cache
def _nothing(device):
    """What stands for the partial results of a call without splits: its kernel is the same."""
    return torch.empty(1, dtype=torch.float32, device=device)
