"""The ring of query tiles that the gradients of keys and values go through, and the producer that fills it."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import schedule
from .rings import copy_tile, place_and_phase
from .work import head_pointer, wide

GROUPS = gl.constexpr(schedule.GROUPS)


class QueryRing(NamedTuple):
    """Places for tiles of queries in shared memory: rows of q and of the output's gradient [STAGES, 1, BM, D], and of each query
    [STAGES, BM] fp32 the negated log-sum-exp, the negated row sum and the gate; barriers [STAGES, 1]."""

    q: object
    grad_out: object
    lse: object
    sums: object
    gates: object
    full: object
    empty: object


class Source(NamedTuple):
    """What the producer reads: descriptors of the rows of all heads that share a key head, and pointers to the first head's
    log-sum-exps, row sums and gates."""

    q: object
    grad_out: object
    lse: object
    sums: object
    gate: object


@gluon.constexpr_function
def tile_layout(block, width, dtype):
    """Of a tile of rows of one head, as the last of its three dimensions and the copy want it."""
    return gl.NVMMASharedLayout.get_default_for([1, block, width], dtype)


@gluon.jit
def make_query_ring(DTYPE: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr):
    """A QueryRing of empty places. STAGES: as in C; Triton 3.6 counts to parameters only.

    `full` takes the copies, and the producer's arrival with the numbers of queries.
    """
    LAYOUT: gl.constexpr = tile_layout(C.BLOCK_M, C.HEAD_DIM, DTYPE)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(DTYPE, [STAGES, 1, C.BLOCK_M, C.HEAD_DIM], LAYOUT)
    grad_out = gl.allocate_shared_memory(DTYPE, [STAGES, 1, C.BLOCK_M, C.HEAD_DIM], LAYOUT)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, C.BLOCK_M], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, C.BLOCK_M], NUMBERS)
    gates = lse
    if C.CROSS:
        gates = gl.allocate_shared_memory(gl.float32, [STAGES, C.BLOCK_M], NUMBERS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=2)
        mbarrier.init(empty.index(place), count=GROUPS)
    return QueryRing(q, grad_out, lse, sums, gates, full, empty)


@gluon.jit
def describe_group(x, tile, queries, C: gl.constexpr):
    """A descriptor of the rows of all heads that share the tile's key head: past a head's queries it reads zeros."""
    return tma.make_tensor_descriptor(
        head_pointer(x, tile.batch, tile.head * C.GROUP, 0),
        shape=[C.GROUP, queries, C.HEAD_DIM],
        strides=[x.head, x.row, 1],
        block_shape=[1, C.BLOCK_M, C.HEAD_DIM],
        layout=tile_layout(C.BLOCK_M, C.HEAD_DIM, x.pointer.dtype.element_ty),
    )


@gluon.jit
def produce_queries(q, gate, grad_out, tile, ring, queries, C: gl.constexpr):
    """The producer warp: the tiles of queries that see the tile's keys, of one head after the other.

    A query that sees nothing, or is none, gets a log-sum-exp by which its weights are 0. The numbers of a tile are asked for before
    its place is empty.
    """
    NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    q_rows = describe_group(q, tile, queries, C)
    grad_rows = describe_group(grad_out, tile, queries, C)
    offset = (wide(tile.batch * C.HEADS + tile.head * C.GROUP) * wide(queries)).to(gl.int64)
    p_gate = head_pointer(gate, tile.batch, tile.head * C.GROUP, 0)
    o_row = gl.arange(0, C.BLOCK_M, NUMBERS)
    member = 0
    number = tile.begin
    for turn in range(C.GROUP * (tile.end - tile.begin)):
        first = number * C.BLOCK_M
        m_query = o_row < queries - first
        place_of_row = offset + (wide(member) * wide(queries)).to(gl.int64) + first
        b_lse = gl.load(tile.lse + place_of_row + o_row, mask=m_query, other=-float("inf"))
        b_lse = gl.where(b_lse == -float("inf"), -float("inf"), -b_lse)
        b_sums = gl.load(tile.sums + place_of_row + o_row, mask=m_query, other=0.0)
        if C.CROSS:
            p_gates = p_gate + (wide(member) * wide(gate.head)).to(gl.int64)
            if C.GATE_PER_QUERY:
                p_gates += (wide(first) * wide(gate.row)).to(gl.int64)
                # 32 bits do, see `takes_backward`: 64 here spill 16 bytes (Triton 3.6)
                m_gate = m_query & (tile.crossing > 0)
                b_gates = gl.load(p_gates + o_row * gate.row, mask=m_gate, other=1.0).to(gl.float32)
            else:
                b_gates = gl.load(p_gates + o_row * 0, mask=o_row < C.BLOCK_M * tile.crossing, other=1.0).to(gl.float32)
        place, phase = place_and_phase(turn, C.STAGES)
        mbarrier.wait(ring.empty.index(place), phase ^ 1)
        full = ring.full.index(place)
        mbarrier.expect(full, 2 * C.BLOCK_M * C.HEAD_DIM * 2)
        copy_tile(q_rows, [member, first, 0], full, ring.q.index(place))
        copy_tile(grad_rows, [member, first, 0], full, ring.grad_out.index(place))
        ring.lse.index(place).store(b_lse)
        ring.sums.index(place).store(-b_sums)
        if C.CROSS:
            ring.gates.index(place).store(b_gates)
        mbarrier.arrive(full, count=1)
        number += 1
        if number == tile.end:
            number = tile.begin
            member += 1
