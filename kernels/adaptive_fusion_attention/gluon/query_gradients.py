"""Gradients of queries for Hopper by warp groups: as the forward, a producer warp reads keys and values, two groups of four warps hold
64 queries each.

A program works on 128 queries of one head, whose rows of q and of the output's gradient dO stay in shared memory, and goes through the
cross keys and then the row's own. One ring of K tiles and one of V tiles serve both. For the tile t of a program:

| producer                              | each group of 64 queries                                               |
|---------------------------------------|------------------------------------------------------------------------|
| wait for an empty place for V of t    | wait for K of t; start S = Q K^T                                       |
| start the copy of V of t              | when dQ of t - 1 is summed, K's place of t - 1 is empty                |
| wait for an empty place for K of t    | wait for V of t; start dP = dO V^T                                     |
| start the copy of K of t              | when S is done: P = exp2(S - lse), while dP runs                       |
|                                       | when dP is done, V's place is empty; dS = P (dP - sums); start dQ += dS K |

After the cross keys, dQ is multiplied with the gate. Every query's gradient is added by one group, in the order of keys.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import schedule
from .kernel import as_operand, product_layout
from .rings import describe, fill, filled, make_ring, release
from .work import (
    cross_term,
    load_gate,
    load_queries,
    meet,
    opaque,
    row_layout,
    self_term,
    store_queries,
    tile_of_program,
)

LN_2 = gl.constexpr(0.6931471805599453)
GROUPS = gl.constexpr(schedule.GROUPS)
WARPS = gl.constexpr(schedule.WARPS)
SUMMING_REGISTERS = gl.constexpr(schedule.SUMMING_REGISTERS)
FEEDING_REGISTERS = gl.constexpr(schedule.FEEDING_REGISTERS)


class QueryPlaces(NamedTuple):
    """Shared memory: rows of q and of the output's gradient [GROUPS, 64, D], rings of K and V, and the numbers 0 .. BN, as in `Places`."""

    queries: object
    grads: object
    k: object
    v: object
    columns: object


@gluon.jit
def fill_term(keys, weighted, term, k_ring, v_ring, C: gl.constexpr):
    """V of a term's tiles, each before K, whose place is empty later."""
    for tile_number in range(term.begin, term.end):
        number = term.before + tile_number - term.begin
        fill(v_ring, number, weighted, tile_number * C.BLOCK_N, C)
        fill(k_ring, number, keys, tile_number * C.BLOCK_N, C)


@gluon.jit
def produce_keys(inputs, tile, cross, own, k_ring, v_ring, C: gl.constexpr):
    """The producer warp. The row's own keys are described while cross keys are multiplied."""
    if C.CROSS:
        cross_keys = describe(inputs.cross_k, tile, cross, 1, C)
        cross_weighted = describe(inputs.cross_v, tile, cross, 1, C)
        fill_term(cross_keys, cross_weighted, cross, k_ring, v_ring, C)
    own_keys = describe(inputs.k, tile, own, 1, C)
    own_weighted = describe(inputs.v, tile, own, 1, C)
    fill_term(own_keys, own_weighted, own, k_ring, v_ring, C)


@gluon.jit
def load_numbers(p_lse, p_sums, tile, o_query):
    """-> log-sum-exps [64], +inf for a query that sees nothing, and row sums [64] of a term."""
    m_query = o_query < tile.last
    b_lse = gl.load(p_lse + tile.row + o_query, mask=m_query, other=float("inf"))
    b_sums = gl.load(p_sums + tile.row + o_query, mask=m_query, other=0.0)
    return gl.where(b_lse == -float("inf"), float("inf"), b_lse), b_sums


@gluon.jit
def hide(b_slope, term, ahead, window, first_key, rows, columns, C: gl.constexpr, CROSS: gl.constexpr):
    """Zeros for what a query does not see of a tile of keys. All is computed anew for each such tile: kept, it occupies registers
    through the loops.

    ahead: by how much the program's first query is ahead of the term's first key; rows: by how much the group's are ahead of that one.
    """
    o_key = columns.load(gl.SliceLayout(0, product_layout(C.BLOCK_N)))[None, :]
    if C.CAUSAL and not CROSS:
        limit = ahead + 1 + rows.load(gl.SliceLayout(1, product_layout(C.BLOCK_N)))
        m_seen = o_key < (gl.minimum(limit, term.keys) - first_key)[:, None]
        if C.WINDOWED:
            m_seen = m_seen & (o_key >= (limit - window - first_key)[:, None])
    else:
        m_seen = o_key < term.keys - first_key
    return gl.where(m_seen, b_slope, 0.0)


@gluon.jit
def slopes(b_scores, b_lse, scaling, C: gl.constexpr, CROSS: gl.constexpr):
    """The forward's weights [64, BN], times the slope of the soft cap."""
    if C.CAPPED and not CROSS:
        b_power = gl.exp2(gl.abs(b_scores) * scaling.slope)
        b_size = (1 - b_power) / (1 + b_power)
        b_capped = gl.where(b_scores < 0, -b_size, b_size)
        b_slope = gl.exp2(b_capped * scaling.height - b_lse[:, None]) * (1 - b_size * b_size)
    else:
        b_slope = gl.exp2(b_scores * scaling.factor - b_lse[:, None])
    return b_slope


@gluon.jit
def add_keys(
    group: gl.constexpr,
    b_grad_q,
    turn,
    term,
    ahead,
    window,
    b_lse,
    b_sums,
    places,
    scaling,
    C: gl.constexpr,
    CROSS: gl.constexpr,
):
    """Add what a term contributes to the gradients [64, D] of a group's queries, still to be multiplied by the scale.

    turn: of the term's first tile in the rings; ahead, window: see `hide`.
    """
    DTYPE: gl.constexpr = places.v.tiles.dtype
    q = places.queries.index(group)
    grad = places.grads.index(group)
    b_zeros = gl.full([64, C.BLOCK_N], 0.0, gl.float32, product_layout(C.BLOCK_N))
    for tile_number in range(term.begin, term.end):
        k = filled(places.k, turn, C)
        s_scores = warpgroup_mma(q, k.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
        v = filled(places.v, turn, C)
        s_products = warpgroup_mma(grad, v.permute((1, 0)), b_zeros, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[s_scores])
        b_slope = slopes(b_scores, b_lse, scaling, C, CROSS)
        if CROSS and C.EVEN_CROSS:
            # V is there: as in `advance`, a branch before which the assembler computes the weights, while the products run.
            filled(places.v, turn, C)
        else:
            partial = tile_number >= term.full_end
            if C.WINDOWED and not CROSS:
                partial = partial | (tile_number < term.full_begin)
            if partial:
                first_key = tile_number * C.BLOCK_N
                rows = places.columns.slice(group * 64, 64)
                b_slope = hide(b_slope, term, ahead, window, first_key, rows, places.columns, C, CROSS)
        b_products = warpgroup_mma_wait(0, deps=[s_products])
        release(places.v, turn, C)
        b_slope *= b_products - b_sums[:, None]
        s_grad_q = warpgroup_mma(as_operand(b_slope, DTYPE, C), k, b_grad_q, is_async=True)
        b_grad_q = warpgroup_mma_wait(0, deps=[s_grad_q])
        release(places.k, turn, C)
        turn += 1
    return b_grad_q, turn


@gluon.jit
def gradients_of_queries(
    group: gl.constexpr,
    inputs,
    saved,
    grad_q,
    tile,
    cross,
    own,
    places,
    queries,
    batches,
    window,
    scaling,
    C: gl.constexpr,
):
    """One group of four warps: 64 queries, both terms."""
    SUMS: gl.constexpr = product_layout(C.HEAD_DIM)
    DTYPE: gl.constexpr = places.v.tiles.dtype
    places.queries.index(group).store(load_queries(inputs.q, tile, group, C))
    places.grads.index(group).store(load_queries(saved.grad_out, tile, group, C))
    fence_async_shared()
    meet()  # once, or the compiler has the group meet before each tile's products
    numbers = places.columns.slice(group * 64, 64)
    o_query = tile.first + numbers.load(gl.SliceLayout(1, product_layout(C.BLOCK_N)))
    b_lse, b_sums = load_numbers(saved.self_lse, saved.self_sums, tile, o_query)
    b_grad_q = gl.full([64, C.HEAD_DIM], 0.0, gl.float32, SUMS)
    turn = 0
    if C.CROSS:
        b_cross_lse, b_cross_sums = load_numbers(saved.cross_lse, saved.cross_sums, tile, o_query)
        b_gate = load_gate(inputs.gate, tile, tile.first + numbers.load(gl.SliceLayout(1, SUMS)), C)
        b_grad_q, turn = add_keys(
            group, b_grad_q, turn, cross, 0, 0, b_cross_lse, b_cross_sums, places, scaling, C, True
        )
        b_grad_q = b_grad_q * b_gate
    ahead = own.start + tile.first
    b_grad_q, _ = add_keys(group, b_grad_q, turn, own, ahead, window, b_lse, b_sums, places, scaling, C, False)
    # The queries have been read: their place serves to write whole rows.
    q = places.queries.index(group)
    q.store((b_grad_q * (scaling.factor * LN_2)).to(DTYPE))
    tile = tile_of_program(
        opaque(gl.program_id(0)), queries, batches, C
    )  # kept, it occupies registers through the loops
    store_queries(grad_q, tile, group, q.load(row_layout(C.HEAD_DIM)), C)


@gluon.jit
def first_queries(inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C: gl.constexpr):
    gradients_of_queries(0, inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C)


@gluon.jit
def second_queries(inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C: gl.constexpr):
    gradients_of_queries(1, inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C)


@gluon.jit(do_not_specialize=["queries", "keys", "cross_keys", "start", "window", "batches"])
def hopper_query_gradients_kernel(
    inputs, saved, grad_q, spans, scaling, queries, keys, cross_keys, start, window, batches, C: gl.constexpr
):
    """One tile of queries of one head. saved: as in the other backward; batches: rows of them all."""
    DTYPE: gl.constexpr = inputs.q.pointer.dtype.element_ty
    tile = tile_of_program(gl.program_id(0), queries, batches, C)
    if C.CROSS:
        cross = cross_term(spans.cross_keys, tile, cross_keys, 1, C)
        own = self_term(spans.keys, tile, queries, keys, start, window, cross.end - cross.begin, C)
    else:
        own = self_term(spans.keys, tile, queries, keys, start, window, 0, C)
        cross = own
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, C.HEAD_DIM], DTYPE)
    query_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    grad_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    columns = gl.allocate_shared_memory(gl.int32, [C.BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    columns.store(gl.arange(0, C.BLOCK_N, gl.BlockedLayout([1], [32], [WARPS], [0])))
    places = QueryPlaces(
        query_places, grad_places, make_ring(DTYPE, C.STAGES, C), make_ring(DTYPE, C.STAGES, C), columns
    )
    fence_async_shared()
    gl.warp_specialize(
        [
            (first_queries, (inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C)),
            (second_queries, (inputs, saved, grad_q, tile, cross, own, places, queries, batches, window, scaling, C)),
            (produce_keys, (inputs, tile, cross, own, places.k, places.v, C)),
        ],
        [WARPS, 1],
        [SUMMING_REGISTERS, FEEDING_REGISTERS],
    )
