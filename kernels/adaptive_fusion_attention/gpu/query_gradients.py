"""Gradients of queries, and the row sums that both gradient launches read."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...tiles import zeros
from .arguments import NUMBERS
from .rows import Rows, load_gate, load_query_rows, read_rows, store_query_rows
from .scores import LOG2_E, load_lse, weights_again
from .spans import QueryPlace, query_place, query_tile
from .terms import cross_term, hide_unseen, key_tile, listed_span, multiply_keys, read_keys, self_term

NOWHERE = tl.constexpr(2**30)  # past the rows of any descriptor


class Saved(NamedTuple):
    """What the gradients start from: that of out, log-sum-exps in base 2, and the sums of `row_sums_kernel`, (B, Hq, S) fp32."""

    grad_out: Rows
    self_lse: Tensor
    cross_lse: Tensor
    self_sums: Tensor | None
    cross_sums: Tensor | None
    end: None = None  # see NOTATION.md


@triton.jit(do_not_specialize=["queries"])
def row_sums_kernel(grad_out, self_out, cross_out, self_sums, cross_sums, queries, C: tl.constexpr):
    """sums = sum_d grad_out * term, (B, Hq, S) fp32, of either un-gated term; the cross one is also the gate's gradient."""
    tiles = tl.cdiv(queries, C.BLOCK_M)
    program = tl.program_id(0)
    batch = program // (tiles * C.HEADS)
    head = program // tiles % C.HEADS
    tile = query_tile(QueryPlace(batch, head, batch, 0, queries, program % tiles * C.BLOCK_M), queries, C)
    # [BM, BLOCK_D]
    b_grad = load_query_rows(grad_out, tile, C).to(tl.float32)
    if cross_sums is not None:
        b_cross = load_query_rows(cross_out, tile, C).to(tl.float32)
        tl.store(cross_sums + tile.row + tile.o_query, tl.sum(b_grad * b_cross, 1), mask=tile.m_query)
    if self_sums is not None:
        b_self = load_query_rows(self_out, tile, C).to(tl.float32)
        tl.store(self_sums + tile.row + tile.o_query, tl.sum(b_grad * b_self, 1), mask=tile.m_query)


@triton.jit
def load_lse_and_sums(lse, sums, tile):
    """-> log-sum-exps and row sums [BM] of a QueryTile."""
    b_lse = load_lse(lse + tile.row, tile.o_query, tile.m_query)
    return b_lse, tl.load(sums + tile.row + tile.o_query, mask=tile.m_query, other=0.0)


@triton.jit
def add_key_tiles(
    b_grad_q,
    b_q,
    b_grad,
    q,
    grad_out,
    tile,
    b_lse,
    b_sums,
    term,
    used_tiles,
    scale,
    softcap,
    C: tl.constexpr,
    CROSS: tl.constexpr,
):
    """Add what a Term contributes to the gradients [BM, BLOCK_D] of a QueryTile, still to be multiplied by the scale.

    b_q, b_grad: its rows [BM, BLOCK_D] of q and of grad_out; b_lse, b_sums: [BM] of this term; scale: in base 2. AHEAD: while a tile's
    weights are computed, tensor cores multiply the gradient with the next tile's values, which may lie past the last: zeros, by
    descriptor.
    """
    FULL: tl.constexpr = CROSS and C.EVEN_CROSS and used_tiles is None
    begin, end = listed_span(used_tiles, term)
    if C.AHEAD:
        first = tl.where(begin < end, begin * C.BLOCK_N, NOWHERE)
        # [BN, BLOCK_D]
        b_v = read_rows(term.v, term.s_v, first, None, C.BLOCK_N, C)
        # [BM, BN]
        b_ahead = tl.dot(b_grad, tl.trans(b_v), input_precision=C.PRECISION)
    for place in range(begin, end):
        number, o_key, m_used = key_tile(used_tiles, term, place, C, CROSS)
        # [BN, BLOCK_D]
        b_k = read_keys(term.k, term.s_k, number, m_used, C, FULL)
        if C.AHEAD:
            b_v = read_rows(term.v, term.s_v, (number + 1) * C.BLOCK_N, None, C.BLOCK_N, C)
        # [BM, BN]
        if C.BLOCK_K:
            b_scores = multiply_keys(q, tile, term.k, term.s_k, number, m_used, C)
        else:
            b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=C.PRECISION)
        if C.AHEAD:
            # Read before its registers take the next product: or else the assembler lets no product run beside anything.
            b_products = b_ahead - b_sums[:, None]
            b_ahead = tl.dot(b_grad, tl.trans(b_v), input_precision=C.PRECISION)
        b_weights, b_capped = weights_again(
            b_scores, scale, softcap, b_lse[:, None], C.CAPPED and not CROSS, EXACT=b_q.dtype == tl.float32
        )
        b_weights = hide_unseen(b_weights, 0.0, used_tiles, term, number, o_key, m_used, C, CROSS)
        if C.BLOCK_K:
            b_products = multiply_keys(grad_out, tile, term.v, term.s_v, number, m_used, C) - b_sums[:, None]
        elif not C.AHEAD:
            # [BN, BLOCK_D]
            b_v = read_keys(term.v, term.s_v, number, m_used, C, FULL)
            # [BM, BN]
            b_products = tl.dot(b_grad, tl.trans(b_v), input_precision=C.PRECISION) - b_sums[:, None]
        b_grad_scores = b_weights * b_products
        if C.CAPPED and not CROSS:
            b_grad_scores = b_grad_scores * (1 - b_capped * b_capped)
        b_grad_q = tl.dot(b_grad_scores.to(b_k.dtype), b_k, b_grad_q, input_precision=C.PRECISION)
    return b_grad_q


@triton.jit(do_not_specialize=NUMBERS)
def query_gradients_kernel(
    inputs, saved, grad_q, masks, sequences, queries, keys, cross_keys, start, window, scale, softcap, C: tl.constexpr
):
    """One tile of queries of one head."""
    place = query_place(masks.bounds, sequences, queries, keys + cross_keys, C)
    if place.first >= place.count:
        return
    tile = query_tile(place, queries, C)
    # [BM, BLOCK_D]
    b_q = load_query_rows(inputs.q, tile, C)
    b_grad = load_query_rows(saved.grad_out, tile, C)
    b_grad_q = zeros(C.BLOCK_M, C.BLOCK_D)
    if C.CROSS:
        b_lse, b_sums = load_lse_and_sums(saved.cross_lse, saved.cross_sums, tile)
        term = cross_term(inputs, masks, cross_keys, tile, 1, C)
        b_grad_q = add_key_tiles(
            b_grad_q,
            b_q,
            b_grad,
            inputs.q,
            saved.grad_out,
            tile,
            b_lse,
            b_sums,
            term,
            masks.cross_tiles,
            scale * LOG2_E,
            softcap,
            C,
            CROSS=True,
        )
        b_grad_q = b_grad_q * load_gate(inputs.gate, tile, C)  # once, before the self term joins
    b_lse, b_sums = load_lse_and_sums(saved.self_lse, saved.self_sums, tile)
    term = self_term(inputs, masks, queries, keys, tile, start, window, C)
    b_grad_q = add_key_tiles(
        b_grad_q,
        b_q,
        b_grad,
        inputs.q,
        saved.grad_out,
        tile,
        b_lse,
        b_sums,
        term,
        masks.tiles,
        scale * LOG2_E,
        softcap,
        C,
        CROSS=False,
    )
    store_query_rows(grad_q, tile, b_grad_q * scale, C)
