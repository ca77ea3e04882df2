"""Which tiles there are, and which tiles a tile sees: packing, causality, windows."""

from typing import NamedTuple

import triton
import triton.language as tl

from .order import head_and_tile


class QueryPlace(NamedTuple):
    """Where a program's queries are: from `first`, counted from `begin`, on; maybe past the sequence's `count` queries."""

    batch: object
    head: object
    sequence: object
    begin: object
    count: object
    first: object


class QueryTile(NamedTuple):
    """A QueryPlace and its queries: [BM] from `begin`, which exist, and `row`, where the sequence's first stands in (B, Hq, S)."""

    batch: object
    head: object
    sequence: object
    begin: object
    count: object
    first: object
    row: object
    o_query: object
    m_query: object


class TileSpan(NamedTuple):
    """Tiles begin .. end; those of full_begin .. full_end need no mask of positions."""

    begin: object
    full_begin: object
    full_end: object
    end: object


@triton.jit
def packed_tile(bounds, sequences, tile, BLOCK: tl.constexpr):
    """-> the packed sequence that tile number `tile` belongs to, and the tile's number within it, maybe past its end.

    Sequence i owns the numbers from bounds[i] // BLOCK + i on: at least as many as it has tiles, known without a sum
    over the sequences before it.
    """
    owner = -1
    for first in range(0, sequences, 256):
        o_sequence = first + tl.arange(0, 256)
        b_begin = tl.load(bounds + o_sequence, mask=o_sequence < sequences, other=0)
        m_reached = (b_begin // BLOCK + o_sequence <= tile) & (o_sequence < sequences)
        owner += tl.sum(m_reached.to(tl.int32), 0)
    return owner, tile - tl.load(bounds + owner) // BLOCK - owner


@triton.jit
def sequence_span(bounds, sequence, length):
    """-> first position and length of a packed sequence; without packing every batch row spans 0 .. length."""
    begin = 0
    if bounds is not None:
        begin = tl.load(bounds + sequence)
        length = tl.load(bounds + sequence + 1) - begin
    return begin, length


@triton.jit
def key_place(bounds, spans, sequence, length):
    """-> first key and number of keys of a sequence: of a packed one, or of what a row's span leaves of its `length` keys.

    Keys are counted from that first one on, so that tiles, and with them bits, do not depend on the padding before it.
    """
    begin, count = sequence_span(bounds, sequence, length)
    if spans is not None:
        p_span = spans + tl.cast(sequence, tl.int64) * 2
        begin = tl.minimum(tl.maximum(tl.load(p_span), 0), length)
        count = tl.maximum(tl.minimum(tl.load(p_span + 1), length) - begin, 0)
    return begin, count


@triton.jit
def query_place(bounds, sequences, queries, keys, C: tl.constexpr):
    """The QueryPlace of this program. keys: how many rows of keys a head's programs read."""
    program = tl.program_id(0)
    if bounds is None:
        tiles = tl.cdiv(queries, C.BLOCK_M)
        head, tile = head_and_tile(program, tiles, keys, C.GROUP, C)
        batch = head // C.HEADS
        sequence = batch
        tile = tiles - 1 - tile  # under a causal mask the last queries see most: longest first
    else:
        tiles = queries // C.BLOCK_M + sequences
        head = program // tiles
        batch = 0
        sequence, tile = packed_tile(bounds, sequences, program % tiles, C.BLOCK_M)
    begin, count = sequence_span(bounds, sequence, queries)
    return QueryPlace(batch, head % C.HEADS, sequence, begin, count, tile * C.BLOCK_M)


@triton.jit
def query_tile(place, queries, C: tl.constexpr):
    """The QueryTile of a place that is not past its sequence's end; made before the kernel has looked, it costs the query
    gradients 32 registers (sm_90, D = 64, 64 x 32)."""
    # [BM]
    o_query = place.first + tl.arange(0, C.BLOCK_M)
    m_query = o_query < place.count
    row = (tl.cast(place.batch, tl.int64) * C.HEADS + place.head) * queries + place.begin
    return QueryTile(
        place.batch, place.head, place.sequence, place.begin, place.count, place.first, row, o_query, m_query
    )


@triton.jit
def first_query_index(start, batch, queries, keys, window, START_PER_ROW: tl.constexpr):
    """Key index of a sequence's first query, kept within what can matter so that sums with it stay in 32 bits."""
    if START_PER_ROW:
        index = tl.load(start + batch).to(tl.int64)
        start = tl.minimum(tl.maximum(index, -queries), keys + window).to(tl.int32)
    return start


@triton.jit
def keys_of_queries(first, end, start, keys, window, C: tl.constexpr):
    """The TileSpan of keys that the queries first .. end see: all of them see all keys of its full tiles."""
    seen = keys
    seen_by_all = keys
    if C.CAUSAL:
        seen = tl.minimum(keys, tl.maximum(start + end, 0))
        seen_by_all = tl.minimum(keys, tl.maximum(start + first + 1, 0))
    tile_end = tl.cdiv(seen, C.BLOCK_N)
    full_end = seen_by_all // C.BLOCK_N
    begin = 0
    full_begin = 0
    if C.WINDOWED:
        begin = tl.minimum(tl.maximum(start + first - window + 1, 0) // C.BLOCK_N, tile_end)
        full_begin = tl.cdiv(tl.maximum(start + end - window, 0), C.BLOCK_N)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), tile_end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), tile_end)
    return TileSpan(begin, full_begin, full_end, tile_end)


@triton.jit
def queries_of_keys(
    first, end, start, queries, window, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """The TileSpan of queries that see the keys first .. end, as `keys_of_queries`."""
    tile_end = tl.cdiv(queries, BLOCK_M)
    full_end = tile_end
    begin = 0
    full_begin = 0
    if CAUSAL:
        begin = tl.where(first - start < queries, tl.maximum(first - start, 0) // BLOCK_M, tile_end)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(end - 1 - start, 0), BLOCK_M), tile_end)
    if WINDOWED:
        tile_end = tl.minimum(tl.cdiv(tl.maximum(end - 1 - start + window, 0), BLOCK_M), tile_end)
        tile_end = tl.maximum(tile_end, begin)
        full_begin = tl.minimum(full_begin, tile_end)
        full_end = tl.minimum(tl.maximum(tl.maximum(first - start + window, 0) // BLOCK_M, full_begin), tile_end)
    return TileSpan(begin, full_begin, full_end, tile_end)


@triton.jit
def band_visible(o_query, o_key, window, WINDOWED: tl.constexpr):
    """Causal (and windowed) visibility of key indices to query indices, which broadcast against each other."""
    m_visible = o_key <= o_query
    if WINDOWED:
        m_visible = m_visible & (o_query - o_key < window)
    return m_visible
