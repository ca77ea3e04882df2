"""The fused forward for Hopper by warp groups: a producer warp reads keys and values, two groups of four warps attend to them.

One ring of K tiles and one of V tiles serve the cross keys first and then the self keys, without a stop between them. A place in a
ring has a barrier `full`, which the copy completes, and one `empty`, at which each group arrives. For the tile t of a program:

| producer                         | each group of 64 queries                                             |
|----------------------------------|----------------------------------------------------------------------|
| wait for K's place to be empty   | wait for K of t; start S_t = Q K_t^T                                  |
| start the copy of K of t         | wait for V of t - 1; start O += P_(t-1) V_(t-1)                       |
| wait for V's place to be empty   | when S_t is done, K's place is empty; P_t = softmax while O is summed |
| start the copy of V of t         | when O is done, V's place is empty; rescale O                         |

When t is the first self tile, O is the cross term: it is parked in shared memory, in the dtype of the output, and O starts anew. Tensors
are read by descriptors that the producer makes of a row's seen keys, so that what lies past them, NaN included, is read as zeros.
Each group reads its own queries and writes its own results; the only meeting of all warps is the start.

tests/kernels/gluon_on_cpu.py runs this file's functions on CPUs and searches all interleavings of their agents.
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import schedule

# Triton 3.7 renamed it.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

place_and_phase = gluon.jit(schedule.place_and_phase)
query_tile_of = gluon.jit(schedule.query_tile_of)
keys_of_row = gluon.jit(schedule.keys_of_row)
tiles_of_queries = gluon.jit(schedule.tiles_of_queries)

# Below every score: a maximum that is finite makes exp2(-inf - maximum) 0 where a query sees nothing, without a second test.
LOWEST = gl.constexpr(-3.0e38)
GROUPS = gl.constexpr(schedule.GROUPS)
WARPS = gl.constexpr(schedule.WARPS)
CONSUMER_REGISTERS = gl.constexpr(schedule.CONSUMER_REGISTERS)
PRODUCER_REGISTERS = gl.constexpr(schedule.PRODUCER_REGISTERS)


@gluon.constexpr_function
def product_layout(columns):
    """Of a wgmma result [64, columns] in the registers of a group."""
    return gl.NVMMADistributedLayout([3, 0], [schedule.WARPS, 1], [16, columns, 16])


@gluon.constexpr_function
def row_layout(width):
    """Of rows [64, width] as memory takes them: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [schedule.WARPS, 1], [1, 0])


class Spans(NamedTuple):
    """(B, 2) and (B / shares, 2) int32, contiguous: the keys and cross keys that each row may see; None for all."""

    keys: Tensor | None
    cross_keys: Tensor | None


class Cap(NamedTuple):
    """The soft cap c of scores s as 2^slope|s| and height tanh: of scores times `scale` in base 2, slope = -2 scale / c, height
    = c log2(e)."""

    slope: object
    height: object


class Ring(NamedTuple):
    """Places for tiles of K or V [STAGES, BN, D] in shared memory, with their barriers [STAGES, 1]."""

    tiles: object
    full: object
    empty: object


class Tile(NamedTuple):
    """What a program works on: queries first .. last of one head; `row` is where the head starts in (B, Hq, S)."""

    batch: object
    head: object
    row: object
    first: object
    last: object


class Term(NamedTuple):
    """The keys of one softmax: `count` from key_begin on, of which the program's queries see the tiles begin .. end, all of them all
    keys of full_begin .. full_end. start: key, counted from key_begin, of the row's first query. before: tiles in the ring before."""

    key_begin: object
    count: object
    start: object
    begin: object
    full_begin: object
    full_end: object
    end: object
    before: object


@gluon.jit
def wide(x):
    """A number from 0 up in 64 bits. Unsigned: the upper half of a signed stride is computed once, and then occupies a register
    that all warps share, down to the 24 that idle ones have."""
    x = gl.to_tensor(x)
    if x.dtype == gl.int32:
        x = x.to(gl.uint32)
    return x.to(gl.uint64)


@gluon.jit
def head_pointer(x, batch, head, row):
    """Pointer to a row of one head of a (pointer, batch, head, row) tuple, by 64 bits."""
    return x.pointer + (wide(batch) * wide(x.batch) + wide(head) * wide(x.head) + wide(row) * wide(x.row)).to(gl.int64)


@gluon.jit
def span_of(p_span, row, length):
    """-> begin and end of a row's span, which may be wider than 0 .. length."""
    begin = 0
    end = length
    if p_span is not None:
        begin = gl.load(p_span + row * 2)
        end = gl.load(p_span + row * 2 + 1)
    return begin, end


@gluon.jit
def tile_of_program(queries, batches, C: gl.constexpr):
    """The Tile of this program."""
    first, row = query_tile_of(gl.program_id(0), queries, batches * C.HEADS, C.BLOCK_M)
    offset = (wide(row) * wide(queries)).to(gl.int64)
    return Tile(row // C.HEADS, row % C.HEADS, offset, first, min(first + C.BLOCK_M, queries))


@gluon.jit
def cross_term(p_span, tile, cross_keys, shares, C: gl.constexpr):
    """The Term of the cross keys, which every query sees."""
    span_begin, span_end = span_of(p_span, tile.batch // shares, cross_keys)
    key_begin, count = keys_of_row(span_begin, span_end, 0, 0, cross_keys, 0, False, False)
    begin, full_begin, full_end, end = tiles_of_queries(0, 0, 0, count, 0, False, False, C.BLOCK_N)
    return Term(key_begin, count, 0, begin, full_begin, full_end, end, 0)


@gluon.jit
def self_term(p_span, tile, queries, keys, start, window, before, C: gl.constexpr):
    """The Term of the row's own keys. start: key index of the first query, or pointer to one of each batch row."""
    if C.START_PER_ROW:
        start = gl.cast(min(max(gl.load(start + tile.batch), -queries), keys + window), gl.int32)
    span_begin, span_end = span_of(p_span, tile.batch, keys)
    key_begin, count = keys_of_row(span_begin, span_end, start, queries, keys, window, C.CAUSAL, C.WINDOWED)
    start = start - key_begin
    begin, full_begin, full_end, end = tiles_of_queries(
        tile.first, tile.last, start, count, window, C.CAUSAL, C.WINDOWED, C.BLOCK_N
    )
    return Term(key_begin, count, start, begin, full_begin, full_end, end, before)


@gluon.jit
def describe(x, tile, term, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr, SHARES):
    """A descriptor of the term's rows of one head: past them it reads zeros."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], x.pointer.dtype.element_ty)
    return tma.make_tensor_descriptor(
        head_pointer(x, tile.batch // SHARES, tile.head // GROUP, term.key_begin),
        shape=[max(term.count, 1), WIDTH],
        strides=[x.row, 1],
        block_shape=[BLOCK_N, WIDTH],
        layout=LAYOUT,
    )


@gluon.jit
def fill(ring, number, source, row, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """Start the copy of a tile, the number-th of the program, into the ring."""
    place, phase = place_and_phase(number, STAGES)
    mbarrier.wait(ring.empty.index(place), phase ^ 1)
    mbarrier.expect(ring.full.index(place), BYTES)
    copy_tile(source, [row, 0], ring.full.index(place), ring.tiles.index(place))


@gluon.jit
def read_term(k, v, tile, term, k_ring, v_ring, shares, C: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """All tiles of a term, in order. A descriptor costs about a microsecond: the first K is on its way before V's is made."""
    BYTES: gl.constexpr = BLOCK_N * WIDTH * 2
    keys = describe(k, tile, term, BLOCK_N, WIDTH, C.GROUP, shares)
    fill(k_ring, term.before, keys, term.begin * BLOCK_N, C.STAGES, BYTES)
    value_rows = describe(v, tile, term, BLOCK_N, WIDTH, C.GROUP, shares)
    fill(v_ring, term.before, value_rows, term.begin * BLOCK_N, C.STAGES, BYTES)
    for number in range(term.begin + 1, term.end):
        place = term.before + number - term.begin
        fill(k_ring, place, keys, number * BLOCK_N, C.STAGES, BYTES)
        fill(v_ring, place, value_rows, number * BLOCK_N, C.STAGES, BYTES)


@gluon.jit
def produce(inputs, tile, cross, own, k_ring, v_ring, shares, C: gl.constexpr):
    """The producer warp."""
    if C.CROSS:
        read_term(inputs.cross_k, inputs.cross_v, tile, cross, k_ring, v_ring, shares, C, C.BLOCK_N, C.HEAD_DIM)
    read_term(inputs.k, inputs.v, tile, own, k_ring, v_ring, 1, C, C.BLOCK_N, C.HEAD_DIM)


@gluon.jit
def start_scores(q, k_ring, number, C: gl.constexpr, BLOCK_N: gl.constexpr):
    """Start S [64, BN] of a tile, once its K is there."""
    S: gl.constexpr = product_layout(BLOCK_N)
    place, phase = place_and_phase(number, C.STAGES)
    mbarrier.wait(k_ring.full.index(place), phase)
    b_zeros = gl.zeros([64, BLOCK_N], gl.float32, S)
    return warpgroup_mma(q, k_ring.tiles.index(place).permute((1, 0)), b_zeros, use_acc=False, is_async=True)


@gluon.jit
def start_sum(b_weights, v_ring, number, b_sum, C: gl.constexpr):
    """Start O += P V of a tile, once its V is there."""
    place, phase = place_and_phase(number, C.STAGES)
    mbarrier.wait(v_ring.full.index(place), phase)
    return warpgroup_mma(b_weights, v_ring.tiles.index(place), b_sum, is_async=True)


@gluon.jit
def release(ring, number, C: gl.constexpr):
    """This group has read a tile."""
    place, _ = place_and_phase(number, C.STAGES)
    mbarrier.arrive(ring.empty.index(place), count=1)


@gluon.jit
def weigh(
    b_scores,
    b_top,
    b_total,
    columns,
    b_floor,
    b_limit,
    first_key,
    scale,
    cap,
    C: gl.constexpr,
    MASKED: gl.constexpr,
    CROSS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Online softmax of one more tile [64, BN] -> weights, what the sums so far are to be multiplied with, largest score, total [64].

    b_floor .. b_limit: of the keys that a query sees, counted like first_key.
    """
    if C.CAPPED and not CROSS:
        b_power = gl.exp2(gl.abs(b_scores) * cap.slope)  # tanh by exp2, to about 1e-7
        b_size = (1 - b_power) / (1 + b_power)
        b_scores = gl.where(b_scores < 0, -b_size, b_size)
        scale = cap.height
    if MASKED:
        o_key = columns.load(gl.SliceLayout(0, b_scores.type.layout))[None, :]
        if C.CAUSAL and not CROSS:
            b_scores = gl.where(o_key < (b_limit - first_key)[:, None], b_scores, -float("inf"))
            if C.WINDOWED:
                b_scores = gl.where(o_key >= (b_floor - first_key)[:, None], b_scores, -float("inf"))
        else:
            b_scores = gl.where(o_key < b_limit - first_key, b_scores, -float("inf"))
    b_new_top = gl.maximum(b_top, gl.max(b_scores, 1) * scale)
    b_weights = gl.exp2(b_scores * scale - b_new_top[:, None])
    b_decay = gl.exp2(b_top - b_new_top)
    return b_weights, b_decay, b_new_top, b_total * b_decay + gl.sum(b_weights, 1)


@gluon.jit
def advance(
    q,
    k_ring,
    v_ring,
    term,
    first,
    last,
    state,
    columns,
    b_floor,
    b_limit,
    scale,
    cap,
    C: gl.constexpr,
    O: gl.constexpr,
    MASKED: gl.constexpr,
    CROSS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The tiles first .. last of a term -> the state after them: weights of the last tile, which are not in the sum yet, the sum
    [64, D] without them, largest score and total [64]."""
    b_weights, b_sum, b_top, b_total = state
    for number in range(first, last):
        place = term.before + number - term.begin
        s_scores = start_scores(q, k_ring, place, C, BLOCK_N)
        s_sum = start_sum(b_weights, v_ring, place - 1, b_sum, C)
        b_scores = warpgroup_mma_wait(1, deps=[s_scores])
        release(k_ring, place, C)
        b_new, b_decay, b_top, b_total = weigh(
            b_scores, b_top, b_total, columns, b_floor, b_limit, number * BLOCK_N, scale, cap, C, MASKED, CROSS, BLOCK_N
        )
        b_sum = warpgroup_mma_wait(0, deps=[s_sum])
        release(v_ring, place - 1, C)
        b_sum = b_sum * gl.convert_layout(b_decay, gl.SliceLayout(1, O))[:, None]
        b_weights = as_operand(b_new, v_ring.tiles.dtype, O)
    return b_weights, b_sum, b_top, b_total


@gluon.jit
def as_operand(b_weights, DTYPE: gl.constexpr, O: gl.constexpr):
    """Weights [64, BN] as the left operand of the product with V, in its dtype."""
    return gl.convert_layout(b_weights.to(DTYPE), gl.DotOperandLayout(0, O, 2))


@gluon.jit
def share(b_sum, b_top, b_total, O: gl.constexpr):
    """-> the weighted values [64, D], 0 for a query that saw nothing, and log-sum-exps [64] in base 2."""
    b_portion = gl.convert_layout(1.0 / gl.where(b_total == 0, 1.0, b_total), gl.SliceLayout(1, O))
    return b_sum * b_portion[:, None], b_top + gl.log2(b_total)


@gluon.jit
def load_queries(x, tile, group: gl.constexpr, B: gl.constexpr, WIDTH: gl.constexpr):
    """The group's queries [64, D], zeros past the last."""
    o_query = tile.first + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, B))
    p_rows = head_pointer(x, tile.batch, tile.head, 0) + wide(o_query)[:, None] * wide(x.row)
    p_rows = p_rows + gl.arange(0, WIDTH, gl.SliceLayout(0, B))[None, :]
    return gl.load(p_rows, mask=(o_query < tile.last)[:, None], other=0.0)


@gluon.jit
def again(tile):
    """The tile as a value of its own: what is computed from it anew does not occupy registers through the loops."""
    first = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile.first], dtype=gl.int32, is_pure=False, pack=1)
    return Tile(tile.batch, tile.head, tile.row, first, tile.last)


@gluon.jit
def store_queries(x, tile, group: gl.constexpr, b_rows, B: gl.constexpr, WIDTH: gl.constexpr):
    """Write the group's rows [64, D]."""
    o_query = tile.first + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, B))
    p_rows = head_pointer(x, tile.batch, tile.head, 0) + wide(o_query)[:, None] * wide(x.row)
    p_rows = p_rows + gl.arange(0, WIDTH, gl.SliceLayout(0, B))[None, :]
    gl.store(p_rows, b_rows, mask=(o_query < tile.last)[:, None])


@gluon.jit
def store_lse(p_lse, tile, o_query, b_lse):
    gl.store(p_lse + tile.row + o_query, b_lse, mask=o_query < tile.last)


@gluon.jit
def load_gate(gate, tile, group: gl.constexpr, C: gl.constexpr, O: gl.constexpr):
    """The gate of the group's queries in fp32: [64, 1], or a scalar where they share it."""
    p_gate = head_pointer(gate, tile.batch, tile.head, 0)
    if C.GATE_PER_QUERY:
        o_query = tile.first + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, O))
        b_gate = gl.load(p_gate + wide(o_query) * wide(gate.row), mask=o_query < tile.last, other=0.0)[:, None]
    else:
        b_gate = gl.load(p_gate)
    return b_gate.to(gl.float32)


@gluon.jit
def attend(
    group: gl.constexpr,
    inputs,
    outputs,
    tile,
    cross,
    own,
    q_place,
    cross_place,
    k_ring,
    v_ring,
    columns,
    window,
    scale,
    cap,
    C: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """One group of four warps: 64 queries, both terms."""
    S: gl.constexpr = product_layout(BLOCK_N)
    O: gl.constexpr = product_layout(WIDTH)
    B: gl.constexpr = row_layout(WIDTH)
    DTYPE: gl.constexpr = k_ring.tiles.dtype
    q = q_place.index(group)
    q.store(load_queries(inputs.q, tile, group, B, WIDTH))
    fence_async_shared()

    o_query = tile.first + columns.slice(group * 64, 64).load(gl.SliceLayout(1, S))
    b_limit = own.count
    b_floor = o_query
    if C.CAUSAL:
        b_limit = gl.minimum(own.start + o_query + 1, own.count)
    if C.WINDOWED:
        b_floor = own.start + o_query + 1 - window
    b_lowest = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, S))
    b_none = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
    b_sum = gl.zeros([64, WIDTH], gl.float32, O)

    if C.CROSS:
        b_gate = load_gate(inputs.gate, tile, group, C, O)
        b_scores = warpgroup_mma_wait(0, deps=[start_scores(q, k_ring, 0, C, BLOCK_N)])
        release(k_ring, 0, C)
        MASKED: gl.constexpr = not C.EVEN_CROSS
        b_new, _, b_top, b_total = weigh(
            b_scores,
            b_lowest,
            b_none,
            columns,
            b_floor,
            cross.count,
            cross.begin * BLOCK_N,
            scale,
            cap,
            C,
            MASKED,
            True,
            BLOCK_N,
        )
        state = (as_operand(b_new, DTYPE, O), b_sum, b_top, b_total)
        state = advance(
            q,
            k_ring,
            v_ring,
            cross,
            cross.begin + 1,
            cross.full_end,
            state,
            columns,
            b_floor,
            cross.count,
            scale,
            cap,
            C,
            O,
            False,
            True,
            BLOCK_N,
        )
        if MASKED:
            state = advance(
                q,
                k_ring,
                v_ring,
                cross,
                max(cross.begin + 1, cross.full_end),
                cross.end,
                state,
                columns,
                b_floor,
                cross.count,
                scale,
                cap,
                C,
                O,
                True,
                True,
                BLOCK_N,
            )
        b_weights, b_sum, b_top, b_total = state
        b_sum = warpgroup_mma_wait(0, deps=[start_sum(b_weights, v_ring, own.before - 1, b_sum, C)])
        release(v_ring, own.before - 1, C)
        s_scores = start_scores(q, k_ring, own.before, C, BLOCK_N)
        b_cross, b_lse = share(b_sum, b_top, b_total, O)
        cross_place.index(group).store(b_cross.to(DTYPE))
        store_lse(outputs.cross_lse, tile, o_query, b_lse)
        b_sum = gl.zeros([64, WIDTH], gl.float32, O)
    else:
        s_scores = start_scores(q, k_ring, 0, C, BLOCK_N)
    b_scores = warpgroup_mma_wait(0, deps=[s_scores])
    release(k_ring, own.before, C)
    b_new, _, b_top, b_total = weigh(
        b_scores, b_lowest, b_none, columns, b_floor, b_limit, own.begin * BLOCK_N, scale, cap, C, True, False, BLOCK_N
    )
    state = (as_operand(b_new, DTYPE, O), b_sum, b_top, b_total)
    after = own.begin + 1
    if C.WINDOWED:
        state = advance(
            q,
            k_ring,
            v_ring,
            own,
            after,
            own.full_begin,
            state,
            columns,
            b_floor,
            b_limit,
            scale,
            cap,
            C,
            O,
            True,
            False,
            BLOCK_N,
        )
        after = max(after, own.full_begin)
    state = advance(
        q,
        k_ring,
        v_ring,
        own,
        after,
        own.full_end,
        state,
        columns,
        b_floor,
        b_limit,
        scale,
        cap,
        C,
        O,
        False,
        False,
        BLOCK_N,
    )
    state = advance(
        q,
        k_ring,
        v_ring,
        own,
        max(after, own.full_end),
        own.end,
        state,
        columns,
        b_floor,
        b_limit,
        scale,
        cap,
        C,
        O,
        True,
        False,
        BLOCK_N,
    )
    b_weights, b_sum, b_top, b_total = state
    last = own.before + own.end - own.begin - 1
    b_sum = warpgroup_mma_wait(0, deps=[start_sum(b_weights, v_ring, last, b_sum, C)])
    release(v_ring, last, C)
    b_out, b_lse = share(b_sum, b_top, b_total, O)
    tile = again(tile)
    store_lse(outputs.self_lse, tile, o_query, b_lse)
    # The queries have been read: their place serves to write whole rows.
    if outputs.self_out is not None:
        q.store(b_out.to(DTYPE))
        store_queries(outputs.self_out, tile, group, q.load(B), B, WIDTH)
    if C.CROSS:
        if outputs.cross_out is not None:
            store_queries(outputs.cross_out, tile, group, cross_place.index(group).load(B), B, WIDTH)
        b_out += b_gate * cross_place.index(group).load(O).to(gl.float32)
    q.store(b_out.to(DTYPE))
    store_queries(outputs.out, tile, group, q.load(B), B, WIDTH)


@gluon.jit
def first_group(
    inputs,
    outputs,
    tile,
    cross,
    own,
    q_place,
    cross_place,
    k_ring,
    v_ring,
    columns,
    window,
    scale,
    cap,
    C: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):
    attend(
        0,
        inputs,
        outputs,
        tile,
        cross,
        own,
        q_place,
        cross_place,
        k_ring,
        v_ring,
        columns,
        window,
        scale,
        cap,
        C,
        BLOCK_N,
        WIDTH,
    )


@gluon.jit
def second_group(
    inputs,
    outputs,
    tile,
    cross,
    own,
    q_place,
    cross_place,
    k_ring,
    v_ring,
    columns,
    window,
    scale,
    cap,
    C: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):
    attend(
        1,
        inputs,
        outputs,
        tile,
        cross,
        own,
        q_place,
        cross_place,
        k_ring,
        v_ring,
        columns,
        window,
        scale,
        cap,
        C,
        BLOCK_N,
        WIDTH,
    )


@gluon.jit
def make_ring(dtype: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """A Ring of empty places."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=GROUPS)
    return Ring(tiles, full, empty)


@gluon.jit(do_not_specialize=["queries", "keys", "cross_keys", "start", "window", "scale", "cap", "shares", "batches"])
def hopper_forward_kernel(
    inputs, outputs, spans, queries, keys, cross_keys, start, window, scale, cap, shares, batches, C: gl.constexpr
):
    """One tile of queries of one head: shapes as in `adaptive_fusion_attention`, the log-sum-exps in base 2.

    shares: batch rows that read one row of cross keys; batches: of them all.
    """
    forward_tile(
        inputs,
        outputs,
        spans,
        queries,
        keys,
        cross_keys,
        start,
        window,
        scale,
        cap,
        shares,
        batches,
        C,
        C.STAGES,
        C.BLOCK_N,
        C.HEAD_DIM,
    )


@gluon.jit
def forward_tile(
    inputs,
    outputs,
    spans,
    queries,
    keys,
    cross_keys,
    start,
    window,
    scale,
    cap,
    shares,
    batches,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """`hopper_forward_kernel`; Triton 3.6 takes sizes as parameters only."""
    DTYPE: gl.constexpr = inputs.q.pointer.dtype.element_ty
    tile = tile_of_program(queries, batches, C)
    if C.CROSS:
        cross = cross_term(spans.cross_keys, tile, cross_keys, shares, C)
        own = self_term(spans.keys, tile, queries, keys, start, window, cross.end - cross.begin, C)
    else:
        own = self_term(spans.keys, tile, queries, keys, start, window, 0, C)
        cross = own
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], DTYPE)
    q_place = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, WIDTH], LAYOUT)
    cross_place = q_place
    if C.CROSS:
        cross_place = gl.allocate_shared_memory(DTYPE, [GROUPS, 64, WIDTH], LAYOUT)
    columns = gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    columns.store(gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [WARPS], [0])))
    k_ring = make_ring(DTYPE, C, STAGES, BLOCK_N, WIDTH)
    v_ring = make_ring(DTYPE, C, STAGES, BLOCK_N, WIDTH)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                first_group,
                (
                    inputs,
                    outputs,
                    tile,
                    cross,
                    own,
                    q_place,
                    cross_place,
                    k_ring,
                    v_ring,
                    columns,
                    window,
                    scale,
                    cap,
                    C,
                    BLOCK_N,
                    WIDTH,
                ),
            ),
            (
                second_group,
                (
                    inputs,
                    outputs,
                    tile,
                    cross,
                    own,
                    q_place,
                    cross_place,
                    k_ring,
                    v_ring,
                    columns,
                    window,
                    scale,
                    cap,
                    C,
                    BLOCK_N,
                    WIDTH,
                ),
            ),
            (produce, (inputs, tile, cross, own, k_ring, v_ring, shares, C)),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
