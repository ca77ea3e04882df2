"""Matrix products of many groups in one launch, each group's matrices found by a stride or in a list of pointers.

`matmul_kernel` is persistent: its programs walk over the tiles of all groups, group by group. `summed_matmul_kernel` adds the
products of all groups to one another, the longest chain of additions a gradient has here: a tile is summed in a fixed
order in a few parts, and those in a fixed order, so that the bits are the same every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, dot_precision, launch, multiprocessors
from ...tiles import zeros
from .launch_table import matmul_config

_PARTS = 264  # of a summed product at least, two for each multiprocessor of a large GPU, where there is length enough
_SHORTEST_PART = 4  # tiles of the inner dimension


class Matrices(NamedTuple):
    """One operand of all groups: rows x columns as they lie in memory, columns side by side."""

    pointers: tuple[Tensor, ...]  # one tensor for each group, or one for all
    group: int  # elements from group to group of one tensor
    row: int  # elements from row to row


class Constants(NamedTuple):
    """What a kernel is compiled for. LISTED: an operand has a pointer for each group; TRANSPOSED: its rows and columns are exchanged;
    EVEN: sizes are whole tiles, or descriptors look after that; ALIGNED: matrices and rows start at multiples of 16 bytes."""

    A_LISTED: bool
    B_LISTED: bool
    A_TRANSPOSED: bool
    B_TRANSPOSED: bool
    EVEN_M: bool
    EVEN_N: bool
    EVEN_K: bool
    ALIGNED: bool
    DESCRIPTORS: bool
    PRECISION: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int


@triton.jit
def group_pointer(matrices, group, LISTED: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the matrix of one group starts."""
    if LISTED:
        address = matrices.pointers[0].to(tl.int64)
        for index in tl.static_range(1, len(matrices.pointers)):
            address = tl.where(group == index, matrices.pointers[index].to(tl.int64), address)
        p_matrix = address.to(matrices.pointers[0].dtype)
        if ALIGNED:
            p_matrix = tl.multiple_of(p_matrix, 16)
    else:
        p_matrix = matrices.pointers[0] + tl.cast(group, tl.int64) * matrices.group
    return p_matrix


@triton.jit
def tile_source(
    p_matrix,
    s_row,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    C: tl.constexpr,
):
    """What `load_tile` reads [BLOCK_R, BLOCK_C] of a matrix from, which lies TRANSPOSED or not: the pointer, or a tensor
    descriptor that gives zeros outside."""
    if not C.DESCRIPTORS:
        source = p_matrix
    elif TRANSPOSED:
        source = tl.make_tensor_descriptor(p_matrix, [columns, rows], [s_row, 1], [BLOCK_C, BLOCK_R])
    else:
        source = tl.make_tensor_descriptor(p_matrix, [rows, columns], [s_row, 1], [BLOCK_R, BLOCK_C])
    return source


@triton.jit
def load_tile(
    source,
    s_row,
    row,
    column,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile at (row, column), zeros outside: [BLOCK_R, BLOCK_C], or as many columns by rows."""
    if DESCRIPTORS:
        b_tile = source.load([row, column])
        if TRANSPOSED:
            b_tile = tl.trans(b_tile)
    else:
        # Transposed in the addresses: on sm_80 a tile turned afterwards is not loaded ahead.
        o_row = row + tl.arange(0, BLOCK_R)
        o_column = column + tl.arange(0, BLOCK_C)
        p_rows = source + tl.cast(o_row, tl.int64) * s_row
        if TRANSPOSED:
            p_tile = p_rows[None, :] + o_column[:, None]
            m_rows = (o_row < rows)[None, :]
            m_columns = (o_column < columns)[:, None]
        else:
            p_tile = p_rows[:, None] + o_column[None, :]
            m_rows = (o_row < rows)[:, None]
            m_columns = (o_column < columns)[None, :]
        if EVEN_R and EVEN_C:
            b_tile = tl.load(p_tile)
        elif EVEN_R:
            b_tile = tl.load(p_tile, mask=m_columns, other=0.0)
        elif EVEN_C:
            b_tile = tl.load(p_tile, mask=m_rows, other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_rows & m_columns, other=0.0)
    return b_tile


@triton.jit
def multiply(b_sum, a, s_a, b, s_b, row, column, begin, end, M, N, K, C: tl.constexpr):
    """Add a @ b to the tile [BLOCK_M, BLOCK_N] at (row, column), over tiles begin .. end of the inner dimension."""
    for tile in range(begin, end):
        k = tile * C.BLOCK_K
        # [BM, BLOCK_K]
        if C.A_TRANSPOSED:
            b_a = load_tile(a, s_a, k, row, K, M, C.BLOCK_K, C.BLOCK_M, C.EVEN_K, C.EVEN_M, True, C.DESCRIPTORS)
        else:
            b_a = load_tile(a, s_a, row, k, M, K, C.BLOCK_M, C.BLOCK_K, C.EVEN_M, C.EVEN_K, False, C.DESCRIPTORS)
        # [BLOCK_K, BN]
        if C.B_TRANSPOSED:
            b_b = load_tile(b, s_b, column, k, N, K, C.BLOCK_N, C.BLOCK_K, C.EVEN_N, C.EVEN_K, True, C.DESCRIPTORS)
        else:
            b_b = load_tile(b, s_b, k, column, K, N, C.BLOCK_K, C.BLOCK_N, C.EVEN_K, C.EVEN_N, False, C.DESCRIPTORS)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision=C.PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["groups"])
def matmul_kernel(a, b, bias, s_bias, out, s_out, s_out_row, groups, M, N, K, C: tl.constexpr):
    """out[g] = a[g] @ b[g] + bias[g]: (M, K) by (K, N)."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.cdiv(N, C.BLOCK_N)
    tiles = tl.cdiv(M, C.BLOCK_M) * columns
    for group in range(groups):
        # Tile t of all groups is program t % programs's: no program has two tiles more than another.
        first = (program + programs - (group * tiles) % programs) % programs
        if first < tiles:
            p_a = group_pointer(a, group, C.A_LISTED, C.ALIGNED)
            p_b = group_pointer(b, group, C.B_LISTED, C.ALIGNED)
            a_tiles = tile_source(p_a, a.row, M, K, C.BLOCK_M, C.BLOCK_K, C.A_TRANSPOSED, C)
            b_tiles = tile_source(p_b, b.row, K, N, C.BLOCK_K, C.BLOCK_N, C.B_TRANSPOSED, C)
            p_out = out + tl.cast(group, tl.int64) * s_out
            for tile in range(first, tiles, programs):
                # Along a row of tiles: programs side by side share rows of a, and the weights b stay in the L2 cache.
                row = (tile // columns) * C.BLOCK_M
                column = (tile % columns) * C.BLOCK_N
                # [BM, BN]
                b_sum = zeros(C.BLOCK_M, C.BLOCK_N)
                inner = tl.cdiv(K, C.BLOCK_K)
                b_sum = multiply(b_sum, a_tiles, a.row, b_tiles, b.row, row, column, 0, inner, M, N, K, C)
                o_m = row + tl.arange(0, C.BLOCK_M)
                o_n = column + tl.arange(0, C.BLOCK_N)
                if bias is not None:
                    b_bias = tl.load(bias + tl.cast(group, tl.int64) * s_bias + o_n, mask=o_n < N, other=0.0)
                    b_sum += b_bias.to(tl.float32)[None, :]
                p_tile = p_out + tl.cast(o_m, tl.int64)[:, None] * s_out_row + o_n[None, :]
                tl.store(p_tile, b_sum.to(out.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["groups", "group_parts"])
def summed_matmul_kernel(a, b, partials, groups, group_parts, inner_parts, M, N, K, C: tl.constexpr):
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
    # [BM, BN]
    b_sum = zeros(C.BLOCK_M, C.BLOCK_N)
    for group in range(groups * group_part // group_parts, groups * (group_part + 1) // group_parts):
        p_a = group_pointer(a, group, C.A_LISTED, C.ALIGNED)
        a_tiles = tile_source(p_a, a.row, M, K, C.BLOCK_M, C.BLOCK_K, True, C)
        p_b = group_pointer(b, group, False, C.ALIGNED)
        b_tiles = tile_source(p_b, b.row, K, N, C.BLOCK_K, C.BLOCK_N, False, C)
        b_sum = multiply(b_sum, a_tiles, a.row, b_tiles, b.row, row, column, begin, end, M, N, K, C)
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
    config, constants = _configure(operands, out, inner, transpose_a=transpose_a, transpose_b=transpose_b)
    tiles = groups * triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    launch(
        matmul_kernel,
        (min(tiles, 2 * multiprocessors(out.device)),),
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
    config, constants = _configure(operands, out, inner, transpose_a=True, transpose_b=False)
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
        C=constants,
    )
    out += partials.sum(0)


def matrices(operand: Tensor | Sequence[Tensor], groups: int) -> Matrices:
    """The Matrices of a tensor (G, rows, columns), of one (rows, columns) for all groups, or of a list of those."""
    if isinstance(operand, torch.Tensor):
        operand = operand if operand.stride(-1) == 1 else operand.contiguous()
        return Matrices((operand,), operand.stride(0) if operand.dim() == 3 else 0, operand.stride(-2))
    if any(x.stride(1) != 1 or x.stride(0) != operand[0].stride(0) for x in operand):
        return matrices(torch.stack(operand), groups)
    size, row = operand[0].element_size(), operand[0].stride(0)
    places = [x.data_ptr() for x in operand]
    step = places[1] - places[0] if groups > 1 else 0
    if step % size == 0 and all(y - x == step for x, y in pairwise(places)) and operand[0].device.type != "meta":
        return Matrices((operand[0],), step // size, row)
    return Matrices(tuple(operand), 0, row)


def _configure(operands, out, inner, transpose_a, transpose_b):
    """-> LaunchConfig, Constants."""
    dtype, name = operands[0].pointers[0].dtype, architecture(out.device)
    aligned = all(
        stride * pointer.element_size() % 16 == 0
        for matrices in operands
        for pointer in matrices.pointers
        for stride in (matrices.group, matrices.row, pointer.data_ptr() // pointer.element_size())
    )
    rows, columns = out.shape[-2:]
    config = matmul_config(architecture=name, dtype=dtype, rows=rows, aligned=aligned)
    sizes = ((rows, config.block_m), (columns, config.block_n), (inner, config.block_k))
    even = [config.descriptors or size % block == 0 for size, block in sizes]
    constants = Constants(
        A_LISTED=len(operands[0].pointers) > 1,
        B_LISTED=len(operands[1].pointers) > 1,
        A_TRANSPOSED=transpose_a,
        B_TRANSPOSED=transpose_b,
        EVEN_M=even[0],
        EVEN_N=even[1],
        EVEN_K=even[2],
        ALIGNED=aligned,
        DESCRIPTORS=config.descriptors,
        PRECISION=dot_precision(dtype, name),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return config, constants
