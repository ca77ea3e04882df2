"""The self and the cross term as a tile of queries meets them: where their keys lie, which tiles of them count, and the masks.

A mask's list of used tiles keeps what it hides from being read, or waited for, at all.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .rows import Rows, head_pointer, multiply_rows, read_rows, row_source
from .spans import TileSpan, band_visible, first_query_index, key_place, keys_of_queries


class Inputs(NamedTuple):
    """The tensors of a call; the gate as (B, Hq, S) by strides, the sink (Hq,) or None."""

    q: Rows
    k: Rows
    v: Rows
    cross_k: Rows
    cross_v: Rows
    gate: Rows
    sink: torch.Tensor | None = None
    end: None = None  # see NOTATION.md


class UsedTiles(NamedTuple):
    """A (B, N) mask and its lists of the tiles that hold a True: see `list_used_tiles_kernel`."""

    mask: torch.Tensor
    stride: int
    tiles: torch.Tensor
    ranks: torch.Tensor


class Masks(NamedTuple):
    """What hides keys: lists of both masks, the bounds of packed sequences, and spans; None for what a call has not."""

    tiles: UsedTiles | None
    cross_tiles: UsedTiles | None
    bounds: torch.Tensor | None
    cross_bounds: torch.Tensor | None
    spans: torch.Tensor | None
    cross_spans: torch.Tensor | None


class Term(NamedTuple):
    """What one softmax of a tile of queries reads.

    k, v: row sources of its head's keys and values, from the sequence's first on, with strides s_k and s_v. p_mask, list_start: where
    its part of the mask and of its list of used tiles begins, numbers that nobody reads where there is none. span: the tiles that
    the queries see; none sees keys outside key_begin .. key_end. o_query: [BM] key indices of the queries.
    """

    k: object
    v: object
    s_k: object
    s_v: object
    p_mask: object
    list_start: object
    sequence: object
    span: object
    key_begin: object
    key_end: object
    o_query: object
    window: object


@triton.jit
def self_term(inputs, masks, queries, keys, tile, start, window, C: tl.constexpr):
    """The Term of a QueryTile's own sequence. start: key index of the first query, or pointer to one of each batch row."""
    start = first_query_index(start, tile.batch, queries, keys, window, C.START_PER_ROW)
    begin, count = key_place(masks.bounds, masks.spans, tile.sequence, keys)
    if masks.spans is not None:
        start -= begin
    last = tl.minimum(tile.first + C.BLOCK_M, tile.count)
    span = keys_of_queries(tile.first, last, start, count, window, C)
    key_begin = start + tile.first - window + 1
    key_end = count
    limit = count
    if C.CAUSAL:
        key_end = tl.minimum(count, start + last)
        # What lies past the sequence's last query stays unread; a descriptor has at least one row.
        limit = tl.minimum(count, tl.maximum(start + tile.count, 1))
    if masks.spans is not None:
        limit = tl.maximum(limit, 1)
    list_start = first_in_list(masks.bounds, begin, tile.sequence, keys, C.BLOCK_N)
    head = tile.head // C.GROUP
    return Term(
        k=row_source(inputs.k, tile.batch, head, begin, limit, C.BLOCK_N, C),
        v=row_source(inputs.v, tile.batch, head, begin, limit, C.BLOCK_N, C),
        s_k=inputs.k.row,
        s_v=inputs.v.row,
        p_mask=mask_row(masks.tiles, tile.batch, begin),
        list_start=list_start,
        sequence=tile.sequence,
        span=span,
        key_begin=key_begin,
        key_end=key_end,
        o_query=start + tile.o_query,
        window=window,
    )


@triton.jit
def cross_term(inputs, masks, cross_keys, tile, shares, C: tl.constexpr):
    """The Term of the cross keys, which all queries see. shares: batch rows that read one row of cross keys."""
    batch = tile.batch // shares
    sequence = tile.sequence // shares
    begin, count = key_place(masks.cross_bounds, masks.cross_spans, sequence, cross_keys)
    limit = count
    if masks.cross_spans is not None:
        limit = tl.maximum(count, 1)
    head = tile.head // C.GROUP
    return Term(
        k=row_source(inputs.cross_k, batch, head, begin, limit, C.BLOCK_N, C),
        v=row_source(inputs.cross_v, batch, head, begin, limit, C.BLOCK_N, C),
        s_k=inputs.cross_k.row,
        s_v=inputs.cross_v.row,
        p_mask=mask_row(masks.cross_tiles, batch, begin),
        list_start=first_in_list(masks.cross_bounds, begin, sequence, cross_keys, C.BLOCK_N),
        sequence=sequence,
        span=TileSpan(0, 0, count // C.BLOCK_N, tl.cdiv(count, C.BLOCK_N)),
        key_begin=0,
        key_end=count,
        o_query=tile.o_query,
        window=0,
    )


@triton.jit
def listed_span(used_tiles, term):
    """Places in the list of used tiles that hold the term's tiles; without a list, a tile's place is its number."""
    begin = term.span.begin
    end = term.span.end
    if used_tiles is not None:
        ranks = used_tiles.ranks + term.list_start + term.sequence
        begin = tl.load(ranks + begin)
        end = tl.load(ranks + end)
    return begin, end


@triton.jit
def key_tile(used_tiles, term, place, C: tl.constexpr, CROSS: tl.constexpr):
    """-> number of the tile at one place of the list, its keys [BN], and which of them the mask allows and lie where some query
    of the tile sees [BN]."""
    number = place
    if used_tiles is not None:
        number = tl.load(used_tiles.tiles + term.list_start + place)
    # [BN]
    o_key = number * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    if used_tiles is not None:
        m_used = tl.load(term.p_mask + o_key, mask=o_key < term.key_end, other=0) != 0
    else:
        m_used = o_key < term.key_end
    if C.WINDOWED and not CROSS:
        m_used = m_used & (o_key >= term.key_begin)
    return number, o_key, m_used


@triton.jit
def read_keys(source, s_row, number, m_used, C: tl.constexpr, FULL: tl.constexpr):
    """One tile of keys or values [BN, BLOCK_D], zero in unused keys; FULL: all are used."""
    if FULL:
        b_keys = read_rows(source, s_row, number * C.BLOCK_N, None, C.BLOCK_N, C)
    else:
        b_keys = read_rows(source, s_row, number * C.BLOCK_N, m_used, C.BLOCK_N, C)
    return b_keys


@triton.jit
def multiply_keys(x, tile, source, s_row, number, m_used, C: tl.constexpr):
    """Products [BM, BN] of a QueryTile's rows of x with the tile of keys or values that `read_keys` reads: see `multiply_rows`."""
    p_head = head_pointer(x, tile.batch, tile.head, tile.begin)
    first = number * C.BLOCK_N
    return multiply_rows(p_head, x.row, tile.first, tile.m_query, source, s_row, first, m_used, C.BLOCK_M, C.BLOCK_N, C)


@triton.jit
def hide_unseen(b_values, fill, used_tiles, term, number, o_key, m_used, C: tl.constexpr, CROSS: tl.constexpr):
    """values [BM, BN] where a query sees the key, else fill. Position masks are computed in tiles that are not full only.

    A branch on a number that the whole program shares is free; a second loop over the full tiles costs 30 to 40 registers.
    """
    if used_tiles is not None:
        b_values = tl.where(m_used[None, :], b_values, fill)
    if used_tiles is not None or not (CROSS and C.EVEN_CROSS):
        if (number < term.span.full_begin) | (number >= term.span.full_end):
            m_visible = m_used[None, :]
            if C.CAUSAL and not CROSS:
                m_band = band_visible(term.o_query[:, None], o_key[None, :], term.window, C.WINDOWED)
                m_visible = m_visible & m_band
            b_values = tl.where(m_visible, b_values, fill)
    return b_values


@triton.jit
def first_in_list(bounds, begin, sequence, length, BLOCK_N: tl.constexpr):
    """Where a sequence's list of used tiles starts."""
    if bounds is None:
        place = sequence * tl.cdiv(length, BLOCK_N)
    else:
        place = begin // BLOCK_N + sequence
    return place


@triton.jit
def mask_row(used_tiles, batch, begin):
    """Pointer to the mask of a sequence's first key; without a mask a number that nobody reads."""
    p_mask = 0
    if used_tiles is not None:
        p_mask = used_tiles.mask + tl.cast(batch, tl.int64) * used_tiles.stride + begin
    return p_mask


@triton.jit
def list_used_tiles_kernel(mask, mask_stride, bounds, spans, length, tiles, ranks, BLOCK_N: tl.constexpr):
    """One sequence: the numbers of its tiles in which the mask holds a True, and for each tile how many come before it."""
    sequence = tl.program_id(0)
    begin, count = key_place(bounds, spans, sequence, length)
    place = first_in_list(bounds, begin, sequence, length, BLOCK_N)
    if bounds is None:
        mask += tl.cast(sequence, tl.int64) * mask_stride
    mask += begin
    used_before = 0
    for first in range(0, tl.cdiv(count, BLOCK_N), 32):
        # [32]
        o_tile = first + tl.arange(0, 32)
        # [32, BN]
        o_key = o_tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        b_attended = tl.load(mask + o_key, mask=o_key < count, other=0).to(tl.int32)
        # [32]
        b_used = tl.max(b_attended, 1)
        b_rank = used_before + tl.cumsum(b_used, 0) - b_used
        tl.store(tiles + place + b_rank, o_tile, mask=b_used > 0)
        tl.store(ranks + place + sequence + o_tile, b_rank, mask=o_tile * BLOCK_N < count)
        used_before += tl.sum(b_used, 0)
    tl.store(ranks + place + sequence + tl.cdiv(count, BLOCK_N), used_before)
