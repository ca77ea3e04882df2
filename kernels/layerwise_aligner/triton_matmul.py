"""Matrix products of many groups in one launch, each group's matrices found by a stride or in a list of pointers.

`matmul_kernel` is persistent: its programs walk over the tiles of all groups, group by group. `summed_matmul_kernel` adds the
products of all groups to one another, the longest chain of additions a gradient has here: a tile is summed in a fixed
order in a few parts, and those in a fixed order, so that the bits are the same every run.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import architecture, dot_precision, launch, multiprocessors
from .launch_table import matmul_config

_PARTS = 264  # of a summed product at least, two for each multiprocessor of a large GPU, where there is length enough
_SHORTEST_PART = 4  # tiles of the inner dimension


class Matrices(NamedTuple):
    """One operand of all groups: rows x columns as they lie in memory, columns side by side."""

    pointers: tuple  # one tensor for each group, or one for all
    group: int  # elements from group to group of one tensor
    row: int  # elements from row to row


@triton.jit
def group_pointer(matrices, group, LISTED: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the matrix of one group starts."""
    if LISTED:
        address = matrices.pointers[0].to(tl.int64)
        for index in tl.static_range(1, len(matrices.pointers)):
            address = tl.where(group == index, matrices.pointers[index].to(tl.int64), address)
        pointer = address.to(matrices.pointers[0].dtype)
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
    else:
        pointer = matrices.pointers[0] + tl.cast(group, tl.int64) * matrices.group
    return pointer


@triton.jit
def tile_source(
    pointer, row_stride, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """What `load_tile` reads from: the pointer, or a tensor descriptor that gives zeros outside."""
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(pointer, [rows, columns], [row_stride, 1], [BLOCK_R, BLOCK_C])
    else:
        source = pointer
    return source


@triton.jit
def load_tile(
    source,
    row_stride,
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
        tile = source.load([row, column])
        if TRANSPOSED:
            tile = tl.trans(tile)
    else:
        # Transposed in the addresses: on sm_80 a tile turned afterwards is not loaded ahead.
        r = row + tl.arange(0, BLOCK_R)
        c = column + tl.arange(0, BLOCK_C)
        starts = source + tl.cast(r, tl.int64) * row_stride
        if TRANSPOSED:
            pointers = starts[None, :] + c[:, None]
            r_used = (r < rows)[None, :]
            c_used = (c < columns)[:, None]
        else:
            pointers = starts[:, None] + c[None, :]
            r_used = (r < rows)[:, None]
            c_used = (c < columns)[None, :]
        if EVEN_R and EVEN_C:
            tile = tl.load(pointers)
        elif EVEN_R:
            tile = tl.load(pointers, mask=c_used, other=0.0)
        elif EVEN_C:
            tile = tl.load(pointers, mask=r_used, other=0.0)
        else:
            tile = tl.load(pointers, mask=r_used & c_used, other=0.0)
    return tile


@triton.jit
def multiply(
    accumulator,
    a,
    a_stride,
    b,
    b_stride,
    row,
    column,
    begin,
    end,
    M,
    N,
    K,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add a @ b to the tile [BLOCK_M, BLOCK_N] at (row, column), over tiles begin .. end of the inner dimension."""
    for tile in range(begin, end):
        k = tile * BLOCK_K
        if A_TRANSPOSED:
            b_a = load_tile(a, a_stride, k, row, K, M, BLOCK_K, BLOCK_M, EVEN_K, EVEN_M, True, DESCRIPTORS)
        else:
            b_a = load_tile(a, a_stride, row, k, M, K, BLOCK_M, BLOCK_K, EVEN_M, EVEN_K, False, DESCRIPTORS)
        if B_TRANSPOSED:
            b_b = load_tile(b, b_stride, column, k, N, K, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, True, DESCRIPTORS)
        else:
            b_b = load_tile(b, b_stride, k, column, K, N, BLOCK_K, BLOCK_N, EVEN_K, EVEN_N, False, DESCRIPTORS)
        accumulator = tl.dot(b_a, b_b, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["groups"])
def matmul_kernel(
    a,
    b,
    bias,
    bias_group,
    out,
    out_group,
    out_row,
    groups,
    M,
    N,
    K,
    A_LISTED: tl.constexpr,
    B_LISTED: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[g] = a[g] @ b[g] + bias[g]: (M, K) by (K, N)."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * columns
    for group in range(groups):
        # Tile t of all groups is program t % programs's: no program has two tiles more than another.
        first = (program + programs - (group * tiles) % programs) % programs
        if first < tiles:
            a_group = group_pointer(a, group, A_LISTED, ALIGNED)
            b_group = group_pointer(b, group, B_LISTED, ALIGNED)
            if A_TRANSPOSED:
                a_source = tile_source(a_group, a.row, K, M, BLOCK_K, BLOCK_M, DESCRIPTORS)
            else:
                a_source = tile_source(a_group, a.row, M, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
            if B_TRANSPOSED:
                b_source = tile_source(b_group, b.row, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
            else:
                b_source = tile_source(b_group, b.row, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS)
            out_start = out + tl.cast(group, tl.int64) * out_group
            for tile in range(first, tiles, programs):
                # Along a row of tiles: programs side by side share rows of a, and the weights b stay in the L2 cache.
                row = (tile // columns) * BLOCK_M
                column = (tile % columns) * BLOCK_N
                accumulator = multiply(
                    tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
                    a_source,
                    a.row,
                    b_source,
                    b.row,
                    row,
                    column,
                    0,
                    tl.cdiv(K, BLOCK_K),
                    M,
                    N,
                    K,
                    A_TRANSPOSED,
                    B_TRANSPOSED,
                    EVEN_M,
                    EVEN_N,
                    EVEN_K,
                    DESCRIPTORS,
                    PRECISION,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
                m = row + tl.arange(0, BLOCK_M)
                n = column + tl.arange(0, BLOCK_N)
                if bias is not None:
                    b_bias = tl.load(bias + group * bias_group + n, mask=n < N, other=0.0)
                    accumulator += b_bias.to(tl.float32)[None, :]
                places = out_start + tl.cast(m, tl.int64)[:, None] * out_row + n[None, :]
                tl.store(places, accumulator.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["groups", "group_parts"])
def summed_matmul_kernel(
    a,
    b,
    partials,
    groups,
    group_parts,
    inner_parts,
    M,
    N,
    K,
    A_LISTED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials[part] = the sum of a[g]^T @ b[g] over some groups and tiles of K: (K, M) and (K, N). Grid: (tiles, parts)."""
    columns = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // columns) * BLOCK_M
    column = (tl.program_id(0) % columns) * BLOCK_N
    part = tl.program_id(1)
    group_part = part // inner_parts
    inner_part = part % inner_parts
    inner = tl.cdiv(K, BLOCK_K)
    begin = inner * inner_part // inner_parts
    end = inner * (inner_part + 1) // inner_parts
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(groups * group_part // group_parts, groups * (group_part + 1) // group_parts):
        accumulator = multiply(
            accumulator,
            tile_source(group_pointer(a, group, A_LISTED, ALIGNED), a.row, K, M, BLOCK_K, BLOCK_M, DESCRIPTORS),
            a.row,
            tile_source(group_pointer(b, group, False, ALIGNED), b.row, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS),
            b.row,
            row,
            column,
            begin,
            end,
            M,
            N,
            K,
            True,
            False,
            EVEN_M,
            EVEN_N,
            EVEN_K,
            DESCRIPTORS,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    places = partials + (tl.cast(part, tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(places, accumulator, mask=(m < M)[:, None] & (n < N)[None, :])


def matmul(a, b, bias=None, *, transpose_a=False, transpose_b=False, out=None):
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
        A_LISTED=len(operands[0].pointers) > 1,
        B_LISTED=len(operands[1].pointers) > 1,
        A_TRANSPOSED=transpose_a,
        B_TRANSPOSED=transpose_b,
        **constants,
    )
    return result


def summed_matmul(a, b, out):
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
        A_LISTED=len(operands[0].pointers) > 1,
        **constants,
    )
    out += partials.sum(0)


def matrices(operand, groups):
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
    """-> LaunchConfig and the constants that both kernels share."""
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
    constants = dict(
        **dict(zip(("EVEN_M", "EVEN_N", "EVEN_K"), even, strict=True)),
        ALIGNED=aligned,
        DESCRIPTORS=config.descriptors,
        PRECISION=dot_precision(dtype, name),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return config, constants
