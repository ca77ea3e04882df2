"""Backward in three launches without atomics: row sums, gradients of keys and values, gradients of queries.

Every element of a gradient is written once, by one program that adds in a fixed order: the same bits every run. Scores are
computed twice (7 products per pair of tiles, not 5), which is what that costs.
"""

import torch
import triton

from ..launch import LaunchConfig, launch
from .triton_call import (
    empty_like,
    gate_rows,
    geometry,
    is_plain,
    rows,
    rows_or_none,
    start,
    tile_count,
    unit_stride,
    used_slots,
)
from .triton_key_value_gradients import key_value_gradients_kernel
from .triton_query_gradients import query_gradients_kernel, row_sums_kernel, sum_heads_kernel

_SUMS = LaunchConfig(block_m=32, block_n=1, warps=4, stages=1)  # bound by memory: tiles of a few kilobytes


def backward(
    grad_out,
    self_out,
    cross_out,
    self_lse,
    cross_lse,
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    key_mask,
    cross_mask,
    query_start,
    cu_seqlens,
    cross_cu_seqlens,
    causal,
    scale,
    window,
    softcap,
    wanted,
):
    """Gradients of q, k, v, cross_k, cross_v and gate from that of out and what `forward` returned; None where not wanted.

    self_out: un-gated like cross_out, needed for q and k; what the rounded out keeps of it is too little under a large gate
    (13 times the error of eager fp16 in grad_k at a gate of 100). wanted: six bools, for these six.
    """
    grad_out, q, k, v, cross_k, cross_v = (unit_stride(x) for x in (grad_out, q, k, v, cross_k, cross_v))
    inputs = q, k, v, cross_k, cross_v, gate
    if q.numel() == 0:
        return tuple(torch.zeros_like(x) if want else None for x, want in zip(inputs, wanted, strict=True))
    grads = [empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
    grad_q, grad_k, grad_v, grad_cross_k, grad_cross_v, grad_gate = grads
    want_self, want_cross = grad_k is not None or grad_v is not None, False
    if cross_k.shape[2] > 0:
        want_cross = grad_cross_k is not None or grad_cross_v is not None
    elif grad_gate is not None:
        grad_gate.zero_()

    arguments, constants = geometry(
        q, k, cross_k, query_start, cu_seqlens, cross_cu_seqlens, causal, scale, window, softcap
    )
    constants["GATE_PER_QUERY"] = gate.dim() == 3
    crossing = cross_k.shape[2] > 0
    self_sums, cross_sums = _row_sums(grad_out, self_out, cross_out, crossing, grads, constants)
    if crossing and grad_gate is not None:
        _sum_gate(cross_sums, grad_gate)
    tensors = (rows(x) for x in (q, k, v, cross_k, cross_v))
    tensors = (*tensors, gate_rows(gate, q), rows(grad_out), self_lse, cross_lse, self_sums, cross_sums)

    plain = is_plain((q, k, v, cross_k, cross_v, grad_out), key_mask, cross_mask, cu_seqlens, constants)
    masks = [x if x is None else unit_stride(x) for x in (key_mask, cross_mask)]

    def run_key_value_gradients(config):
        self_tiles = want_self * tile_count(k.shape[2], cu_seqlens, config.block_n)
        cross_tiles = want_cross * tile_count(cross_k.shape[2], cross_cu_seqlens, config.block_n)
        launch(
            key_value_gradients_kernel,
            ((self_tiles + cross_tiles) * k.shape[1] * k.shape[0],),
            config,
            *tensors,
            *(rows_or_none(x) for x in (grad_k, grad_v)),
            *(rows_or_none(x) if want_cross else None for x in (grad_cross_k, grad_cross_v)),
            *(x for mask in masks for x in (mask, 0 if mask is None else mask.stride(0))),
            self_tiles,
            cross_tiles,
            *arguments,
            **constants,
            DESCRIPTORS=config.descriptors,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )

    def run_query_gradients(config):
        sequences = arguments[2]
        launch(
            query_gradients_kernel,
            (tile_count(q.shape[2], cu_seqlens, config.block_m) * q.shape[1] * q.shape[0],),
            config,
            *tensors,
            rows(grad_q),
            used_slots(key_mask, cu_seqlens, sequences, config.block_n),
            used_slots(cross_mask, cross_cu_seqlens, sequences, config.block_n) if crossing else None,
            *arguments,
            **constants,
            CROSS=crossing,
            EVEN_CROSS=cu_seqlens is None and cross_k.shape[2] % config.block_n == 0,
            DESCRIPTORS=config.descriptors,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )

    if want_self or want_cross:
        start("key_value_gradients", run_key_value_gradients, q, k, cross_k, cu_seqlens, constants, plain)
    if grad_q is not None:
        start("query_gradients", run_query_gradients, q, k, cross_k, cu_seqlens, constants, plain)
    return tuple(grads)


def _row_sums(grad_out, self_out, cross_out, crossing, grads, constants):
    """-> self_sums and cross_sums (B, Hq, S) fp32 of `row_sums_kernel`, None where no wanted gradient needs them."""
    grad_q, grad_k, _, grad_cross_k, _, grad_gate = (x is not None for x in grads)
    want_self = grad_q or grad_k
    want_cross = crossing and (grad_q or grad_cross_k or grad_gate)
    self_sums, cross_sums = (
        grad_out.new_empty(grad_out.shape[:3], dtype=torch.float32) if want else None
        for want in (want_self, want_cross)
    )
    if want_self or want_cross:
        batch, heads, queries, width = grad_out.shape
        launch(
            row_sums_kernel,
            (triton.cdiv(queries, _SUMS.block_m) * heads * batch,),
            _SUMS,
            rows(grad_out),
            rows_or_none(self_out if want_self else None),
            rows_or_none(cross_out if want_cross else None),
            self_sums,
            cross_sums,
            queries,
            HEADS=heads,
            HEAD_DIM=width,
            BLOCK_D=constants["BLOCK_D"],
            BLOCK_M=_SUMS.block_m,
        )
    return self_sums, cross_sums


def _sum_gate(cross_sums, grad_gate):
    """The gate's gradient from that of each query and head, by what the gate was spread over."""
    batch, heads, queries = cross_sums.shape
    if grad_gate.dim() == 1:
        grad_gate.copy_(cross_sums.sum((0, 2)) if grad_gate.shape[0] > 1 else cross_sums.sum())
    elif grad_gate.shape[1] == heads:
        grad_gate.copy_(cross_sums)
    else:
        total = cross_sums.new_empty(batch, 1, queries)
        programs = (triton.cdiv(queries, _SUMS.block_m) * batch,)
        launch(sum_heads_kernel, programs, _SUMS, cross_sums, total, queries, HEADS=heads, BLOCK_M=_SUMS.block_m)
        grad_gate.copy_(total)
