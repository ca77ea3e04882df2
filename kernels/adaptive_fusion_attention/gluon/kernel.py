"""The fused forward for Hopper by warp groups: a producer warp reads keys and values, two groups of four warps attend to them.

One ring of K tiles and one of V tiles serve the cross keys first and then the self keys, without a stop between them. A place in a
ring has a barrier `full`, which the copy completes, and one `empty`, at which each group arrives. For the tile t of a program:

| producer                              | each group of 64 queries                                               |
|---------------------------------------|------------------------------------------------------------------------|
| wait for an empty place for K of t    | wait for K of t; start S_t = Q K_t^T                                   |
| start the copy of K of t              | wait for V of t - 1; start O += P_(t-1) V_(t-1)                        |
| wait for an empty place for V of t-1  | when S_t is done, K's place is empty; P_t = softmax while O is summed  |
| start the copy of V of t - 1          | when O is done, V's place is empty; rescale O                          |

When t is the first self tile, O is the cross term: while S_t is computed it is parked in shared memory, in the dtype of the output, and
O starts anew. Tensors are read by descriptors that the producer makes of a row's seen keys, so that what lies past them, NaN included,
is read as zeros. Each group reads its own queries and writes its own results; all warps meet at the start and at the end only.

tests/kernels/gluon_on_cpu.py runs the functions of this folder on CPUs and searches all interleavings of their agents.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from . import schedule
from .rings import filled, make_ring, produce, release
from .work import again, cross_term, load_gate, load_queries, row_layout, self_term, store_queries, tile_of_program

# Below every score: a maximum that is finite makes exp2(-inf - maximum) 0 where a query sees nothing, without a second test.
LOWEST = gl.constexpr(-3.0e38)
GROUPS = gl.constexpr(schedule.GROUPS)
WARPS = gl.constexpr(schedule.WARPS)
CONSUMER_REGISTERS = gl.constexpr(schedule.CONSUMER_REGISTERS)
PRODUCER_REGISTERS = gl.constexpr(schedule.PRODUCER_REGISTERS)


class Scaling(NamedTuple):
    """factor: of scores of the dot product, to base 2. With a soft cap c, scores s of the self term become height tanh(s) of
    2^(slope |s|): slope = -2 factor / c, height = c log2(e). Computed by the host: a number computed here occupies a register."""

    factor: float
    slope: float
    height: float


class Places(NamedTuple):
    """Shared memory: queries and parked cross terms [GROUPS, 64, D], rings of K and V, and the numbers 0 .. BN.

    Columns are numbered by loads: made of thread numbers, 32 registers hold them through all loops, and spill."""

    queries: object
    cross: object
    k: object
    v: object
    columns: object


class Seen(NamedTuple):
    """Of the keys of a term, counted from its key_begin, each query sees those from floor to limit: [64], or a number for all."""

    floor: object
    limit: object


@gluon.constexpr_function
def product_layout(columns):
    """Of a wgmma result [64, columns] in the registers of a group."""
    return gl.NVMMADistributedLayout([3, 0], [schedule.WARPS, 1], [16, columns, 16])


@gluon.jit
def start_scores(q, ring, number, C: gl.constexpr):
    """Start S [64, BN] of a tile, once its K is there."""
    b_zeros = gl.full([64, C.BLOCK_N], 0.0, gl.float32, product_layout(C.BLOCK_N))
    return warpgroup_mma(q, filled(ring, number, C).permute((1, 0)), b_zeros, use_acc=False, is_async=True)


@gluon.jit
def as_operand(b_weights, DTYPE: gl.constexpr, C: gl.constexpr):
    """Weights [64, BN] as the left operand of the product with V, in its dtype."""
    return gl.convert_layout(b_weights.to(DTYPE), gl.DotOperandLayout(0, product_layout(C.HEAD_DIM), 2))


@gluon.jit
def by_row(b_row, C: gl.constexpr):
    """Numbers of queries [64] to be multiplied with [64, D]."""
    return gl.convert_layout(b_row, gl.SliceLayout(1, product_layout(C.HEAD_DIM)))[:, None]


@gluon.jit
def weigh(
    b_scores,
    b_top,
    b_total,
    seen,
    first_key,
    columns,
    scaling,
    C: gl.constexpr,
    CROSS: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Online softmax of one more tile [64, BN], whose keys are counted from first_key like those of `seen`.

    -> weights, what the sums so far are to be multiplied with, largest score, total [64]
    """
    factor = scaling.factor
    if C.CAPPED and not CROSS:
        b_power = gl.exp2(gl.abs(b_scores) * scaling.slope)  # tanh by exp2, to about 1e-7
        b_size = (1 - b_power) / (1 + b_power)
        b_scores = gl.where(b_scores < 0, -b_size, b_size)
        factor = scaling.height
    if MASKED:
        o_key = columns.load(gl.SliceLayout(0, product_layout(C.BLOCK_N)))[None, :]
        if C.CAUSAL and not CROSS:
            b_scores = gl.where(o_key < (seen.limit - first_key)[:, None], b_scores, -float("inf"))
            if C.WINDOWED:
                b_scores = gl.where(o_key >= (seen.floor - first_key)[:, None], b_scores, -float("inf"))
        else:
            b_scores = gl.where(o_key < seen.limit - first_key, b_scores, -float("inf"))
    b_new_top = gl.maximum(b_top, gl.max(b_scores, 1) * factor)
    b_weights = gl.exp2(b_scores * factor - b_new_top[:, None])
    b_decay = gl.exp2(b_top - b_new_top)
    return b_weights, b_decay, b_new_top, b_total * b_decay + gl.sum(b_weights, 1)


@gluon.jit
def weigh_first(b_scores, term, seen, places, scaling, C: gl.constexpr, CROSS: gl.constexpr, MASKED: gl.constexpr):
    """The state, as of `advance`, after the first tile of a term."""
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(C.BLOCK_N))
    b_top = gl.full([64], LOWEST, gl.float32, ROW)
    b_total = gl.full([64], 0.0, gl.float32, ROW)
    b_sum = gl.full([64, C.HEAD_DIM], 0.0, gl.float32, product_layout(C.HEAD_DIM))
    first_key = term.begin * C.BLOCK_N
    b_weights, _, b_top, b_total = weigh(
        b_scores, b_top, b_total, seen, first_key, places.columns, scaling, C, CROSS, MASKED
    )
    return as_operand(b_weights, places.v.tiles.dtype, C), b_sum, b_top, b_total


@gluon.jit
def advance(
    state, q, term, first, last, seen, places, scaling, C: gl.constexpr, CROSS: gl.constexpr, MASKED: gl.constexpr
):
    """The tiles first .. last of a term -> the state after them: weights of the last tile, which are not in the sum yet, the sum
    [64, D] without them, largest score and total [64]."""
    b_weights, b_sum, b_top, b_total = state
    for tile_number in range(first, last):
        number = term.before + tile_number - term.begin
        s_scores = start_scores(q, places.k, number, C)
        s_sum = warpgroup_mma(b_weights, filled(places.v, number - 1, C), b_sum, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[s_scores])
        release(places.k, number, C)
        first_key = tile_number * C.BLOCK_N
        b_new, b_decay, b_top, b_total = weigh(
            b_scores, b_top, b_total, seen, first_key, places.columns, scaling, C, CROSS, MASKED
        )
        # V is there, and this wait ends at once: but across its branch the assembler moves nothing. Without it 62 of a tile's 66
        # exponentials come after the next line, when the tensor cores have nothing to do (both Tritons, D = 128).
        filled(places.v, number - 1, C)
        b_sum = warpgroup_mma_wait(0, deps=[s_sum])
        release(places.v, number - 1, C)
        b_sum = b_sum * by_row(b_decay, C)
        b_weights = as_operand(b_new, places.v.tiles.dtype, C)
    return b_weights, b_sum, b_top, b_total


@gluon.jit
def finish_sum(state, places, number, C: gl.constexpr):
    """Add the last tile's weights, the number-th's, to the sum -> the sum [64, D]."""
    b_weights, b_sum, _, _ = state
    b_sum = warpgroup_mma_wait(0, deps=[warpgroup_mma(b_weights, filled(places.v, number, C), b_sum, is_async=True)])
    release(places.v, number, C)
    return b_sum


@gluon.jit
def settle(state, b_sum, p_lse, tile, o_query, C: gl.constexpr):
    """Write the log-sum-exps in base 2 where they are kept, -inf for a query that saw nothing -> the weighted values [64, D], of
    such a one 0."""
    _, _, b_top, b_total = state
    if p_lse is not None:
        gl.store(p_lse + tile.row + o_query, b_top + gl.log2(b_total), mask=o_query < tile.last)
    return b_sum * by_row(1.0 / gl.where(b_total == 0, 1.0, b_total), C)


@gluon.jit
def attend(group: gl.constexpr, inputs, outputs, tile, cross, own, places, window, scaling, C: gl.constexpr):
    """One group of four warps: 64 queries, both terms."""
    SUMS: gl.constexpr = product_layout(C.HEAD_DIM)
    DTYPE: gl.constexpr = places.v.tiles.dtype
    q = places.queries.index(group)
    q.store(load_queries(inputs.q, tile, group, C))
    fence_async_shared()
    numbers = places.columns.slice(group * 64, 64)
    o_query = tile.first + numbers.load(gl.SliceLayout(1, product_layout(C.BLOCK_N)))

    if C.CROSS:
        b_gate = load_gate(inputs.gate, tile, tile.first + numbers.load(gl.SliceLayout(1, SUMS)), C)
        MASKED: gl.constexpr = not C.EVEN_CROSS
        seen = Seen(0, cross.keys)
        b_scores = warpgroup_mma_wait(0, deps=[start_scores(q, places.k, 0, C)])
        release(places.k, 0, C)
        state = weigh_first(b_scores, cross, seen, places, scaling, C, True, MASKED)
        after = cross.begin + 1
        state = advance(state, q, cross, after, cross.full_end, seen, places, scaling, C, True, False)
        if MASKED:
            after = max(after, cross.full_end)
            state = advance(state, q, cross, after, cross.end, seen, places, scaling, C, True, True)
        b_sum = finish_sum(state, places, own.before - 1, C)
        s_scores = start_scores(q, places.k, own.before, C)
        b_cross = settle(state, b_sum, outputs.cross_lse, tile, o_query, C)
        places.cross.index(group).store(b_cross.to(DTYPE))
    else:
        s_scores = start_scores(q, places.k, 0, C)

    seen = Seen(0, own.keys)
    if C.CAUSAL:
        o_key = own.start + o_query + 1
        seen = Seen(o_key - window, gl.minimum(o_key, own.keys))
    b_scores = warpgroup_mma_wait(0, deps=[s_scores])
    release(places.k, own.before, C)
    state = weigh_first(b_scores, own, seen, places, scaling, C, False, True)
    after = own.begin + 1
    if C.WINDOWED:
        state = advance(state, q, own, after, own.full_begin, seen, places, scaling, C, False, True)
        after = max(after, own.full_begin)
    state = advance(state, q, own, after, own.full_end, seen, places, scaling, C, False, False)
    after = max(after, own.full_end)
    state = advance(state, q, own, after, own.end, seen, places, scaling, C, False, True)
    b_sum = finish_sum(state, places, own.before + own.end - own.begin - 1, C)

    tile = again(tile)
    b_out = settle(state, b_sum, outputs.self_lse, tile, o_query, C)
    # The queries have been read: their place serves to write whole rows.
    if outputs.self_out is not None:
        q.store(b_out.to(DTYPE))
        store_queries(outputs.self_out, tile, group, q.load(row_layout(C.HEAD_DIM)), C)
    if C.CROSS:
        parked = places.cross.index(group)
        if outputs.cross_out is not None:
            store_queries(outputs.cross_out, tile, group, parked.load(row_layout(C.HEAD_DIM)), C)
        b_out += b_gate * parked.load(SUMS).to(gl.float32)
    q.store(b_out.to(DTYPE))
    store_queries(outputs.out, tile, group, q.load(row_layout(C.HEAD_DIM)), C)


@gluon.jit
def first_group(inputs, outputs, tile, cross, own, places, window, scaling, C: gl.constexpr):
    attend(0, inputs, outputs, tile, cross, own, places, window, scaling, C)


@gluon.jit
def second_group(inputs, outputs, tile, cross, own, places, window, scaling, C: gl.constexpr):
    attend(1, inputs, outputs, tile, cross, own, places, window, scaling, C)


@gluon.jit(do_not_specialize=["queries", "keys", "cross_keys", "start", "window", "shares", "batches"])
def hopper_forward_kernel(
    inputs, outputs, spans, scaling, queries, keys, cross_keys, start, window, shares, batches, C: gl.constexpr
):
    """One tile of queries of one head: shapes as in `adaptive_fusion_attention`, the log-sum-exps in base 2.

    shares: batch rows that read one row of cross keys; batches: of them all.
    """
    DTYPE: gl.constexpr = inputs.q.pointer.dtype.element_ty
    tile = tile_of_program(gl.program_id(0), queries, batches, C)
    if C.CROSS:
        cross = cross_term(spans.cross_keys, tile, cross_keys, shares, C)
        own = self_term(spans.keys, tile, queries, keys, start, window, cross.end - cross.begin, C)
    else:
        own = self_term(spans.keys, tile, queries, keys, start, window, 0, C)
        cross = own
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, C.HEAD_DIM], DTYPE)
    query_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    cross_places = query_places
    if C.CROSS:
        cross_places = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, C.HEAD_DIM], LAYOUT)
    columns = gl.allocate_shared_memory(gl.int32, [C.BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    columns.store(gl.arange(0, C.BLOCK_N, gl.BlockedLayout([1], [32], [WARPS], [0])))
    places = Places(query_places, cross_places, make_ring(DTYPE, C.STAGES, C), make_ring(DTYPE, C.STAGES, C), columns)
    fence_async_shared()
    gl.warp_specialize(
        [
            (first_group, (inputs, outputs, tile, cross, own, places, window, scaling, C)),
            (second_group, (inputs, outputs, tile, cross, own, places, window, scaling, C)),
            (produce, (inputs, tile, cross, own, places.k, places.v, shares, C)),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
