"""From a Call to launches of the Hopper gradients, for the calls that they cover."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor

from ...launch import LaunchConfig, launch
from .. import gates
from ..call import Call
from ..gpu.arguments import Prepared, is_described, rows
from ..gpu.key_value_gradients import KeyTerm
from ..gpu.query_gradients import Saved
from ..gpu.rows import Rows
from .forward import asked_for, constants_of, scaling_of, takes
from .key_value_gradients import hopper_key_value_gradients_kernel
from .query_gradients import hopper_query_gradients_kernel
from .schedule import BLOCK_M, BLOCK_N, QUERY_BLOCK, QUERY_STAGES, WARPS
from .work import Spans


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    HEADS: int
    HEAD_DIM: int
    GROUP: int  # query heads that share a key head
    CAUSAL: bool
    WINDOWED: bool
    CAPPED: bool
    SELF: bool  # gradients of the row's own keys are wanted
    CROSS: bool  # and of cross keys
    GATE_PER_QUERY: bool
    START_PER_ROW: bool
    STAGES: int = QUERY_STAGES
    BLOCK_M: int = QUERY_BLOCK
    BLOCK_N: int = BLOCK_N


def covers(call: Call, grad_out: Tensor, wanted: Sequence[bool]) -> bool:
    """Whether these kernels are asked for, and `takes_backward` the call."""
    return asked_for(call) and takes_backward(call, grad_out, wanted)


def takes_backward(call: Call, grad_out: Tensor, wanted: Sequence[bool]) -> bool:
    """Whether the kernels compute this call's gradients: what the forward takes, with queries and the output's gradient at
    addresses that tensor descriptors take. Not the gradients of keys without those of values, or the reverse; and no soft cap of
    heads of 128, whose slopes beside the sums of a group are too many registers (176 to 480 spilled bytes).

    wanted: six bools, as in `gradients`.
    """
    if not takes(call) or wanted[1] != wanted[2] or wanted[3] != wanted[4]:
        return False
    if call.softcap is not None and call.q.shape[3] == 128:
        return False
    if gates.spread(call.gate, call.q).stride(2) * QUERY_BLOCK >= 2**31:
        return False
    return is_described(call.q) and is_described(grad_out)


def key_value_gradients(own: KeyTerm, cross: KeyTerm, grad_out: Rows, prepared: Prepared) -> None:
    """Write the gradients of keys and values that the terms ask for; grad_out: that of the output."""
    call, numbers = prepared.call, prepared.numbers
    wants_self, wants_cross = (term.grad_k is not None and term.grad_v is not None for term in (own, cross))
    _, heads, queries, width = call.q.shape
    batch, key_heads, keys, _ = call.k.shape
    constants = Constants(
        HEADS=heads,
        HEAD_DIM=width,
        GROUP=heads // key_heads,
        CAUSAL=call.causal,
        WINDOWED=prepared.windowed,
        CAPPED=call.softcap is not None,
        SELF=wants_self,
        CROSS=wants_cross,
        GATE_PER_QUERY=gates.per_query(call.gate),
        START_PER_ROW=isinstance(numbers.start, Tensor),
    )
    self_tiles = triton.cdiv(keys, BLOCK_N) * wants_self
    cross_tiles = triton.cdiv(numbers.cross_keys, BLOCK_N) * wants_cross
    launch(
        hopper_key_value_gradients_kernel,
        ((self_tiles + cross_tiles) * key_heads * batch,),
        LaunchConfig(block_m=QUERY_BLOCK, block_n=BLOCK_N, warps=WARPS, stages=QUERY_STAGES, descriptors=True),
        prepared.inputs.q,
        prepared.inputs.gate,
        grad_out,
        own,
        cross,
        scaling_of(prepared),
        queries,
        keys,
        numbers.cross_keys,
        numbers.start,
        numbers.window,
        cross_tiles,
        batch,
        C=constants,
    )


def query_gradients(saved: Saved, grad_q: Tensor, prepared: Prepared) -> None:
    """Write the gradients of queries, of which `saved` has the log-sum-exps and row sums of both terms."""
    call, numbers = prepared.call, prepared.numbers
    batch, heads, queries, _ = call.q.shape
    constants = constants_of(prepared)
    launch(
        hopper_query_gradients_kernel,
        (triton.cdiv(queries, BLOCK_M) * heads * batch,),
        LaunchConfig(block_m=BLOCK_M, block_n=BLOCK_N, warps=WARPS, stages=constants.STAGES, descriptors=True),
        prepared.inputs,
        saved,
        rows(grad_q),
        Spans(*prepared.spans),
        scaling_of(prepared),
        queries,
        numbers.keys,
        numbers.cross_keys,
        numbers.start,
        numbers.window,
        batch,
        C=constants,
    )
