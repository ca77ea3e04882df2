"""The operands of the products: where each group's matrix lies, and how kernels read tiles of it.

Rows and columns are those of a matrix as it lies in memory. A tile of a transposed one is turned when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# How a kernel finds the matrix of a group.
SHARED = tl.constexpr(0)  # all have the same
STRIDED = tl.constexpr(1)  # by a stride
LISTED = tl.constexpr(2)  # in a list of pointers
SPANNED = tl.constexpr(3)  # in such a list, as a place within one tensor descriptor

_MOST_STRIDE = 2**40  # bytes that a descriptor's stride stays below
_MOST_ROWS = 2**30  # from the first matrix of a list to the last: tensor descriptors count in 32 bits


class Matrices(NamedTuple):
    """One operand of all groups: rows x columns as they lie in memory, columns side by side."""

    pointers: tuple[Tensor, ...]  # one tensor for each group, or one for all
    group: int  # elements from group to group of one tensor
    row: int  # elements from row to row


class Reading(NamedTuple):
    """What a kernel is compiled for of one operand. EVEN: rows or columns are whole tiles, or descriptors look after that;
    ALIGNED: matrices and rows start at multiples of 16 bytes."""

    FOUND: int
    TRANSPOSED: bool
    EVEN_ROWS: bool
    EVEN_COLUMNS: bool
    ALIGNED: bool
    DESCRIPTORS: bool
    BLOCK_R: int
    BLOCK_C: int


def matrices(operand: Tensor | Sequence[Tensor], groups: int) -> Matrices:
    """The Matrices of a tensor (G, rows, columns), of one (rows, columns) for all groups, or of a list of those."""
    if isinstance(operand, torch.Tensor):
        operand = operand if operand.stride(-1) == 1 else operand.contiguous()
        return Matrices((operand,), operand.stride(0) if operand.dim() == 3 and groups > 1 else 0, operand.stride(-2))
    if any(x.stride(1) != 1 or x.stride(0) != operand[0].stride(0) for x in operand):
        return matrices(torch.stack(operand), groups)
    size, row = operand[0].element_size(), operand[0].stride(0)
    places = [x.data_ptr() for x in operand]
    step = places[1] - places[0] if groups > 1 else 0
    # Forward alone: a descriptor's strides are unsigned, so that of matrices that lie the other way round would lead far away.
    if (
        0 <= step < _MOST_STRIDE
        and step % size == 0
        and all(y - x == step for x, y in pairwise(places))
        and operand[0].device.type != "meta"
    ):
        return Matrices((operand[0],), step // size, row)
    return Matrices(tuple(operand), 0, row)


def aligned(operand: Matrices) -> bool:
    """Whether all matrices, and their rows, start at multiples of 16 bytes, each row at another: a descriptor takes no stride of 0."""
    size = operand.pointers[0].element_size()
    starts = (x.data_ptr() for x in operand.pointers)
    return operand.row > 0 and all(place % 16 == 0 for place in (operand.group * size, operand.row * size, *starts))


def found(operand: Matrices, whole: bool, descriptors: bool) -> int:
    """`SHARED`, `STRIDED`, `LISTED` or `SPANNED`; whole: no tile passes the end of a matrix.

    `SPANNED` makes one descriptor where `LISTED` makes one for each tile, but beyond the end of a matrix it reads what is there.
    """
    if len(operand.pointers) == 1:
        return (STRIDED if operand.group else SHARED).value
    places = [x.data_ptr() for x in operand.pointers]
    rows = (max(places) - min(places)) // (operand.row * operand.pointers[0].element_size())
    return (SPANNED if descriptors and whole and rows < _MOST_ROWS else LISTED).value


@triton.jit
def group_address(matrices, group):
    """The address of one of the pointers, as an integer."""
    address = matrices.pointers[0].to(tl.int64)
    for index in tl.static_range(1, len(matrices.pointers)):
        address = tl.where(group == index, matrices.pointers[index].to(tl.int64), address)
    return address


@triton.jit
def first_address(matrices):
    """The lowest of the pointers' addresses, as an integer."""
    address = matrices.pointers[0].to(tl.int64)
    for index in tl.static_range(1, len(matrices.pointers)):
        address = tl.minimum(address, matrices.pointers[index].to(tl.int64))
    return address


@triton.jit
def as_pointer(address, like, ALIGNED: tl.constexpr):
    """A pointer of the type of `like`."""
    p_matrix = address.to(like.dtype)
    if ALIGNED:
        p_matrix = tl.multiple_of(p_matrix, 16)
    return p_matrix


@triton.jit
def common_source(matrices, groups, rows, columns, R: tl.constexpr):
    """What the matrices of all groups are read from: one descriptor, or where each needs its own the first pointer, which
    `group_source` does not look at."""
    first = matrices.pointers[0]
    if not R.DESCRIPTORS or R.FOUND == LISTED:
        source = first
    elif R.FOUND == STRIDED:
        source = tl.make_tensor_descriptor(
            first, [groups, rows, columns], [matrices.group, matrices.row, 1], [1, R.BLOCK_R, R.BLOCK_C]
        )
    elif R.FOUND == SPANNED:
        # Rows from the first matrix on, twice as wide as they are apart: wherever a matrix starts, its rows are rows of
        # this one, and its columns as many columns further on.
        source = tl.make_tensor_descriptor(
            as_pointer(first_address(matrices), first, R.ALIGNED),
            [2147483647, 2 * matrices.row],
            [matrices.row, 1],
            [R.BLOCK_R, R.BLOCK_C],
        )
    else:
        source = tl.make_tensor_descriptor(first, [rows, columns], [matrices.row, 1], [R.BLOCK_R, R.BLOCK_C])
    return source


@triton.jit
def group_source(matrices, common, group, rows, columns, R: tl.constexpr):
    """-> what the matrix of one group is read from, and its first row and column there."""
    row, column = group * 0, group * 0
    if R.DESCRIPTORS and R.FOUND == LISTED:
        p_matrix = as_pointer(group_address(matrices, group), matrices.pointers[0], R.ALIGNED)
        source = tl.make_tensor_descriptor(p_matrix, [rows, columns], [matrices.row, 1], [R.BLOCK_R, R.BLOCK_C])
    elif R.DESCRIPTORS:
        source = common
        if R.FOUND == SPANNED:
            SIZE: tl.constexpr = matrices.pointers[0].dtype.element_ty.primitive_bitwidth // 8
            place = (group_address(matrices, group) - first_address(matrices)) // SIZE
            row = (place // matrices.row).to(tl.int32)
            column = (place % matrices.row).to(tl.int32)
    elif R.FOUND == LISTED:
        source = as_pointer(group_address(matrices, group), matrices.pointers[0], R.ALIGNED)
    else:
        source = matrices.pointers[0] + tl.cast(group, tl.int64) * matrices.group
    return source, row, column


@triton.jit
def load_tile(source, s_row, group, row, column, rows, columns, R: tl.constexpr):
    """The tile at (row, column), zeros outside: [BLOCK_R, BLOCK_C], or turned."""
    if R.DESCRIPTORS:
        if R.FOUND == STRIDED:
            b_tile = source.load([group, row, column]).reshape(R.BLOCK_R, R.BLOCK_C)
        else:
            b_tile = source.load([row, column])
        if R.TRANSPOSED:
            b_tile = tl.trans(b_tile)
    else:
        # Transposed in the addresses: on sm_80 a tile turned afterwards is not loaded ahead.
        o_row = row + tl.arange(0, R.BLOCK_R)
        o_column = column + tl.arange(0, R.BLOCK_C)
        p_rows = source + tl.cast(o_row, tl.int64) * s_row
        if R.TRANSPOSED:
            p_tile = p_rows[None, :] + o_column[:, None]
            m_rows = (o_row < rows)[None, :]
            m_columns = (o_column < columns)[:, None]
        else:
            p_tile = p_rows[:, None] + o_column[None, :]
            m_rows = (o_row < rows)[:, None]
            m_columns = (o_column < columns)[None, :]
        if R.EVEN_ROWS and R.EVEN_COLUMNS:
            b_tile = tl.load(p_tile)
        elif R.EVEN_ROWS:
            b_tile = tl.load(p_tile, mask=m_columns, other=0.0)
        elif R.EVEN_COLUMNS:
            b_tile = tl.load(p_tile, mask=m_rows, other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_rows & m_columns, other=0.0)
    return b_tile
