"""Forward in one launch: the cross softmax, then the self softmax, over one query tile that stays on chip.

Only one accumulator is alive at a time: the un-gated cross result is stored (the backward needs it anyway) and read back for
the sum. Kept in registers it takes 210 to 255 of them at D = 128 and spills; stored, 171.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch
from ...plans import fresh
from ...tiles import vector, zeros
from ..call import Call
from .arguments import NUMBERS, Prepared, rows, rows_or_none, run_tuned
from .packing import raise_faults
from .rows import Rows, load_gate, load_query_rows, store_query_rows
from .scores import LOG2_E, capped_scores, join_sink
from .spans import query_place, query_tile
from .terms import cross_term, hide_unseen, key_tile, listed_span, multiply_keys, read_keys, self_term


class Kept(NamedTuple):
    """What a forward keeps besides its output: the un-gated terms for the backward, of the self term only where the gradients of
    scores are wanted, and the log-sum-exps."""

    self_term: bool
    terms: bool
    lse: bool


EVERYTHING = Kept(True, True, True)


class ForwardResults(NamedTuple):
    """self_out, cross_out: the un-gated terms in the shape of out, None where they are not kept and where T = 0, where out is the
    self term. lse: None or both log-sum-exps, (2, B, Hq, S) fp32 in base 2; (1, B, Hq, S) where T = 0. lists, cross_lists: of the
    masks' used tiles, for the backward."""

    out: Tensor
    self_out: Tensor | None
    cross_out: Tensor | None
    lse: Tensor | None
    lists: Tensor | None = None
    cross_lists: Tensor | None = None


class Outputs(NamedTuple):
    """Where the kernel writes its ForwardResults; what is not kept is None, but for the cross term, whose place then is out."""

    out: Rows
    self_out: Rows | None
    cross_out: Rows | None
    self_lse: Tensor | None
    cross_lse: Tensor | None
    end: None = None  # see NOTATION.md


@triton.jit
def attend(b_q, q, tile, term, used_tiles, scale, softcap, C: tl.constexpr, CROSS: tl.constexpr):
    """Online softmax of a QueryTile's rows of q, b_q [BM, BLOCK_D], over a Term -> weighted values [BM, BLOCK_D] and log-sum-exps [BM]
    in base 2: 0 and -inf for a row that saw nothing. scale: of the scores, in base 2."""
    b_sum = zeros(C.BLOCK_M, C.BLOCK_D)
    b_top = vector(C.BLOCK_M, -float("inf"))  # largest score so far
    b_total = vector(C.BLOCK_M, 0.0)  # of exp2(score - top)
    FULL: tl.constexpr = CROSS and C.EVEN_CROSS and used_tiles is None
    begin, end = listed_span(used_tiles, term)
    factor = scale
    if C.CAPPED and not CROSS:
        factor = LOG2_E
    unit = factor  # of `b_top`, and what then is left to multiply with: see `softmax_weights`
    rest = 1.0
    if b_q.dtype == tl.float32:
        unit = 1.0
        rest = factor
    for place in range(begin, end):
        number, o_key, m_used = key_tile(used_tiles, term, place, C, CROSS)
        if not C.BLOCK_K:
            # [BN, BLOCK_D]
            b_k = read_keys(term.k, term.s_k, number, m_used, C, FULL)
        if C.DESCRIPTORS:  # asked for together, both wait at one barrier
            b_v = read_keys(term.v, term.s_v, number, m_used, C, FULL)
        # [BM, BN]
        if C.BLOCK_K:
            b_scores = multiply_keys(q, tile, term.k, term.s_k, number, m_used, C)
        else:
            b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=C.PRECISION)
        if C.CAPPED and not CROSS:
            b_scores = softcap * capped_scores(b_scores, scale, softcap, EXACT=b_q.dtype == tl.float32)
        b_scores = hide_unseen(b_scores, -float("inf"), used_tiles, term, number, o_key, m_used, C, CROSS)

        # [BM]
        b_new_top = tl.maximum(b_top, tl.max(b_scores, 1) * unit)
        b_base = tl.where(b_new_top == -float("inf"), 0.0, b_new_top)  # a row that has seen no key yet
        # [BM, BN]
        b_weights = tl.exp2((b_scores * unit - b_base[:, None]) * rest)
        b_decay = tl.exp2((b_top - b_base) * rest)
        b_total = b_total * b_decay + tl.sum(b_weights, 1)
        b_sum = b_sum * b_decay[:, None]
        if not C.DESCRIPTORS:
            # [BN, BLOCK_D]
            b_v = read_keys(term.v, term.s_v, number, m_used, C, FULL)
        b_sum = tl.dot(b_weights.to(b_v.dtype), b_v, b_sum, input_precision=C.PRECISION)
        b_top = b_new_top
    b_total = tl.where(b_total == 0, 1.0, b_total)
    return b_sum / b_total[:, None], b_top * rest + tl.log2(b_total)


@triton.jit(do_not_specialize=[*NUMBERS, "shares"])
def forward_kernel(
    inputs, outputs, masks, sequences, queries, keys, cross_keys, start, window, scale, softcap, shares, C: tl.constexpr
):
    """One tile of queries of one head: shapes as in `adaptive_fusion_attention`, the log-sum-exps in base 2.

    shares: batch rows that read one row of cross keys.
    """
    place = query_place(masks.bounds, sequences, queries, keys + cross_keys, C)
    if place.first >= place.count:
        return
    tile = query_tile(place, queries, C)
    # [BM, BLOCK_D]
    b_q = load_query_rows(inputs.q, tile, C)
    scale = scale * LOG2_E

    if C.CROSS:
        term = cross_term(inputs, masks, cross_keys, tile, shares, C)
        b_cross, b_lse = attend(b_q, inputs.q, tile, term, masks.cross_tiles, scale, softcap, C, CROSS=True)
        store_query_rows(outputs.cross_out, tile, b_cross, C)
        if outputs.cross_lse is not None:
            tl.store(outputs.cross_lse + tile.row + tile.o_query, b_lse, mask=tile.m_query)

    term = self_term(inputs, masks, queries, keys, tile, start, window, C)
    b_out, b_lse = attend(b_q, inputs.q, tile, term, masks.tiles, scale, softcap, C, CROSS=False)
    if inputs.sink is not None:
        b_lse, b_kept = join_sink(b_lse, tl.load(inputs.sink + tile.head).to(tl.float32))
        b_out *= b_kept[:, None]
    if outputs.self_lse is not None:
        tl.store(outputs.self_lse + tile.row + tile.o_query, b_lse, mask=tile.m_query)
    if outputs.self_out is not None:
        store_query_rows(outputs.self_out, tile, b_out, C)
    if C.CROSS:
        tl.debug_barrier()  # the threads that read a cross result need not be those that stored it
        b_cross = load_query_rows(outputs.cross_out, tile, C)
        b_out += load_gate(inputs.gate, tile, C) * b_cross.to(tl.float32)
    store_query_rows(outputs.out, tile, b_out, C)


def both_lse(lse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The self and the cross log-sum-exps of a ForwardResults; without cross keys the latter are None."""
    if lse is None:
        return None, None
    return lse[0], lse[1] if len(lse) > 1 else None


def empty_results(prepared: Prepared, kept: Kept) -> ForwardResults:
    """The ForwardResults of a call, to be written."""
    q, crossing = prepared.q, prepared.crossing
    out = fresh(torch.empty_like(q))
    self_out = fresh(torch.empty_like(q)) if crossing and kept.self_term else None
    cross_out = fresh(torch.empty_like(q)) if crossing and kept.terms else None
    lse = fresh(q.new_empty((1 + crossing, *q.shape[:3]), dtype=torch.float32)) if kept.lse else None
    return ForwardResults(out, self_out, cross_out, lse)


def gluon_asked() -> bool:
    """Whether LAYALIGN_GLUON=1 asks for the Hopper kernel, which no GPU has run, where it covers a call."""
    return os.environ.get("LAYALIGN_GLUON") == "1"


def forward(call: Call, kept: Kept = EVERYTHING) -> ForwardResults:
    """The ForwardResults of a call whose scale is given."""
    if call.cu_seqlens is not None:
        raise_faults(call.q.device)
    prepared = Prepared(call)
    if gluon_asked():
        from ..gluon import forward as hopper

        if hopper.covers(call):
            return hopper.forward(prepared, kept)
    q, results = prepared.q, empty_results(prepared, kept)
    if q.numel() == 0:
        return results
    out, self_out, cross_out, lse, *_ = results
    cross_rows = rows(out if cross_out is None else cross_out) if prepared.crossing else None
    outputs = Outputs(rows(out), rows_or_none(self_out), cross_rows, *both_lse(lse))

    def run(config):
        launch(
            forward_kernel,
            (prepared.query_tiles(config.block_m) * q.shape[1] * q.shape[0],),
            config,
            prepared.inputs,
            outputs,
            prepared.masks(config.block_n),
            *prepared.numbers,
            q.shape[0] // call.cross_k.shape[0],
            C=prepared.constants(config, cross_tiles=True, others=(out,)),
        )

    run_tuned("forward", run, prepared, plain=prepared.is_plain(prepared.tensors[1:5]))
    return ForwardResults(*results[:4], *prepared.lists) if kept.terms else results
