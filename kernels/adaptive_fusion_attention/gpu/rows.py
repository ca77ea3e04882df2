"""Rows of one head: where they lie, and how tiles of them are read and written."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...tiles import zeros


class Rows(NamedTuple):
    """A (B, H, S, D) tensor with unit last stride, or a (B, H, S) one: its pointer and other strides, in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int


@triton.jit
def head_pointer(x, batch, head, first_row):
    """Pointer to row `first_row` of one head of Rows. 64 bits: a long batch of many heads passes 2^31 elements."""
    return (
        x.pointer
        + tl.cast(batch, tl.int64) * x.batch
        + tl.cast(head, tl.int64) * x.head
        + tl.cast(first_row, tl.int64) * x.row
    )


@triton.jit
def row_offsets(o_row, s_row, C: tl.constexpr):
    """Where rows o_row lie. In 64 bits only where 32 are too few: those cost a register for each row that a thread reads."""
    if C.WIDE:
        o_row = o_row.to(tl.int64)
    return o_row * s_row


@triton.jit
def row_pointers(p_head, s_row, first, BLOCK: tl.constexpr, C: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to rows first .. first + BLOCK."""
    p_head += tl.cast(first, tl.int64) * s_row
    return p_head + (row_offsets(tl.arange(0, BLOCK), s_row, C)[:, None] + tl.arange(0, C.BLOCK_D)[None, :])


@triton.jit
def load_rows(p_head, s_row, first, m_used, BLOCK: tl.constexpr, C: tl.constexpr):
    """Rows first .. first + BLOCK as [BLOCK, BLOCK_D], zero where not used ([BLOCK] bool, None = all are) and past HEAD_DIM."""
    return load_tile(row_pointers(p_head, s_row, first, BLOCK, C), m_used, C)


@triton.jit
def load_tile(p_rows, m_used, C: tl.constexpr):
    """The rows [BLOCK, BLOCK_D] at these pointers, zero where not used and past HEAD_DIM: see `load_rows`."""
    m_inside = tl.arange(0, C.BLOCK_D)[None, :] < C.HEAD_DIM
    if m_used is not None and C.HEAD_DIM != C.BLOCK_D:
        b_rows = tl.load(p_rows, mask=m_used[:, None] & m_inside, other=0.0)
    elif m_used is not None:
        b_rows = tl.load(p_rows, mask=m_used[:, None], other=0.0)
    elif C.HEAD_DIM != C.BLOCK_D:
        b_rows = tl.load(p_rows, mask=m_inside, other=0.0)
    else:
        b_rows = tl.load(p_rows)
    return b_rows


@triton.jit
def load_columns_of_rows(p_head, s_row, first, column, m_used, BLOCK: tl.constexpr, C: tl.constexpr):
    """Columns column .. column + BLOCK_K of what `load_rows` reads, [BLOCK, BLOCK_K]."""
    p_head += tl.cast(first, tl.int64) * s_row
    o_value = column + tl.arange(0, C.BLOCK_K)[None, :]
    m_inside = o_value < C.HEAD_DIM
    if m_used is not None:
        m_inside = m_inside & m_used[:, None]
    return tl.load(p_head + (row_offsets(tl.arange(0, BLOCK), s_row, C)[:, None] + o_value), mask=m_inside, other=0.0)


@triton.jit
def multiply_rows(
    p_left,
    s_left,
    first_left,
    m_left,
    p_right,
    s_right,
    first_right,
    m_right,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    """Products [ROWS, COLUMNS] of rows with rows, `load_rows` of left and of right, BLOCK_K columns of both at a time: where tiles of
    all columns, as operands of three products each, do not fit the registers."""
    b_products = zeros(ROWS, COLUMNS)
    for column in range(0, C.BLOCK_D, C.BLOCK_K):
        b_left = load_columns_of_rows(p_left, s_left, first_left, column, m_left, ROWS, C)
        b_right = load_columns_of_rows(p_right, s_right, first_right, column, m_right, COLUMNS, C)
        b_products = tl.dot(b_left, tl.trans(b_right), b_products, input_precision=C.PRECISION)
    return b_products


@triton.jit
def row_source(x, batch, head, first, rows, BLOCK: tl.constexpr, C: tl.constexpr):
    """Rows first .. first + rows of one head, for `read_rows`: a tensor descriptor, which ends where they end, or a pointer."""
    source = head_pointer(x, batch, head, first)
    if C.DESCRIPTORS:
        source = tl.make_tensor_descriptor(
            source, shape=[rows, C.HEAD_DIM], strides=[x.row, 1], block_shape=[BLOCK, C.BLOCK_D]
        )
    return source


@triton.jit
def read_rows(source, s_row, first, m_used, BLOCK: tl.constexpr, C: tl.constexpr):
    """`load_rows` from a `row_source`; a descriptor gives zeros past its rows and does not look at `m_used`."""
    if C.DESCRIPTORS:
        b_rows = source.load([first, 0])
    else:
        b_rows = load_rows(source, s_row, first, m_used, BLOCK, C)
    return b_rows


@triton.jit
def store_rows(x, batch, head, begin, first, m_used, b_rows, BLOCK: tl.constexpr, C: tl.constexpr):
    """Write the used rows of [BLOCK, BLOCK_D] to one head of Rows, counted from row `begin`, rounded to its dtype."""
    # [BLOCK, BLOCK_D]
    p_rows = row_pointers(head_pointer(x, batch, head, begin), x.row, first, BLOCK, C)
    m_inside = tl.arange(0, C.BLOCK_D)[None, :] < C.HEAD_DIM
    tl.store(p_rows, b_rows.to(x.pointer.dtype.element_ty), mask=m_used[:, None] & m_inside)


@triton.jit
def load_query_rows(x, tile, C: tl.constexpr):
    """The rows [BM, BLOCK_D] of a QueryTile, zero past its sequence's end."""
    p_head = head_pointer(x, tile.batch, tile.head, tile.begin)
    return load_rows(p_head, x.row, tile.first, tile.m_query, C.BLOCK_M, C)


@triton.jit
def store_query_rows(x, tile, b_rows, C: tl.constexpr):
    """Write the rows [BM, BLOCK_D] of a QueryTile."""
    store_rows(x, tile.batch, tile.head, tile.begin, tile.first, tile.m_query, b_rows, C.BLOCK_M, C)


@triton.jit
def load_gate(gate, tile, C: tl.constexpr):
    """The gate of a QueryTile in fp32, to be multiplied with [BM, BLOCK_D]: [BM, 1], or a scalar where queries share it."""
    p_gate = head_pointer(gate, tile.batch, tile.head, 0)
    if C.GATE_PER_QUERY:
        b_gate = tl.load(p_gate + row_offsets(tile.begin + tile.o_query, gate.row, C), mask=tile.m_query, other=0.0)[
            :, None
        ]
    else:
        b_gate = tl.load(p_gate)
    return b_gate.to(tl.float32)
