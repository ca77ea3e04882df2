"""Matrix products of many groups in one launch, each group's matrices found by a stride or in a list of pointers.

`matmul_kernel` is persistent: its programs walk over the tiles of all groups, group by group. `summed_matmul_kernel` adds the
products of all groups to one another, the longest chain of additions a gradient has here: a tile is summed in a fixed
order in a few parts, and those in a fixed order, so that the bits are the same every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, dot_precision, launch, multiprocessors
from ...tiles import zeros
from .launch_table import matmul_config
from .operands import LISTED, Reading, aligned, common_source, found, group_source, load_tile, matrices

_PARTS = 264  # of a summed product at least, two for each multiprocessor of a large GPU, where there is length enough
_SHORTEST_PART = 4  # tiles of the inner dimension


class Constants(NamedTuple):
    """What a kernel is compiled for beside a Reading of each operand, A and B. JOINED: the loop over tiles is one with that over the
    inner dimension, so that a program asks for its next tile's numbers before it has written a tile."""

    JOINED: bool
    PRECISION: str
    DESCRIPTORS: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int


@triton.jit
def as_it_lies(x, y, TRANSPOSED: tl.constexpr):
    """(x, y) of an operand as the product sees it, in the order of rows and columns in memory."""
    row, column = x, y
    if TRANSPOSED:
        row, column = y, x
    return row, column


@triton.jit
def common_sources(a, b, groups, M, N, K, A: tl.constexpr, B: tl.constexpr):
    """`common_source` of both operands."""
    a_rows, a_columns = as_it_lies(M, K, A.TRANSPOSED)
    b_rows, b_columns = as_it_lies(K, N, B.TRANSPOSED)
    return common_source(a, groups, a_rows, a_columns, A), common_source(b, groups, b_rows, b_columns, B)


@triton.jit
def multiply(
    b_sum,
    a,
    b,
    a_common,
    b_common,
    group,
    row,
    column,
    begin,
    end,
    M,
    N,
    K,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """Add a[group] @ b[group] to the tile [BLOCK_M, BLOCK_N] at (row, column), over tiles begin .. end of the inner dimension."""
    a_rows, a_columns = as_it_lies(M, K, A.TRANSPOSED)
    b_rows, b_columns = as_it_lies(K, N, B.TRANSPOSED)
    a_source, a_row, a_column = group_source(a, a_common, group, a_rows, a_columns, A)
    b_source, b_row, b_column = group_source(b, b_common, group, b_rows, b_columns, B)
    for tile in range(begin, end):
        k = tile * C.BLOCK_K
        # [BM, BLOCK_K]
        y, x = as_it_lies(row, k, A.TRANSPOSED)
        b_a = load_tile(a_source, a.row, group, a_row + y, a_column + x, a_rows, a_columns, A)
        # [BLOCK_K, BN]
        y, x = as_it_lies(k, column, B.TRANSPOSED)
        b_b = load_tile(b_source, b.row, group, b_row + y, b_column + x, b_rows, b_columns, B)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=C.PRECISION)
    return b_sum


@triton.jit
def write_tile(
    tile,
    a,
    b,
    a_common,
    b_common,
    bias,
    s_bias,
    out,
    s_out,
    s_out_row,
    M,
    N,
    K,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
):
    """One tile of the result; tiles are counted along rows of one group, then of the next."""
    columns = tl.cdiv(N, C.BLOCK_N)
    tiles = tl.cdiv(M, C.BLOCK_M) * columns
    group = tile // tiles
    # Along a row of tiles: programs side by side share rows of a, and the weights b stay in the L2 cache.
    row = (tile % tiles) // columns * C.BLOCK_M
    column = (tile % tiles) % columns * C.BLOCK_N
    # [BM, BN]
    b_sum = zeros(C.BLOCK_M, C.BLOCK_N)
    inner = tl.cdiv(K, C.BLOCK_K)
    b_sum = multiply(b_sum, a, b, a_common, b_common, group, row, column, 0, inner, M, N, K, A, B, C)
    o_m = row + tl.arange(0, C.BLOCK_M)
    o_n = column + tl.arange(0, C.BLOCK_N)
    if bias is not None:
        b_bias = tl.load(bias + tl.cast(group, tl.int64) * s_bias + o_n, mask=o_n < N, other=0.0)
        b_sum += b_bias.to(tl.float32)[None, :]
    p_out = out + tl.cast(group, tl.int64) * s_out
    p_tile = p_out + tl.cast(o_m, tl.int64)[:, None] * s_out_row + o_n[None, :]
    tl.store(p_tile, b_sum.to(out.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["groups"])
def matmul_kernel(
    a, b, bias, s_bias, out, s_out, s_out_row, groups, M, N, K, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr
):
    """out[g] = a[g] @ b[g] + bias[g]: (M, K) by (K, N). Tile t of all groups is program t % programs's."""
    a_common, b_common = common_sources(a, b, groups, M, N, K, A, B)
    tiles = groups * tl.cdiv(M, C.BLOCK_M) * tl.cdiv(N, C.BLOCK_N)
    if C.JOINED:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            write_tile(tile, a, b, a_common, b_common, bias, s_bias, out, s_out, s_out_row, M, N, K, A, B, C)
    else:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            write_tile(tile, a, b, a_common, b_common, bias, s_bias, out, s_out, s_out_row, M, N, K, A, B, C)


@triton.jit(do_not_specialize=["groups", "group_parts"])
def summed_matmul_kernel(
    a, b, partials, groups, group_parts, inner_parts, M, N, K, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr
):
    """partials[part] = the sum of a[g]^T @ b[g] over some groups and tiles of K: (K, M) and (K, N). Grid: (tiles, parts)."""
    columns = tl.cdiv(N, C.BLOCK_N)
    row = (tl.program_id(0) // columns) * C.BLOCK_M
    column = (tl.program_id(0) % columns) * C.BLOCK_N
    part = tl.program_id(1)
    group_part = part // inner_parts
    inner_part = part % inner_parts
    inner = tl.cdiv(K, C.BLOCK_K)
    begin = inner * inner_part // inner_parts
    end = inner * (inner_part + 1) // inner_parts
    a_common, b_common = common_sources(a, b, groups, M, N, K, A, B)
    # [BM, BN]
    b_sum = zeros(C.BLOCK_M, C.BLOCK_N)
    for group in range(groups * group_part // group_parts, groups * (group_part + 1) // group_parts):
        b_sum = multiply(b_sum, a, b, a_common, b_common, group, row, column, begin, end, M, N, K, A, B, C)
    o_m = row + tl.arange(0, C.BLOCK_M)
    o_n = column + tl.arange(0, C.BLOCK_N)
    p_tile = partials + (tl.cast(part, tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_sum, mask=(o_m < M)[:, None] & (o_n < N)[None, :])


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
    shared = isinstance(b, torch.Tensor) and b.dim() == 2
    rows, inner = a[0].shape[::-1] if transpose_a else a[0].shape
    columns = (b if shared else b[0]).shape[0 if transpose_b else 1]
    groups = len(a)
    if out is None:
        out = a[0].new_empty(groups, rows, columns)
    if out.numel() == 0:
        return out
    result = out
    if shared and isinstance(a, torch.Tensor) and not transpose_a and a.is_contiguous() and out.is_contiguous():
        # One tall matrix, so that no group ends within a tile.
        a, out, groups, rows = a.view(1, -1, inner), out.view(1, -1, columns), 1, groups * rows
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    if inner == 0:
        out.zero_() if bias is None else out.copy_(bias if bias.dim() == 1 else bias[:, None])
        return result
    operands = [matrices(x, groups) for x in (a, b)]
    config, readings, constants = _configure(operands, out, inner, transpose_a=transpose_a, transpose_b=transpose_b)
    tiles = groups * triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    launch(
        matmul_kernel,
        (min(tiles, config.programs * multiprocessors(out.device)),),
        config,
        *operands,
        bias,
        0 if bias is None or bias.dim() == 1 else bias.stride(0),
        out,
        *out.stride()[:2],
        groups,
        rows,
        columns,
        inner,
        A=readings[0],
        B=readings[1],
        C=constants,
    )
    return result


def summed_matmul(a: Tensor | Sequence[Tensor], b: Tensor, out: Tensor) -> None:
    """Add a[g]^T @ b[g] of all groups g to `out` (M, N) fp32. As `torch_backend.summed_matmul`."""
    groups, (inner, rows), columns = len(a), a[0].shape, b.shape[2]
    if inner == 0 or out.numel() == 0:
        return
    if isinstance(a, torch.Tensor) and a.is_contiguous() and b.is_contiguous():
        a, b, groups, inner = a.view(1, -1, rows), b.view(1, -1, columns), 1, groups * inner
    operands = [matrices(x, groups) for x in (a, b)]
    config, readings, constants = _configure(operands, out, inner, transpose_a=True, transpose_b=False)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    # By sizes alone: the order of additions, and so the bits, are those of any GPU.
    parts = triton.cdiv(_PARTS, tiles)
    group_parts = min(parts, groups)
    longest = max(1, triton.cdiv(inner, config.block_k) // _SHORTEST_PART)
    inner_parts = min(triton.cdiv(parts, group_parts), longest)
    partials = out.new_empty(group_parts * inner_parts, rows, columns)
    launch(
        summed_matmul_kernel,
        (tiles, group_parts * inner_parts),
        config,
        *operands,
        partials,
        groups,
        group_parts,
        inner_parts,
        rows,
        columns,
        inner,
        A=readings[0],
        B=readings[1],
        C=constants,
    )
    out += partials.sum(0)


def _configure(operands, out, inner, transpose_a, transpose_b):
    """-> LaunchConfig, the Reading of each operand, Constants."""
    dtype, name = operands[0].pointers[0].dtype, architecture(out.device)
    rows, columns = out.shape[-2:]
    all_aligned = all(map(aligned, operands))
    config = matmul_config(architecture=name, dtype=dtype, rows=rows, aligned=all_aligned)

    def reading(operand, size, block, transposed):
        sides = [(size % block == 0, block), (inner % config.block_k == 0, config.block_k)]
        if transposed:
            sides.reverse()
        (even_rows, block_r), (even_columns, block_c) = sides
        where = found(operand, even_rows and even_columns, config.descriptors)
        even = (config.descriptors or even_rows, config.descriptors or even_columns)
        return Reading(where, transposed, *even, all_aligned, config.descriptors, block_r, block_c)

    a = reading(operands[0], rows, config.block_m, transpose_a)
    b = reading(operands[1], columns, config.block_n, not transpose_b)
    constants = Constants(
        JOINED=config.joined and LISTED.value not in (a.FOUND, b.FOUND),
        PRECISION=dot_precision(dtype, name),
        DESCRIPTORS=config.descriptors,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return config, (a, b._replace(TRANSPOSED=transpose_b)), constants
