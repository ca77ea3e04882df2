"""Gradients of queries, and the row sums that both gradient launches read."""

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2_E,
    first_query_index,
    head_pointer,
    hide_unseen,
    keys_of_queries,
    list_first,
    listed_span,
    load_gate,
    load_lse,
    load_rows,
    mask_row,
    query_tile,
    read_rows,
    row_source,
    sequence_span,
    softmax_weights,
    store_rows,
    tanh,
    tile_at,
    used_keys,
)


@triton.jit(do_not_specialize=["queries"])
def row_sums_kernel(
    grad_out,
    self_out,
    cross_out,
    self_sums,
    cross_sums,
    queries,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sums = sum_d grad_out * term, (B, Hq, S) fp32, of either un-gated term; the cross one is also the gate's gradient."""
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    batch = program // (tiles * HEADS)
    head = program // tiles % HEADS
    first = program % tiles * BLOCK_M
    o_query = first + tl.arange(0, BLOCK_M)
    used = o_query < queries
    row = (tl.cast(batch, tl.int64) * HEADS + head) * queries
    grad_rows = head_pointer(grad_out, batch, head, 0)
    b_grad = load_rows(grad_rows, grad_out.row, first, used, BLOCK_M, BLOCK_D, HEAD_DIM).to(tl.float32)
    if cross_sums is not None:
        cross_rows = head_pointer(cross_out, batch, head, 0)
        b_cross = load_rows(cross_rows, cross_out.row, first, used, BLOCK_M, BLOCK_D, HEAD_DIM).to(tl.float32)
        tl.store(cross_sums + row + o_query, tl.sum(b_grad * b_cross, 1), mask=used)
    if self_sums is not None:
        self_rows = head_pointer(self_out, batch, head, 0)
        b_self = load_rows(self_rows, self_out.row, first, used, BLOCK_M, BLOCK_D, HEAD_DIM).to(tl.float32)
        tl.store(self_sums + row + o_query, tl.sum(b_grad * b_self, 1), mask=used)


@triton.jit(do_not_specialize=["queries"])
def sum_heads_kernel(sums, total, queries, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """total (B, S) = sums (B, HEADS, S) over the heads, in their order whatever the batch."""
    tiles = tl.cdiv(queries, BLOCK_M)
    batch = tl.program_id(0) // tiles
    o_query = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    used = o_query < queries
    value = tl.zeros([BLOCK_M], tl.float32)
    for head in range(HEADS):
        row = (tl.cast(batch, tl.int64) * HEADS + head) * queries
        value += tl.load(sums + row + o_query, mask=used, other=0.0)
    tl.store(total + tl.cast(batch, tl.int64) * queries + o_query, value, mask=used)


@triton.jit
def add_key_tiles(
    grad_q,  # [BM, BLOCK_D] fp32
    b_q,  # [BM, BLOCK_D]
    b_grad,  # [BM, BLOCK_D]
    lse,  # [BM]
    sums,  # [BM]
    k,
    v,
    k_stride,
    v_stride,
    slots,
    mask,
    list_start,
    first,  # tiles first .. last; all queries see all keys of full_begin .. full_end
    full_begin,
    full_end,
    last,
    sequence,
    key_begin,  # no query of the tile sees keys outside key_begin .. key_end
    key_end,
    query,  # [BM] key indices of the queries
    window,
    scale,
    softcap,
    FULL: tl.constexpr,  # all queries see all keys, up to the mask
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what tiles of keys contribute to the gradients of one tile of queries, still to be multiplied by the scale."""
    begin, end = listed_span(slots, list_start, sequence, first, last)
    for place in range(begin, end):
        tile = tile_at(slots, list_start, place)
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        used = None
        if not FULL or slots is not None:
            used = used_keys(slots, mask, key, key_begin, key_end, WINDOWED)
        b_k = read_rows(k, k_stride, tile * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM, DESCRIPTORS)  # [BN, BLOCK_D]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if CAPPED:
            capped = tanh(scores * (scale / (softcap * LOG2_E)), ACCURATE=b_q.dtype == tl.float32)
            weights = softmax_weights(capped, softcap * LOG2_E, lse[:, None], EXACT=b_q.dtype == tl.float32)
        else:
            weights = softmax_weights(scores, scale, lse[:, None], EXACT=b_q.dtype == tl.float32)
        partial = (tile < full_begin) | (tile >= full_end)
        weights = hide_unseen(weights, 0.0, used, query, key, window, partial, slots, CAUSAL, WINDOWED)
        b_v = read_rows(v, v_stride, tile * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM, DESCRIPTORS)  # [BN, BLOCK_D]
        products = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        grad_scores = weights * (products - sums[:, None])
        if CAPPED:
            grad_scores = grad_scores * (1 - capped * capped)
        grad_q = tl.dot(grad_scores.to(b_k.dtype), b_k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["sequences", "queries", "keys", "cross_keys", "start", "window", "scale", "softcap"])
def query_gradients_kernel(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    grad_out,
    self_lse,
    cross_lse,
    self_sums,
    cross_sums,
    grad_q,
    slots,
    cross_slots,
    bounds,
    cross_bounds,
    sequences,
    queries,
    keys,
    cross_keys,
    start,
    window,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    CROSS: tl.constexpr,
    EVEN_CROSS: tl.constexpr,
    GATE_PER_QUERY: tl.constexpr,
    START_PER_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head."""
    batch, head, sequence, tile = query_tile(bounds, sequences, queries, HEADS, BLOCK_M)
    q_begin, q_count = sequence_span(bounds, sequence, queries)
    k_begin, k_count = sequence_span(bounds, sequence, keys)
    c_begin, c_count = sequence_span(cross_bounds, sequence, cross_keys)
    first = tile * BLOCK_M
    if first >= q_count:
        return
    start = first_query_index(start, batch, queries, keys, window, START_PER_ROW)

    o_query = first + tl.arange(0, BLOCK_M)  # [BM]
    used = o_query < q_count
    row = (tl.cast(batch, tl.int64) * HEADS + head) * queries + q_begin
    q_rows = head_pointer(q, batch, head, q_begin)
    b_q = load_rows(q_rows, q.row, first, used, BLOCK_M, BLOCK_D, HEAD_DIM)  # [BM, BLOCK_D]
    grad_rows = head_pointer(grad_out, batch, head, q_begin)
    b_grad = load_rows(grad_rows, grad_out.row, first, used, BLOCK_M, BLOCK_D, HEAD_DIM)  # [BM, BLOCK_D]
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if CROSS:
        place = list_first(cross_bounds, c_begin, sequence, cross_keys, BLOCK_N)
        gradient = add_key_tiles(
            grad_q=gradient,
            b_q=b_q,
            b_grad=b_grad,
            lse=load_lse(cross_lse + row, o_query, used),
            sums=tl.load(cross_sums + row + o_query, mask=used, other=0.0),
            k=row_source(cross_k, batch, head // GROUP, c_begin, c_count, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS),
            v=row_source(cross_v, batch, head // GROUP, c_begin, c_count, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS),
            k_stride=cross_k.row,
            v_stride=cross_v.row,
            slots=cross_slots,
            mask=mask_row(cross_slots, batch, c_begin),
            list_start=place,
            first=0,
            full_begin=0,
            full_end=c_count // BLOCK_N,
            last=tl.cdiv(c_count, BLOCK_N),
            sequence=sequence,
            key_begin=0,
            key_end=c_count,
            query=o_query,
            window=window,
            scale=scale * LOG2_E,
            softcap=softcap,
            FULL=EVEN_CROSS,
            CAUSAL=False,
            WINDOWED=False,
            CAPPED=False,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
            DESCRIPTORS=DESCRIPTORS,
            PRECISION=PRECISION,
        )
        b_gate = load_gate(gate, batch, head, q_begin + o_query, used, GATE_PER_QUERY)
        if GATE_PER_QUERY:
            b_gate = b_gate[:, None]
        gradient = gradient * b_gate  # once, before the self term joins

    last = tl.minimum(first + BLOCK_M, q_count)
    begin, full_begin, full_end, end = keys_of_queries(first, last, start, k_count, window, BLOCK_N, CAUSAL, WINDOWED)
    key_begin = start + first - window + 1
    key_end = k_count
    if CAUSAL:
        key_end = tl.minimum(k_count, start + last)
    place = list_first(bounds, k_begin, sequence, keys, BLOCK_N)
    b_lse = load_lse(self_lse + row, o_query, used)
    b_sums = tl.load(self_sums + row + o_query, mask=used, other=0.0)
    limit = k_count
    if CAUSAL:
        # What lies past the sequence's last query stays unread; a descriptor has at least one row.
        limit = tl.minimum(k_count, tl.maximum(start + q_count, 1))
    gradient = add_key_tiles(
        grad_q=gradient,
        b_q=b_q,
        b_grad=b_grad,
        lse=b_lse,
        sums=b_sums,
        k=row_source(k, batch, head // GROUP, k_begin, limit, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS),
        v=row_source(v, batch, head // GROUP, k_begin, limit, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS),
        k_stride=k.row,
        v_stride=v.row,
        slots=slots,
        mask=mask_row(slots, batch, k_begin),
        list_start=place,
        first=begin,
        full_begin=full_begin,
        full_end=full_end,
        last=end,
        sequence=sequence,
        key_begin=key_begin,
        key_end=key_end,
        query=start + o_query,
        window=window,
        scale=scale * LOG2_E,
        softcap=softcap,
        FULL=False,
        CAUSAL=CAUSAL,
        WINDOWED=WINDOWED,
        CAPPED=CAPPED,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        BLOCK_N=BLOCK_N,
        DESCRIPTORS=DESCRIPTORS,
        PRECISION=PRECISION,
    )
    target = head_pointer(grad_q, batch, head, q_begin)
    store_rows(target, grad_q.row, first, used, gradient * scale, BLOCK_M, BLOCK_D, HEAD_DIM)
