"""Gradients of keys and values, self and cross in one launch: one program per tile of keys, which adds over queries and heads.

Each program loops over the heads that share its key head, so nothing of the size of all query heads is ever written.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...tiles import zeros
from .arguments import NUMBERS, Numbers
from .order import head_and_tile
from .rows import Rows, head_pointer, load_rows, multiply_rows, row_offsets, store_rows
from .scores import LOG2_E, load_lse, weights_again
from .spans import TileSpan, band_visible, first_query_index, key_place, packed_tile, queries_of_keys, sequence_span


class KeyTerm(NamedTuple):
    """Keys and values of one term and what belongs to them: log-sum-exps and row sums of the queries, where gradients go (None:
    not wanted), the mask (None: none) with its stride, the bounds of packed keys, and spans."""

    k: Rows
    v: Rows
    lse: Tensor
    sums: Tensor | None
    grad_k: Rows | None
    grad_v: Rows | None
    mask: Tensor | None
    s_mask: int
    bounds: Tensor | None
    spans: Tensor | None


class KeyTile(NamedTuple):
    """A tile of keys of one batch row: the row where its sequence's keys begin, the first key counted from there, keys and values
    [BN, BLOCK_D], zero where not used (m_used [BN]), the keys' indices [BN], and `first`, the key index of the first of the
    sequence's `queries` queries, which begin at `begin`."""

    batch: object
    key_begin: object
    first_key: object
    m_used: object
    b_k: object
    b_v: object
    o_key: object
    first: object
    begin: object
    queries: object


@triton.jit
def group_source(x, batch, group, first, rows, BLOCK: tl.constexpr, C: tl.constexpr):
    """Rows first .. first + rows of the heads that share a key head, for `read_group_rows`: one descriptor for all of them, since
    making one costs about as much as reading a tile, or a pointer."""
    source = head_pointer(x, batch, group * C.GROUP, first)
    if C.DESCRIPTORS:
        source = tl.make_tensor_descriptor(
            source,
            shape=[C.GROUP, rows, C.HEAD_DIM],
            strides=[tl.cast(x.head, tl.int64), tl.cast(x.row, tl.int64), 1],
            block_shape=[1, BLOCK, C.BLOCK_D],
        )
    return source


@triton.jit
def read_group_rows(source, x, member, first, m_used, BLOCK: tl.constexpr, C: tl.constexpr):
    """`load_rows` of one head of a `group_source`; a descriptor gives zeros past its rows and does not look at `m_used`."""
    if C.DESCRIPTORS:
        b_rows = source.load([member, first, 0]).reshape(BLOCK, C.BLOCK_D)
    else:
        b_rows = load_rows(source + tl.cast(member, tl.int64) * x.head, x.row, first, m_used, BLOCK, C)
    return b_rows


@triton.jit
def multiply_queries(tile, keys, group, source, x, member, first, m_query, C: tl.constexpr):
    """Products [BN, BM] of a KeyTile's keys or values with the rows that `read_group_rows` reads of x."""
    p_keys = head_pointer(keys, tile.batch, group, tile.key_begin)
    p_rows = source + tl.cast(member, tl.int64) * x.head
    return multiply_rows(
        p_keys, keys.row, tile.first_key, tile.m_used, p_rows, x.row, first, m_query, C.BLOCK_N, C.BLOCK_M, C
    )


@triton.jit
def add_query_tiles(tile, term, q, grad_out, gate, group, span, numbers, C: tl.constexpr, CROSS: tl.constexpr):
    """What the tiles of queries of a TileSpan contribute to the gradients [BN, BLOCK_D] of a KeyTile's keys and values, head by head of
    those that share it. One loop over both: a loop for each head starts its loads, and waits for them, anew."""
    b_grad_k = zeros(C.BLOCK_N, C.BLOCK_D)
    b_grad_v = zeros(C.BLOCK_N, C.BLOCK_D)
    row = (tl.cast(tile.batch, tl.int64) * C.HEADS + group * C.GROUP) * numbers.queries + tile.begin
    q_rows = group_source(q, tile.batch, group, tile.begin, tile.queries, C.BLOCK_M, C)
    grad_rows = group_source(grad_out, tile.batch, group, tile.begin, tile.queries, C.BLOCK_M, C)
    p_gate = head_pointer(gate, tile.batch, group * C.GROUP, tile.begin)
    member = 0
    number = span.begin
    for _ in range(C.GROUP * (span.end - span.begin)):
        first = number * C.BLOCK_M
        tile_row = row + tl.cast(member, tl.int64) * numbers.queries + first
        # [BM], from the tile's first: added in this order, the addresses of a thread's queries are one and constants
        o_query = tl.arange(0, C.BLOCK_M)
        m_query = o_query < tile.queries - first
        # [BM, BLOCK_D]
        b_q = read_group_rows(q_rows, q, member, first, m_query, C.BLOCK_M, C)
        b_grad = read_group_rows(grad_rows, grad_out, member, first, m_query, C.BLOCK_M, C)
        b_lse = load_lse(term.lse + tile_row, o_query, m_query)
        # [BN, BM]: keys in rows, so that the weights feed the next product as they are
        if C.BLOCK_K:
            b_scores = multiply_queries(tile, term.k, group, q_rows, q, member, first, m_query, C)
        else:
            b_scores = tl.dot(tile.b_k, tl.trans(b_q), input_precision=C.PRECISION)
        b_weights, b_capped = weights_again(
            b_scores,
            numbers.scale * LOG2_E,
            numbers.softcap,
            b_lse[None, :],
            C.CAPPED and not CROSS,
            EXACT=b_q.dtype == tl.float32,
        )
        if C.CAUSAL and not CROSS:
            partial = number < span.full_begin
            if C.WINDOWED:
                partial = partial | (number >= span.full_end)
            if partial:
                o_index = tile.first + first + o_query[None, :]
                m_visible = band_visible(o_index, tile.o_key[:, None], numbers.window, C.WINDOWED)
                b_weights = tl.where(m_visible, b_weights, 0.0)
        if CROSS:
            p_gates = p_gate + tl.cast(member, tl.int64) * gate.head + tl.cast(first, tl.int64) * gate.row
            if C.GATE_PER_QUERY:
                b_gates = tl.load(p_gates + row_offsets(o_query, gate.row, C), mask=m_query, other=0.0).to(tl.float32)
                b_weights = b_weights * b_gates[None, :]
            else:
                b_weights = b_weights * tl.load(p_gates).to(tl.float32)
        if term.grad_v is not None:
            b_grad_v = tl.dot(b_weights.to(b_grad.dtype), b_grad, b_grad_v, input_precision=C.PRECISION)
        if term.grad_k is not None:
            # [BN, BM]
            if C.BLOCK_K:
                b_products = multiply_queries(tile, term.v, group, grad_rows, grad_out, member, first, m_query, C)
            else:
                b_products = tl.dot(tile.b_v, tl.trans(b_grad), input_precision=C.PRECISION)
            b_sums = tl.load(term.sums + tile_row + o_query, mask=m_query, other=0.0)
            b_grad_scores = b_weights * (b_products - b_sums[None, :])
            if C.CAPPED and not CROSS:
                b_grad_scores = b_grad_scores * (1 - b_capped * b_capped)
            b_grad_k = tl.dot(b_grad_scores.to(b_q.dtype), b_q, b_grad_k, input_precision=C.PRECISION)
        last = number + 1 == span.end
        member = tl.where(last, member + 1, member)
        number = tl.where(last, span.begin, number + 1)
    return b_grad_k, b_grad_v, tl.minimum(member, 0)


@triton.jit
def store_key_rows(x, spans, batch, head, place, first, keys, b_rows, C: tl.constexpr):
    """Write gradients [BN, BLOCK_D] of keys `first` on, counted from a `key_place`. Of a spanned row of `keys` keys, those past its last
    key are the ones before its first, and get zeros: by a store of their own, since these addresses beside sums spill 188 bytes."""
    begin, count = place
    # [BN]
    o_key = first + tl.arange(0, C.BLOCK_N)
    store_rows(x, batch, head, begin, first, o_key < count, b_rows, C.BLOCK_N, C)
    if spans is not None:
        if first + C.BLOCK_N > count:
            o_row = begin + o_key
            o_row = tl.where(o_row < keys, o_row, o_row - keys)
            o_value = tl.arange(0, C.BLOCK_D)[None, :]
            p_rows = head_pointer(x, batch, head, 0) + (o_row.to(tl.int64)[:, None] * x.row + o_value)
            m_outside = (o_key >= count) & (o_key < keys)
            b_zeros = zeros(C.BLOCK_N, C.BLOCK_D).to(x.pointer.dtype.element_ty)
            tl.store(p_rows, b_zeros, mask=m_outside[:, None] & (o_value < C.HEAD_DIM))


@triton.jit
def gradients_of_key_tile(
    q, gate, grad_out, term, bounds, number, place_of_head, numbers, C: tl.constexpr, CROSS: tl.constexpr
):
    """Compute and store the gradients of tile `number` of one key head, counted over all batch rows, of a KeyTerm -> 0, which the
    compiler cannot know to be 0. bounds: of packed queries."""
    CAUSAL: tl.constexpr = C.CAUSAL and not CROSS
    WINDOWED: tl.constexpr = C.WINDOWED and not CROSS
    batch = place_of_head // (C.HEADS // C.GROUP)
    head = place_of_head % (C.HEADS // C.GROUP)
    sequence = batch
    zero = 0
    if bounds is not None:
        sequence, number = packed_tile(term.bounds, numbers.sequences, number, C.BLOCK_N)
    q_begin, q_count = sequence_span(bounds, sequence, numbers.queries)
    k_begin, k_count = key_place(term.bounds, term.spans, sequence, numbers.keys)
    written = k_count
    if term.spans is not None:
        written = numbers.keys  # what lies outside the span has gradients too, of 0
    first_key = number * C.BLOCK_N
    if first_key < written:
        # [BN]
        o_key = first_key + tl.arange(0, C.BLOCK_N)
        first = 0
        m_used = o_key < k_count
        if CAUSAL:  # what no query sees must not reach the gradients, whatever it holds
            first = first_query_index(
                numbers.start, batch, numbers.queries, numbers.keys, numbers.window, C.START_PER_ROW
            )
            if term.spans is not None:
                first -= k_begin
            m_used = m_used & (o_key < first + q_count)
        if WINDOWED:
            m_used = m_used & (o_key > first - numbers.window)
        if term.mask is not None:
            p_mask = term.mask + tl.cast(batch, tl.int64) * term.s_mask + k_begin
            m_used = tl.load(p_mask + o_key, mask=m_used, other=0) != 0
        # [BN, BLOCK_D]
        b_k = load_rows(head_pointer(term.k, batch, head, k_begin), term.k.row, first_key, m_used, C.BLOCK_N, C)
        b_v = load_rows(head_pointer(term.v, batch, head, k_begin), term.v.row, first_key, m_used, C.BLOCK_N, C)
        last_key = tl.minimum(first_key + C.BLOCK_N, k_count)
        span = queries_of_keys(first_key, last_key, first, q_count, numbers.window, C.BLOCK_M, CAUSAL, WINDOWED)
        if term.mask is not None or term.spans is not None:
            # 0: a tile of masked keys only, whose gradients are 0. Of spans a number that all threads share says so: a loop that ends
            # by one reduced from a tile might end earlier for some, and keeps all addresses in registers of threads: spills 164 bytes.
            some = tl.where(first_key < k_count, 1, 0)
            if term.mask is not None:
                some = tl.max(m_used.to(tl.int32), 0)
            span = TileSpan(span.begin * some, span.full_begin * some, span.full_end * some, span.end * some)
        tile = KeyTile(batch, k_begin, first_key, m_used, b_k, b_v, o_key, first, q_begin, q_count)
        b_grad_k, b_grad_v, zero = add_query_tiles(tile, term, q, grad_out, gate, head, span, numbers, C, CROSS)
        # Places anew, by a zero that the compiler cannot know to be one: held through the loop, they spill 76 bytes (Triton 3.6).
        first_key += zero
        batch = (place_of_head + zero) // (C.HEADS // C.GROUP)
        head = (place_of_head + zero) % (C.HEADS // C.GROUP)
        if term.mask is not None:  # other keys that no query sees have weights of 0 already
            b_grad_k = tl.where(m_used[:, None], b_grad_k, 0.0)
            b_grad_v = tl.where(m_used[:, None], b_grad_v, 0.0)
        sequence += zero
        if bounds is None:
            sequence = batch
        place = key_place(term.bounds, term.spans, sequence, numbers.keys)
        if term.grad_k is not None:
            b_grad_k = b_grad_k * numbers.scale
            store_key_rows(term.grad_k, term.spans, batch, head, place, first_key, numbers.keys, b_grad_k, C)
        if term.grad_v is not None:
            store_key_rows(term.grad_v, term.spans, batch, head, place, first_key, numbers.keys, b_grad_v, C)
    return zero


@triton.jit(do_not_specialize=[*NUMBERS, "self_tiles", "cross_tiles"])
def key_value_gradients_kernel(
    q,
    gate,
    grad_out,
    self_term,
    cross_term,
    bounds,
    self_tiles,
    cross_tiles,
    sequences,
    queries,
    keys,
    cross_keys,
    start,
    window,
    scale,
    softcap,
    C: tl.constexpr,
):
    """One tile of keys of one key head: cross tiles first, since all queries see them; then self tiles, longest first.

    Gradients that nobody asked for are None in their KeyTerm and cost nothing.
    """
    tiles = self_tiles + cross_tiles
    zero = 0
    if cross_term.grad_k is not None or cross_term.grad_v is not None:
        head, number = head_and_tile(tl.program_id(0), tiles, C.GROUP * queries, 1, C)
        if number < cross_tiles:
            numbers = Numbers(sequences, queries, cross_keys, 0, start, window, scale, softcap)
            zero = gradients_of_key_tile(q, gate, grad_out, cross_term, bounds, number, head, numbers, C, CROSS=True)
    if self_term.grad_k is not None or self_term.grad_v is not None:
        head, number = head_and_tile(tl.program_id(0) + zero, tiles, C.GROUP * queries, 1, C)
        number -= cross_tiles
        if number >= 0:
            numbers = Numbers(sequences, queries, keys, 0, start, window, scale, softcap)
            gradients_of_key_tile(q, gate, grad_out, self_term, bounds, number, head, numbers, C, CROSS=False)
