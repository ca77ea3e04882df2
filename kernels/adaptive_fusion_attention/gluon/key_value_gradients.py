"""Gradients of keys and values for Hopper by warp groups: a producer warp reads queries, two groups of four warps hold 64 keys each.

A program works on 128 keys of one head, the row's own or cross keys, which stay in shared memory, and goes through the queries that see
them, head by head of those that share the key head. One ring holds tiles of 64 queries: rows of q and of the output's gradient dO, which
the copy brings, and the queries' log-sum-exps, row sums and gates, which the producer writes; its barrier `full` takes both. Keys are in
rows, so that weights feed the next product from registers. For the tile t of a program:

| producer                              | each group of 64 keys                                                  |
|---------------------------------------|------------------------------------------------------------------------|
| ask for the numbers of t's queries    | wait for t; start S = K Q^T and dP = V dO^T                            |
| wait for an empty place for t         | when S is done: P = exp2(S - lse), times the gate; start dV += P dO    |
| start the copies of Q and dO of t     | when dP is done: dS = P (dP - sums), while dV is summed                |
| write the numbers of t                | start dK += dS Q; when dV and dK are done, the place is empty          |

A group waits for its sums, since those of two tiles beside the next scores are too many registers; meanwhile the other group multiplies.
Without atomics: one group adds what one key gets, in the order of heads and queries, the same bits every run.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import schedule
from .kernel import as_operand, product_layout
from .key_tiles import head_rows, key_tile
from .query_rings import make_query_ring, produce_queries
from .rings import place_and_phase, release
from .work import meet, row_layout, wide

LN_2 = gl.constexpr(0.6931471805599453)
GROUPS = gl.constexpr(schedule.GROUPS)
WARPS = gl.constexpr(schedule.WARPS)
SUMMING_REGISTERS = gl.constexpr(schedule.SUMMING_REGISTERS)
FEEDING_REGISTERS = gl.constexpr(schedule.FEEDING_REGISTERS)

# Places in `KeyPlaces.numbers`.
FIRST = gl.constexpr(0)
KEY_BEGIN = gl.constexpr(1)
SEEN = gl.constexpr(2)
KEYS = gl.constexpr(3)

in_band = gluon.jit(schedule.in_band)


class KeyPlaces(NamedTuple):
    """Shared memory: keys and values [GROUPS, 64, D], a QueryRing, the numbers 0 .. 128, as in `Places`, and of the KeyTile first,
    key_begin, seen and keys [4], which so do not occupy registers through the loop."""

    k: object
    v: object
    ring: object
    columns: object
    numbers: object


@gluon.jit
def load_keys(x, places, group: gl.constexpr, C: gl.constexpr):
    """The group's keys [64, D] of HeadRows, zeros past the last that is seen."""
    ROWS: gl.constexpr = row_layout(C.HEAD_DIM)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ROWS)
    o_key = places.numbers.slice(FIRST, 1).load(BY_ROW) + places.columns.slice(group * 64, 64).load(BY_ROW)
    p_rows = x.pointer + (wide(places.numbers.slice(KEY_BEGIN, 1).load(BY_ROW) + o_key) * wide(x.row))[:, None]
    p_rows += gl.arange(0, C.HEAD_DIM, gl.SliceLayout(0, ROWS))[None, :]
    return gl.load(p_rows, mask=(o_key < places.numbers.slice(SEEN, 1).load(BY_ROW))[:, None], other=0.0)


@gluon.jit
def store_keys(x, places, group: gl.constexpr, b_rows, C: gl.constexpr):
    """Write the group's gradients [64, D]; zeros for keys that nobody sees. Those of a row that lie before the first which is seen are
    counted after its last."""
    ROWS: gl.constexpr = row_layout(C.HEAD_DIM)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, ROWS)
    o_key = places.numbers.slice(FIRST, 1).load(BY_ROW) + places.columns.slice(group * 64, 64).load(BY_ROW)
    keys = places.numbers.slice(KEYS, 1).load(BY_ROW)
    o_row = places.numbers.slice(KEY_BEGIN, 1).load(BY_ROW) + o_key
    o_row = gl.where(o_row < keys, o_row, o_row - keys)
    p_rows = x.pointer + (wide(o_row) * wide(x.row))[:, None]
    p_rows += gl.arange(0, C.HEAD_DIM, gl.SliceLayout(0, ROWS))[None, :]
    b_rows = gl.where((o_key < places.numbers.slice(SEEN, 1).load(BY_ROW))[:, None], b_rows, 0.0)
    gl.store(p_rows, b_rows, mask=(o_key < keys)[:, None])


@gluon.jit
def tile_of_ring(tiles, place, C: gl.constexpr):
    """A tile [BM, D] of q or of the output's gradient."""
    return tiles.index(place).reshape([C.BLOCK_M, C.HEAD_DIM])


@gluon.jit
def weigh_again(b_scores, ring, place, tile, scaling, C: gl.constexpr):
    """-> the forward's weights [64, BM] times the gate, and what the products' difference is to be multiplied with."""
    BY_QUERY: gl.constexpr = gl.SliceLayout(0, product_layout(C.BLOCK_M))
    b_lse = ring.lse.index(place).load(BY_QUERY)[None, :]
    if C.CAPPED:
        factor = scaling.factor
        b_left = gl.full([64, C.BLOCK_M], 1.0, gl.float32, product_layout(C.BLOCK_M))
        if tile.crossing == 0:
            b_power = gl.exp2(gl.abs(b_scores) * scaling.slope)
            b_size = (1 - b_power) / (1 + b_power)
            b_scores = gl.where(b_scores < 0, -b_size, b_size)
            b_left = 1 - b_size * b_size
            factor = scaling.height
        b_weights = gl.exp2(b_scores * factor + b_lse)
    else:
        b_weights = gl.exp2(b_scores * scaling.factor + b_lse)
    if C.CROSS and C.GATE_PER_QUERY:
        b_weights *= ring.gates.index(place).load(BY_QUERY)[None, :]
    elif C.CROSS:
        b_weights *= ring.gates.index(place).slice(0, 1).load(BY_QUERY)[None, :]
    b_slope = b_weights
    if C.CAPPED:
        b_slope = b_weights * b_left
    return b_weights, b_slope


@gluon.jit
def gradients_of_keys(group: gl.constexpr, k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C: gl.constexpr):
    """One group of four warps: 64 keys."""
    SUMS: gl.constexpr = product_layout(C.HEAD_DIM)
    SCORES: gl.constexpr = product_layout(C.BLOCK_M)
    DTYPE: gl.constexpr = places.k.dtype
    ring = places.ring
    k = places.k.index(group)
    v = places.v.index(group)
    k.store(load_keys(k_rows, places, group, C))
    v.store(load_keys(v_rows, places, group, C))
    fence_async_shared()
    meet()  # once, or the compiler has the group meet before each tile's products
    b_grad_k = gl.full([64, C.HEAD_DIM], 0.0, gl.float32, SUMS)
    b_grad_v = gl.full([64, C.HEAD_DIM], 0.0, gl.float32, SUMS)
    number = tile.begin
    for turn in range(C.GROUP * (tile.end - tile.begin)):
        place, phase = place_and_phase(turn, C.STAGES)
        mbarrier.wait(ring.full.index(place), phase)
        q = tile_of_ring(ring.q, place, C)
        grad = tile_of_ring(ring.grad_out, place, C)
        b_zeros = gl.full([64, C.BLOCK_M], 0.0, gl.float32, SCORES)
        s_scores = warpgroup_mma(k, q.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
        s_products = warpgroup_mma(v, grad.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[s_scores])
        b_weights, b_slope = weigh_again(b_scores, ring, place, tile, scaling, C)
        if C.CAUSAL and C.SELF:
            ahead = tile.ahead + number * C.BLOCK_M
            if in_band(ahead, tile.window, C.CAUSAL, C.WINDOWED, C.BLOCK_M, C.BLOCK_N):
                # [64, BM]: by how much a query is ahead of a key
                b_ahead = places.columns.slice(0, C.BLOCK_M).load(gl.SliceLayout(0, SCORES))[None, :]
                b_ahead = (
                    b_ahead - (places.columns.slice(group * 64, 64).load(gl.SliceLayout(1, SCORES)) - ahead)[:, None]
                )
                m_seen = b_ahead >= 0
                if C.WINDOWED:
                    m_seen = m_seen & (b_ahead < tile.window)
                b_weights = gl.where(m_seen, b_weights, 0.0)
                b_slope = gl.where(m_seen, b_slope, 0.0)
        s_grad_v = warpgroup_mma(as_operand(b_weights, DTYPE, C), grad, b_grad_v, is_async=True)
        b_products = warpgroup_mma_wait(1, deps=[s_products])
        b_slope *= b_products + ring.sums.index(place).load(gl.SliceLayout(0, SCORES))[None, :]
        s_grad_k = warpgroup_mma(as_operand(b_slope, DTYPE, C), q, b_grad_k, is_async=True)
        b_grad_v, b_grad_k = warpgroup_mma_wait(0, deps=[s_grad_v, s_grad_k])
        release(ring, turn, C)
        number += 1
        if number == tile.end:
            number = tile.begin
    # The group's keys have been read: their places serve to write whole rows.
    v.store(b_grad_v.to(DTYPE))
    store_keys(grad_v, places, group, v.load(row_layout(C.HEAD_DIM)), C)
    k.store((b_grad_k * (scaling.factor * LN_2)).to(DTYPE))
    store_keys(grad_k, places, group, k.load(row_layout(C.HEAD_DIM)), C)


@gluon.jit
def first_keys(k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C: gl.constexpr):
    gradients_of_keys(0, k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C)


@gluon.jit
def second_keys(k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C: gl.constexpr):
    gradients_of_keys(1, k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C)


@gluon.jit(do_not_specialize=["queries", "keys", "cross_keys", "start", "window", "cross_tiles", "batches"])
def hopper_key_value_gradients_kernel(
    q,
    gate,
    grad_out,
    own,
    cross,
    scaling,
    queries,
    keys,
    cross_keys,
    start,
    window,
    cross_tiles,
    batches,
    C: gl.constexpr,
):
    """One tile of keys of one key head."""
    DTYPE: gl.constexpr = q.pointer.dtype.element_ty
    tile = key_tile(own, cross, queries, keys, cross_keys, start, window, cross_tiles, batches, C)
    k_rows = head_rows(cross.k, own.k, tile, C)
    v_rows = head_rows(cross.v, own.v, tile, C)
    grad_k = head_rows(cross.grad_k, own.grad_k, tile, C)
    grad_v = head_rows(cross.grad_v, own.grad_v, tile, C)
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, C.HEAD_DIM], DTYPE)
    k_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    v_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    columns = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    columns.store(gl.arange(0, 128, gl.BlockedLayout([1], [32], [WARPS], [0])))
    numbers = gl.allocate_shared_memory(gl.int32, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    o_number = gl.arange(0, 4, gl.BlockedLayout([1], [32], [WARPS], [0]))
    b_numbers = gl.where(o_number == FIRST, tile.first, gl.where(o_number == KEY_BEGIN, tile.key_begin, tile.seen))
    numbers.store(gl.where(o_number == KEYS, tile.keys, b_numbers))
    places = KeyPlaces(k_places, v_places, make_query_ring(DTYPE, C.STAGES, C), columns, numbers)
    fence_async_shared()
    gl.warp_specialize(
        [
            (first_keys, (k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C)),
            (second_keys, (k_rows, v_rows, grad_k, grad_v, tile, places, scaling, C)),
            (produce_queries, (q, gate, grad_out, tile, places.ring, queries, C)),
        ],
        [WARPS, 1],
        [SUMMING_REGISTERS, FEEDING_REGISTERS],
    )
