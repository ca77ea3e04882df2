"""Rows of the decode kernels: which a program has, which keys they see, where partial results lie, how results are written."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .chunks import BESIDE_VALUES, Attended, chunk_count, unit_after
from .rows import Rows
from .scores import join_sink
from .spans import key_place

LN_2 = tl.constexpr(0.6931471805599453)


class DecodeOutputs(NamedTuple):
    """Where results go; partials: what chunks leave where several programs share them, else a tensor that nobody reads."""

    out: Rows
    self_lse: Tensor | None
    cross_lse: Tensor | None
    partials: Tensor


class DecodeMasks(NamedTuple):
    """The masks and spans of a call, None for none; of one whose keys lie in pages, block tables (B, pages) and lengths (B,) instead.
    Strides of masks and tables change with every token, so are no members."""

    self_mask: Tensor | None = None
    cross_mask: Tensor | None = None
    spans: Tensor | None = None
    cross_spans: Tensor | None = None
    pages: Tensor | None = None
    cross_pages: Tensor | None = None
    lengths: Tensor | None = None
    cross_lengths: Tensor | None = None


class RowTile(NamedTuple):
    """A program's rows of one key head: numbers [BM] among `rows`, which exist, and their heads and queries."""

    batch: object
    kv_head: object
    rows: object
    o_row: object
    m_row: object
    o_head: object
    o_query: object


class KeySpan(NamedTuple):
    """The keys begin .. end that rows read, in `chunks` chunks, counted from key `origin` on; p_mask: the mask at that key, a number
    that nobody reads where there is none; start: key index of query 0."""

    origin: object
    begin: object
    end: object
    chunks: object
    p_mask: object
    start: object


@triton.jit
def tile_of_rows(queries, C: tl.constexpr):
    """The RowTile of this program."""
    rows = queries * C.GROUP
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, C.BLOCK_M)
    kv_head = program // tiles % (C.HEADS // C.GROUP)
    # [BM]
    o_row = program % tiles * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    batch = program // tiles // (C.HEADS // C.GROUP)
    return RowTile(batch, kv_head, rows, o_row, o_row < rows, kv_head * C.GROUP + o_row // queries, o_row % queries)


@triton.jit
def mask_row(mask, s_mask, batch, origin):
    """Pointer to place `origin` in a batch row of a mask or block table; without one a number that nobody reads."""
    p_mask = 0
    if mask is not None:
        p_mask = mask + tl.cast(batch, tl.int64) * s_mask + origin
    return p_mask


@triton.jit
def length_of_row(lengths, batch, keys):
    """How many of `keys` there are in a batch row: all, where no lengths were given."""
    if lengths is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), keys)
    return keys


@triton.jit
def attended_span(mask, p_mask, begin, end):
    """Keys begin .. end without those before the first and after the last that the mask attends to; without a mask all."""
    if mask is not None:
        first = end
        last = begin
        for place in range(begin, end, 1024):
            o_key = place + tl.arange(0, 1024)
            m_attended = tl.load(p_mask + o_key, mask=o_key < end, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(m_attended, o_key, end), 0))
            last = tl.maximum(last, tl.max(tl.where(m_attended, o_key + 1, begin), 0))
        begin = first
        end = last
    return begin, end


@triton.jit
def self_span(masks, s_mask, batch, queries, keys, start, s_start, window, C: tl.constexpr):
    """The KeySpan of a batch row's own keys; its start is kept within what can matter, so that sums stay in 32 bits. Of a row with a
    length the queries are its last keys."""
    if C.START_PER_ROW:
        index = tl.load(start + tl.cast(batch, tl.int64) * s_start).to(tl.int64)
        start = tl.minimum(tl.maximum(index, -queries), keys + window).to(tl.int32)
    if masks.lengths is not None:
        keys = length_of_row(masks.lengths, batch, keys)
        start = keys - queries
    origin, end = key_place(None, masks.spans, batch, keys)
    if masks.spans is not None:
        start -= origin
    begin = 0
    if C.CAUSAL:
        end = tl.minimum(end, tl.maximum(start + queries, 0))
    if C.WINDOWED:
        begin = tl.minimum(tl.maximum(start - window + 1, 0), end)
    p_mask = mask_row(masks.self_mask, s_mask, batch, origin)
    begin, end = attended_span(masks.self_mask, p_mask, begin, end)
    return KeySpan(origin, begin, end, chunk_count(begin, end, C.BLOCK_N), p_mask, start)


@triton.jit
def cross_span(masks, s_mask, batch, cross_keys, C: tl.constexpr):
    """The KeySpan of the cross keys of one of their batch rows; without cross keys an empty one."""
    origin, end = key_place(None, masks.cross_spans, batch, length_of_row(masks.cross_lengths, batch, cross_keys))
    p_mask = mask_row(masks.cross_mask, s_mask, batch, origin)
    begin = 0
    chunks = 0
    if C.CROSS:
        begin, end = attended_span(masks.cross_mask, p_mask, 0, end)
        chunks = chunk_count(begin, end, C.BLOCK_N)
    return KeySpan(origin, begin, end, chunks, p_mask, 0)


@triton.jit
def partial_rows(partials, tile, place, chunks, C: tl.constexpr):
    """Where chunk number `place` of a key head, which has room for `chunks`, leaves what its rows made of it."""
    index = (tl.cast(tile.batch, tl.int64) * (C.HEADS // C.GROUP) + tile.kv_head) * chunks + place
    return partials + index * (tile.rows * (C.HEAD_DIM + BESIDE_VALUES))


@triton.jit
def store_partial(p_partial, tile, attended, C: tl.constexpr):
    """Leave the Attended of one chunk for `combine_kernel`."""
    o_value = tl.arange(0, C.BLOCK_D)[:, None]
    o_place = tile.o_row * (C.HEAD_DIM + BESIDE_VALUES)
    m_inside = tile.m_row[None, :] & (o_value < C.HEAD_DIM)
    tl.store(p_partial + (o_place[None, :] + o_value), attended.weighted, mask=m_inside)
    tl.store(p_partial + (o_place + C.HEAD_DIM), attended.top, mask=tile.m_row)
    tl.store(p_partial + (o_place + C.HEAD_DIM + 1), attended.total, mask=tile.m_row)


@triton.jit
def load_partial(p_partial, tile, m_there, C: tl.constexpr):
    """The Attended that one chunk left, that of no keys for rows that are not `m_there`."""
    o_value = tl.arange(0, C.BLOCK_D)[:, None]
    o_place = tile.o_row * (C.HEAD_DIM + BESIDE_VALUES)
    m_inside = m_there[None, :] & (o_value < C.HEAD_DIM)
    b_top = tl.load(p_partial + (o_place + C.HEAD_DIM), mask=m_there, other=-float("inf"))
    b_total = tl.load(p_partial + (o_place + C.HEAD_DIM + 1), mask=m_there, other=0.0)
    return Attended(b_top, b_total, tl.load(p_partial + (o_place[None, :] + o_value), mask=m_inside, other=0.0))


@triton.jit
def row_pointers(x, tile, C: tl.constexpr):
    """Pointers [BLOCK_D, BM] to the rows of a RowTile."""
    p_batch = x.pointer + tl.cast(tile.batch, tl.int64) * x.batch
    o_rows = tl.cast(tile.o_head, tl.int64) * x.head + tl.cast(tile.o_query, tl.int64) * x.row
    return p_batch + (o_rows[None, :] + tl.arange(0, C.BLOCK_D)[:, None])


@triton.jit
def normalise(attended, rest):
    """-> softmax-weighted values [BLOCK_D, BM], log-sum-exp [BM] in base 2: 0 and -inf for a row that saw nothing."""
    b_total = tl.where(attended.total == 0, 1.0, attended.total)
    b_rest = tl.zeros_like(attended.top) + rest
    return attended.weighted / b_total[None, :], tl.fma(attended.top, b_rest, tl.log2(b_total))


@triton.jit
def write_rows(outputs, gate, sink, tile, queries, own, cross, scale, C: tl.constexpr, EXACT: tl.constexpr):
    """Self term plus gated cross term, two Attended, and both log-sum-exps where they are wanted. scale: in base 2."""
    b_out, b_lse = normalise(own, unit_after(scale, C.CAPPED, EXACT))
    if sink is not None:
        b_lse, b_kept = join_sink(b_lse, tl.load(sink + tile.o_head, mask=tile.m_row, other=0.0).to(tl.float32))
        b_out = b_out * b_kept[None, :]
    o_lse = (tl.cast(tile.batch, tl.int64) * C.HEADS + tile.o_head) * queries + tile.o_query
    if C.CROSS:
        b_cross, b_cross_lse = normalise(cross, unit_after(scale, False, EXACT))
        p_gates = gate.pointer + tl.cast(tile.batch, tl.int64) * gate.batch
        p_gates += tl.cast(tile.o_head, tl.int64) * gate.head + tl.cast(tile.o_query, tl.int64) * gate.row
        # [BM]
        b_gate = tl.load(p_gates, mask=tile.m_row, other=0.0).to(tl.float32)
        b_out = tl.fma(tl.broadcast_to(b_gate[None, :], b_cross.shape), b_cross, b_out)
        if outputs.cross_lse is not None:
            tl.store(outputs.cross_lse + o_lse, b_cross_lse * LN_2, mask=tile.m_row)
    if outputs.self_lse is not None:
        tl.store(outputs.self_lse + o_lse, b_lse * LN_2, mask=tile.m_row)
    m_written = tile.m_row[None, :] & (tl.arange(0, C.BLOCK_D)[:, None] < C.HEAD_DIM)
    tl.store(row_pointers(outputs.out, tile, C), b_out.to(outputs.out.pointer.dtype.element_ty), mask=m_written)
