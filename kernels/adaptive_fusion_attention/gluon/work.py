"""What a program works on: its queries, the keys of both terms that they see, and how rows of queries are read and written."""

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import schedule

# Of the warps of a group; Triton 3.9 renamed it.
meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

query_tile_of = gluon.jit(schedule.query_tile_of)
keys_of_row = gluon.jit(schedule.keys_of_row)
tiles_of_queries = gluon.jit(schedule.tiles_of_queries)


class Spans(NamedTuple):
    """(B, 2) and (B / shares, 2) int32, contiguous: the keys and cross keys that each row may see; None for all."""

    keys: Tensor | None
    cross_keys: Tensor | None


class Tile(NamedTuple):
    """The queries first .. last of one head; `row` is where the head starts in (B, Hq, S)."""

    batch: object
    head: object
    row: object
    first: object
    last: object


class HeadRows(NamedTuple):
    """Rows of one head: pointer to the first, and how far they are apart."""

    pointer: object
    row: object


class Term(NamedTuple):
    """The keys of one softmax: `keys` from key_begin on, of which the tile's queries see the tiles begin .. end, all of them all
    keys of full_begin .. full_end. start: key, counted from key_begin, of the row's first query. before: tiles in the ring before."""

    key_begin: object
    keys: object
    start: object
    begin: object
    full_begin: object
    full_end: object
    end: object
    before: object


@gluon.constexpr_function
def row_layout(width):
    """Of rows [64, width] as memory takes them: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [schedule.WARPS, 1], [1, 0])


@gluon.jit
def wide(x):
    """A number from 0 up in 64 bits. Unsigned: the upper half of a signed stride is computed once, and then occupies a register
    that all warps share, down to the few that idle ones have."""
    x = gl.to_tensor(x)
    if x.dtype == gl.int32:
        x = x.to(gl.uint32)
    return x.to(gl.uint64)


@gluon.jit
def head_pointer(x, batch, head, row):
    """Pointer to a row of one head of Rows, by 64 bits."""
    return x.pointer + (wide(batch) * wide(x.batch) + wide(head) * wide(x.head) + wide(row) * wide(x.row)).to(gl.int64)


@gluon.jit
def tile_of_program(program, queries, batches, C: gl.constexpr):
    """The Tile of a program."""
    first, row = query_tile_of(program, queries, batches * C.HEADS, C.BLOCK_M)
    offset = (wide(row) * wide(queries)).to(gl.int64)
    return Tile(row // C.HEADS, row % C.HEADS, offset, first, min(first + C.BLOCK_M, queries))


@gluon.jit
def opaque(number):
    """The number as a value of its own: what is computed from it anew does not occupy registers through the loops."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def again(tile):
    """The tile, its first query `opaque`."""
    return Tile(tile.batch, tile.head, tile.row, opaque(tile.first), tile.last)


@gluon.jit
def span_of(p_span, row, length):
    """-> begin and end of a row's span, which may be wider than 0 .. length."""
    begin = 0
    end = length
    if p_span is not None:
        begin = gl.load(p_span + row * 2)
        end = gl.load(p_span + row * 2 + 1)
    return begin, end


@gluon.jit
def cross_term(p_span, tile, cross_keys, shares, C: gl.constexpr):
    """The Term of the cross keys, which every query sees."""
    span_begin, span_end = span_of(p_span, tile.batch // shares, cross_keys)
    key_begin, count = keys_of_row(span_begin, span_end, 0, 0, cross_keys, 0, False, False)
    begin, full_begin, full_end, end = tiles_of_queries(0, 0, 0, count, 0, False, False, C.BLOCK_N)
    return Term(key_begin, count, 0, begin, full_begin, full_end, end, 0)


@gluon.jit
def self_term(p_span, tile, queries, keys, start, window, before, C: gl.constexpr):
    """The Term of the row's own keys. start: key index of the first query, or pointer to one of each batch row."""
    if C.START_PER_ROW:
        start = gl.cast(min(max(gl.load(start + tile.batch), -queries), keys + window), gl.int32)
    span_begin, span_end = span_of(p_span, tile.batch, keys)
    key_begin, count = keys_of_row(span_begin, span_end, start, queries, keys, window, C.CAUSAL, C.WINDOWED)
    start = start - key_begin
    begin, full_begin, full_end, end = tiles_of_queries(
        tile.first, tile.last, start, count, window, C.CAUSAL, C.WINDOWED, C.BLOCK_N
    )
    return Term(key_begin, count, start, begin, full_begin, full_end, end, before)


@gluon.jit
def query_rows(x, tile, group: gl.constexpr, C: gl.constexpr):
    """-> pointers [64, D] to the group's queries, and which there are [64, 1]."""
    ROWS: gl.constexpr = row_layout(C.HEAD_DIM)
    o_query = tile.first + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    p_rows = head_pointer(x, tile.batch, tile.head, 0) + wide(o_query)[:, None] * wide(x.row)
    return p_rows + gl.arange(0, C.HEAD_DIM, gl.SliceLayout(0, ROWS))[None, :], (o_query < tile.last)[:, None]


@gluon.jit
def load_queries(x, tile, group: gl.constexpr, C: gl.constexpr):
    """The group's queries [64, D], zeros past the last."""
    p_rows, m_query = query_rows(x, tile, group, C)
    return gl.load(p_rows, mask=m_query, other=0.0)


@gluon.jit
def store_queries(x, tile, group: gl.constexpr, b_rows, C: gl.constexpr):
    """Write the group's rows [64, D]."""
    p_rows, m_query = query_rows(x, tile, group, C)
    gl.store(p_rows, b_rows, mask=m_query)


@gluon.jit
def load_gate(gate, tile, o_query, C: gl.constexpr):
    """The gate of the queries [64] in fp32: [64, 1], or a scalar where they share it."""
    p_gate = head_pointer(gate, tile.batch, tile.head, 0)
    if C.GATE_PER_QUERY:
        b_gate = gl.load(p_gate + wide(o_query) * wide(gate.row), mask=o_query < tile.last, other=0.0)[:, None]
    else:
        b_gate = gl.load(p_gate)
    return b_gate.to(gl.float32)
