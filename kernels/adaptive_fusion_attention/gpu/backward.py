"""Backward in three launches without atomics: row sums, gradients of keys and values, gradients of queries.

Every element of a gradient is written once, by one program that adds in a fixed order: the same bits every run. Scores are
computed twice (7 products per pair of tiles, not 5), which is what that costs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import LaunchConfig, launch
from ...plans import fresh
from .. import gates
from ..call import Call
from .arguments import (
    Constants,
    Prepared,
    block_of_width,
    empty_like,
    is_wide,
    mask_and_stride,
    rows,
    rows_or_none,
    run_tuned,
    tile_count,
    unit_stride,
)
from .forward import ForwardResults, both_lse, gluon_asked
from .key_value_gradients import KeyTerm, key_value_gradients_kernel
from .query_gradients import Saved, query_gradients_kernel, row_sums_kernel

_SUMS = LaunchConfig(block_m=32, block_n=1, warps=4, stages=1)  # bound by memory: tiles of a few kilobytes


class Gradients(NamedTuple):
    """Of the first seven fields of a Call; None where not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    cross_k: Tensor | None
    cross_v: Tensor | None
    gate: Tensor | None
    sink: Tensor | None = None


def backward(grad_out: Tensor, results: ForwardResults, call: Call, wanted: Sequence[bool]) -> Gradients:
    """The Gradients of a call from that of its output and what `forward` returned; wanted: seven bools, or six without
    a sink.

    self_out is un-gated like cross_out, needed for q and k; what the rounded out keeps of it is too little under a large gate
    (13 times the error of eager fp16 in grad_k at a gate of 100).
    """
    grads = gradients(grad_out, results, call, wanted)
    if wanted[5]:
        grads = grads._replace(gate=gate_gradient(grads.gate, call.gate))
    if any(wanted[6:]):
        assert results.lse is not None and call.sink is not None
        grads = grads._replace(sink=sink_gradient(grads.sink, results.lse[0], call.sink))
    return grads


def gradients(grad_out: Tensor, results: ForwardResults, call: Call, wanted: Sequence[bool]) -> Gradients:
    """As `backward`, but for the gate: its gradient is that of each query, to be summed, where the gate is no tensor of its own for
    each; None where there are no cross keys. And for the sink: in place of its gradient the row sums of the self term."""
    prepared = Prepared(call, results[4:])
    q, grad_out = prepared.q, unit_stride(grad_out)
    inputs = prepared.tensors
    if q.numel() == 0:
        return Gradients(
            *(torch.zeros_like(x) if want else None for x, want in zip(inputs, wanted, strict=False)), None
        )
    want_gate = wanted[5] and prepared.crossing
    grads = Gradients(*(fresh(empty_like(x)) if want else None for x, want in zip(inputs, wanted, strict=False)), None)
    want_sink = any(wanted[6:])
    saved = _row_sums(grad_out, results, grads, want_gate, want_sink, prepared)
    plain = prepared.is_plain([*prepared.tensors, grad_out])
    others = [grad_out, *(x for x in grads[:5] if x is not None)]
    hopper = _hopper(call, grad_out, wanted)
    _key_value_gradients(saved, grads, prepared, plain, others, hopper)
    if grads.q is not None:
        _query_gradients(saved, grads.q, prepared, plain, others, hopper)
    if want_gate:
        sums = saved.cross_sums
        grads = grads._replace(gate=_sum_heads(sums) if gates.sums_heads(call.gate, sums) else sums)
    return grads._replace(sink=saved.self_sums) if want_sink else grads


def gate_gradient(sums: Tensor | None, gate: Tensor) -> Tensor:
    """The gradient of a gate from what `gradients` left of it."""
    return torch.zeros_like(gate) if sums is None else gates.gradient(sums, gate)


def sink_gradient(sums: Tensor | None, lse: Tensor, sink: Tensor) -> Tensor:
    """The gradient of a sink (Hq,): its weight in each row, by the log-sum-exp (B, Hq, S) in base 2 that counts it, times what the row
    loses to it. sums: row sums of the self term (B, Hq, S); None where there are no rows."""
    if sums is None:
        return torch.zeros_like(sink)
    # A row that sees nothing, beside a sink of -inf, has an lse of -inf too, and no weight.
    lse = torch.where(lse == -math.inf, math.inf, lse)
    weights = torch.exp2(sink.float().view(1, -1, 1) * math.log2(math.e) - lse)
    return -(weights * sums).sum((0, 2)).to(sink.dtype)


def _hopper(call, grad_out, wanted):
    """The module of the Hopper gradients where they are asked for and cover this backward, else None."""
    if gluon_asked():
        from ..gluon import backward as hopper

        if hopper.covers(call, grad_out, wanted):
            return hopper
    return None


def key_terms(saved: Saved, grads: Gradients, prepared: Prepared) -> tuple[KeyTerm, KeyTerm]:
    """The row's own keys and the cross keys, with where their gradients go."""
    call, (bounds, cross_bounds) = prepared.call, prepared.bounds
    _, k, v, cross_k, cross_v = prepared.tensors
    own = KeyTerm(
        rows(k),
        rows(v),
        saved.self_lse,
        saved.self_sums,
        rows_or_none(grads.k),
        rows_or_none(grads.v),
        *mask_and_stride(call.key_mask),
        bounds,
        prepared.spans[0],
    )
    cross = KeyTerm(
        rows(cross_k),
        rows(cross_v),
        saved.cross_lse,
        saved.cross_sums,
        *(rows_or_none(grad if prepared.crossing else None) for grad in (grads.cross_k, grads.cross_v)),
        *mask_and_stride(call.cross_mask),
        cross_bounds,
        prepared.spans[1],
    )
    return own, cross


def _key_value_gradients(saved, grads, prepared, plain, others, hopper):
    own, cross = key_terms(saved, grads, prepared)
    want_self, want_cross = (term.grad_k is not None or term.grad_v is not None for term in (own, cross))
    if not (want_self or want_cross):
        return
    if hopper is not None:
        hopper.key_value_gradients(own, cross, saved.grad_out, prepared)
        return
    bounds, cross_bounds = prepared.bounds
    _, k, _, cross_k, _ = prepared.tensors

    def run(config):
        self_tiles = want_self * tile_count(k.shape[2], bounds, config.block_n)
        cross_tiles = want_cross * tile_count(cross_k.shape[2], cross_bounds, config.block_n)
        launch(
            key_value_gradients_kernel,
            ((self_tiles + cross_tiles) * k.shape[1] * k.shape[0],),
            config,
            prepared.inputs.q,
            prepared.inputs.gate,
            saved.grad_out,
            own,
            cross,
            bounds,
            self_tiles,
            cross_tiles,
            *prepared.numbers,
            C=prepared.constants(config, cross_tiles=False, others=others),
        )

    run_tuned("key_value_gradients", run, prepared, plain)


def _query_gradients(saved, grad_q, prepared, plain, others, hopper):
    if hopper is not None:
        hopper.query_gradients(saved, grad_q, prepared)
        return

    def run(config):
        launch(
            query_gradients_kernel,
            (prepared.query_tiles(config.block_m) * grad_q.shape[1] * grad_q.shape[0],),
            config,
            prepared.inputs,
            saved,
            rows(grad_q),
            prepared.masks(config.block_n),
            *prepared.numbers,
            C=prepared.constants(config, cross_tiles=True, others=others),
        )

    run_tuned("query_gradients", run, prepared, plain)


def _row_sums(grad_out, results, grads, want_gate, want_sink, prepared):
    """The Saved of the gradient kernels; sums that no wanted gradient needs are None."""
    batch, heads, queries, width = prepared.q.shape
    want_self = grads.q is not None or grads.k is not None or want_sink
    want_cross = prepared.crossing and (want_gate or grads.q is not None or grads.cross_k is not None)
    self_lse, cross_lse = both_lse(results.lse)
    self_sums, cross_sums = (
        fresh(self_lse.new_empty(batch, heads, queries)) if want else None for want in (want_self, want_cross)
    )
    if want_self or want_cross:
        terms = [x for x, want in ((results.self_out, want_self), (results.cross_out, want_cross)) if want]
        constants = Constants(
            HEADS=heads,
            HEAD_DIM=width,
            BLOCK_D=block_of_width(width),
            WIDE=is_wide((grad_out, *terms), _SUMS.block_m),
            BLOCK_M=_SUMS.block_m,
        )
        launch(
            row_sums_kernel,
            (triton.cdiv(queries, _SUMS.block_m) * heads * batch,),
            _SUMS,
            rows(grad_out),
            rows(results.self_out) if want_self else None,
            rows(results.cross_out) if want_cross else None,
            self_sums,
            cross_sums,
            queries,
            C=constants,
        )
    return Saved(rows(grad_out), self_lse, cross_lse, self_sums, cross_sums)


def _sum_heads(sums):
    """(B, Hq, S) -> (B, 1, S), in the order of heads whatever the batch."""
    batch, heads, queries = sums.shape
    total = fresh(sums.new_empty(batch, 1, queries))
    programs = (triton.cdiv(queries, _SUMS.block_m) * batch,)
    launch(sum_heads_kernel, programs, _SUMS, sums, total, queries, HEADS=heads, BLOCK_M=_SUMS.block_m)
    return total


@triton.jit(do_not_specialize=["queries"])
def sum_heads_kernel(sums, total, queries, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """total (B, S) = sums (B, HEADS, S) over the heads, in their order whatever the batch."""
    tiles = tl.cdiv(queries, BLOCK_M)
    batch = tl.program_id(0) // tiles
    # [BM]
    o_query = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m_query = o_query < queries
    b_total = tl.zeros([BLOCK_M], tl.float32)
    for head in range(HEADS):
        row = (tl.cast(batch, tl.int64) * HEADS + head) * queries
        b_total += tl.load(sums + row + o_query, mask=m_query, other=0.0)
    tl.store(total + tl.cast(batch, tl.int64) * queries + o_query, b_total, mask=m_query)
