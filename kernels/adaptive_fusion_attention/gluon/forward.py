"""From a Call to a launch of the Hopper forward, for the calls that it covers."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...launch import LaunchConfig, architecture, launch
from .. import gates
from ..call import Call
from ..gpu.arguments import Prepared, at_16_bytes, rows, rows_or_none
from ..gpu.forward import EVERYTHING, ForwardResults, Kept, Outputs, both_lse, empty_results, gluon_asked
from .kernel import Scaling, hopper_forward_kernel
from .schedule import BLOCK_M, BLOCK_N, STAGES, WARPS
from .work import Spans

# Up to here a tile of 128 queries is half empty, and the other kernel has one of 64.
FEWEST_QUERIES = 65


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    HEADS: int
    HEAD_DIM: int
    GROUP: int  # query heads that share a key head
    CAUSAL: bool
    WINDOWED: bool
    CAPPED: bool
    CROSS: bool  # there are cross keys
    EVEN_CROSS: bool  # and every row sees them all, in whole tiles
    GATE_PER_QUERY: bool
    START_PER_ROW: bool
    STAGES: int
    BLOCK_M: int = BLOCK_M
    BLOCK_N: int = BLOCK_N


def covers(call: Call) -> bool:
    """Whether the kernel is asked for, and `takes` the call."""
    return asked_for(call) and takes(call)


def asked_for(call: Call) -> bool:
    """Whether LAYALIGN_GLUON=1 asks for Hopper kernels, the GPU is one, and there are queries enough."""
    if not gluon_asked() or call.q.shape[2] < FEWEST_QUERIES:
        return False
    return architecture(call.q.device) == "sm_90"


def takes(call: Call) -> bool:
    """Whether the kernel computes this call: half precision, heads of 64 or 128, no masks, no packing, no sink, and keys and values at
    addresses that tensor descriptors take."""
    q = call.q
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] not in STAGES or q.numel() == 0:
        return False
    if any(x is not None for x in (call.key_mask, call.cross_mask, call.cu_seqlens, call.sink)):
        return False
    if call.k.shape[2] == 0:
        return False
    return all(map(_reads_rows, call[1:5]))


def forward(prepared: Prepared, kept: Kept = EVERYTHING) -> ForwardResults:
    """The ForwardResults of a call that the kernel takes, whose scale is given."""
    call, results = prepared.call, empty_results(prepared, kept)
    q, numbers = prepared.q, prepared.numbers
    out, self_out, cross_out, lse, *_ = results
    batch, heads, queries, _ = q.shape
    constants = constants_of(prepared)
    launch(
        hopper_forward_kernel,
        (triton.cdiv(queries, BLOCK_M) * heads * batch,),
        LaunchConfig(block_m=BLOCK_M, block_n=BLOCK_N, warps=WARPS, stages=constants.STAGES, descriptors=True),
        prepared.inputs,
        Outputs(rows(out), rows_or_none(self_out), rows_or_none(cross_out), *both_lse(lse)),
        Spans(*prepared.spans),
        scaling_of(prepared),
        queries,
        numbers.keys,
        numbers.cross_keys,
        numbers.start,
        numbers.window,
        batch // call.cross_k.shape[0],
        batch,
        C=constants,
    )
    return results


def constants_of(prepared: Prepared) -> Constants:
    """What kernels that work on tiles of queries are compiled for."""
    call, crossing, numbers = prepared.call, prepared.crossing, prepared.numbers
    _, heads, _, width = prepared.q.shape
    return Constants(
        HEADS=heads,
        HEAD_DIM=width,
        GROUP=heads // call.k.shape[1],
        CAUSAL=call.causal,
        WINDOWED=prepared.windowed,
        CAPPED=call.softcap is not None,
        CROSS=crossing,
        EVEN_CROSS=crossing and prepared.spans[1] is None and numbers.cross_keys % BLOCK_N == 0,
        GATE_PER_QUERY=gates.per_query(call.gate),
        START_PER_ROW=isinstance(numbers.start, Tensor),
        STAGES=STAGES[width],
    )


def scaling_of(prepared: Prepared) -> Scaling:
    """The Scaling of a call's scores."""
    factor, cap = prepared.numbers.scale * math.log2(math.e), prepared.call.softcap
    return Scaling(factor, -2 * factor / cap, cap * math.log2(math.e)) if cap else Scaling(factor, 0.0, 0.0)


def _reads_rows(x):
    """Whether a tensor descriptor can be made of any rows of any head: 16-byte addresses, rows apart."""
    return x.stride(3) == 1 and at_16_bytes(x) and x.stride(2) > 0
