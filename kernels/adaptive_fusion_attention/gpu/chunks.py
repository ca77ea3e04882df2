"""Chunks of keys of the decode kernels: which there are, how one is attended to, how they merge.

Rows are the queries of the heads that share a key head, head by head. Tiles lie transposed, [.., rows]: keys and head width are
then the sides that tensor cores want long (64 on Hopper), and 16 rows do.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...tiles import vector, zeros
from .rows import load_tile, row_offsets
from .scores import LOG2_E, capped_scores
from .spans import band_visible

# A partial result: a row of values, its largest score and sum, and 2 unused, so that rows start at multiples of 16 bytes.
BESIDE_VALUES = tl.constexpr(4)


class ChunkTerm(NamedTuple):
    """Keys begin .. end of one key head, in chunks counted from its first key: pointers to that key and value with strides s_k and s_v,
    to its row of the mask, and the key indices of the rows, o_query [BM].

    In pages of keys: pointers to the head in page 0, with strides s_page_k and s_page_v from page to page, and to the row of the block
    table, which has the numbers of its pages.
    """

    p_k: object
    p_v: object
    s_k: object
    s_v: object
    s_page_k: object
    s_page_v: object
    p_pages: object
    p_mask: object
    begin: object
    end: object
    o_query: object
    window: object


class Attended(NamedTuple):
    """What some chunks made of rows: the largest score [BM], and, from that score, the sum of weights [BM] and of weighted
    values [BLOCK_D, BM]. A row that saw nothing has a top of -inf."""

    top: object
    total: object
    weighted: object


@triton.jit
def chunk_count(begin, end, BLOCK_N: tl.constexpr):
    """How many chunks of BLOCK_N keys, counted from the first, hold the keys begin .. end."""
    return tl.where(end > begin, tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 0)


@triton.jit
def unit_before(scale, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """What scores are multiplied with before the largest is subtracted: see `softmax_weights`. scale: in base 2."""
    unit = scale
    if CAPPED:
        unit = LOG2_E
    if EXACT:
        unit = 1.0
    return unit


@triton.jit
def unit_after(scale, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """What the differences to the largest score are multiplied with."""
    unit = 1.0
    if EXACT:
        unit = scale
        if CAPPED:
            unit = LOG2_E
    return unit


@triton.jit
def nothing_attended(C: tl.constexpr):
    """The Attended of no chunk."""
    return Attended(
        vector(C.BLOCK_M, -float("inf")),
        vector(C.BLOCK_M, 0.0),
        zeros(C.BLOCK_D, C.BLOCK_M),
    )


@triton.jit
def pages_of_keys(term, first, o_key, m_used, PAGE: tl.constexpr):
    """Which page each key [BN] of a chunk lies in, [BN]; a number that nobody reads where keys do not lie in pages of PAGE > 0."""
    b_page = first
    if PAGE > 0:
        # An entry for no used key may hold anything.
        b_page = tl.load(term.p_pages + o_key // PAGE, mask=m_used, other=0).to(tl.int64)
    return b_page


@triton.jit
def chunk_rows(p_head, s_row, s_page, first, b_page, BLOCK: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr):
    """-> pointer, and offsets from it [BLOCK] of the rows first .. first + BLOCK of a head: one after the other, or each in its page."""
    o_row = tl.arange(0, BLOCK)
    if PAGE > 0:
        o_place = b_page * s_page + row_offsets((first + o_row) % PAGE, s_row, C)
    else:
        p_head += tl.cast(first, tl.int64) * s_row
        o_place = row_offsets(o_row, s_row, C)
    return p_head, o_place


@triton.jit
def attend_chunk(b_q, term, chunk, scale, softcap, C: tl.constexpr, CROSS: tl.constexpr, MASKED: tl.constexpr):
    """Softmax of rows [BLOCK_D, BM] over one chunk of a ChunkTerm -> Attended. scale: of the scores, in base 2."""
    CAPPED: tl.constexpr = C.CAPPED and not CROSS
    PAGE: tl.constexpr = C.CROSS_PAGE if CROSS else C.PAGE
    unit = unit_before(scale, CAPPED, EXACT=b_q.dtype == tl.float32)
    rest = unit_after(scale, CAPPED, EXACT=b_q.dtype == tl.float32)
    # [BN]
    o_key = chunk * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    m_used = (o_key >= term.begin) & (o_key < term.end)
    if MASKED:
        m_used = m_used & (tl.load(term.p_mask + o_key, mask=m_used, other=0) != 0)
    first = chunk * C.BLOCK_N
    b_page = pages_of_keys(term, first, o_key, m_used, PAGE)
    p_k, o_place = chunk_rows(term.p_k, term.s_k, term.s_page_k, first, b_page, C.BLOCK_N, PAGE, C)
    # [BN, BLOCK_D]
    b_k = load_tile(p_k + (o_place[:, None] + tl.arange(0, C.BLOCK_D)[None, :]), m_used, C)
    # [BN, BM]
    b_scores = tl.dot(b_k, b_q, input_precision=C.PRECISION)
    if CAPPED:
        b_scores = softcap * capped_scores(b_scores, scale, softcap, EXACT=b_q.dtype == tl.float32)
    m_visible = m_used[:, None]
    if C.CAUSAL and not CROSS:
        m_visible = m_visible & band_visible(term.o_query[None, :], o_key[:, None], term.window, C.WINDOWED)
    b_scores = tl.where(m_visible, b_scores, -float("inf"))
    # [BM]
    b_top = tl.max(b_scores, 0) * unit
    b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
    # [BN, BM]
    b_weights = tl.exp2((b_scores * unit - b_base[None, :]) * rest)
    p_v, o_place = chunk_rows(term.p_v, term.s_v, term.s_page_v, first, b_page, C.BLOCK_N, PAGE, C)
    o_value = tl.arange(0, C.BLOCK_D)[:, None]
    # [BLOCK_D, BN], read so: a tile transposed later is not read ahead below Hopper, and spills 3 KB.
    b_v = tl.load(p_v + (o_value + o_place[None, :]), mask=m_used[None, :] & (o_value < C.HEAD_DIM), other=0.0)
    # [BLOCK_D, BM]
    b_values = tl.dot(b_v, b_weights.to(b_v.dtype), input_precision=C.PRECISION)
    return Attended(b_top, tl.sum(b_weights, 0), b_values)


@triton.jit
def merge(seen, chunk, rest):
    """The Attended of what has been seen so far and of the next chunk.

    A chunk that holds nothing for a row, top -inf, leaves its bits alone. Every rounding is spelled out: the compiler must
    not fuse this in one way where a program merges its own chunks and in another where `combine_kernel` does.
    """
    # [BM]
    b_top = tl.maximum(seen.top, chunk.top)
    b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_old = tl.exp2((seen.top - b_base) * rest)
    b_new = tl.exp2((chunk.top - b_base) * rest)
    b_total = tl.fma(seen.total, b_old, chunk.total * b_new)
    # [BLOCK_D, BM]
    b_old = tl.broadcast_to(b_old[None, :], seen.weighted.shape)
    return Attended(b_top, b_total, tl.fma(seen.weighted, b_old, chunk.weighted * b_new[None, :]))
