"""Gradients of keys and values, self and cross in one launch: one program per tile of keys, which adds over queries and heads.

Each program loops over the heads that share its key head, so nothing of the size of all query heads is ever written.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    LOG2_E,
    band_visible,
    first_query_index,
    head_pointer,
    load_lse,
    load_rows,
    packed_tile,
    queries_of_keys,
    read_rows,
    row_source,
    sequence_span,
    softmax_weights,
    store_rows,
    tanh,
)


@triton.jit
def add_query_tiles(
    grad_k,  # [BN, BLOCK_D] fp32
    grad_v,
    b_k,  # [BN, BLOCK_D], zero in unused slots
    b_v,
    q,
    grad_out,
    q_stride,
    grad_stride,
    lse,
    sums,
    gate,
    gate_stride,
    first,  # query tiles first .. last; all queries of full_begin .. full_end see all the keys
    full_begin,
    full_end,
    last,
    queries,
    key,  # [BN]
    start,
    window,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    GATED: tl.constexpr,  # the weights count `gate` times, a gate per query or one for all
    GATE_PER_QUERY: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one head's tiles of queries contribute to the gradients of one tile of keys and values."""
    for tile in range(first, last):
        o_query = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
        used = o_query < queries
        b_q = read_rows(q, q_stride, tile * BLOCK_M, used, BLOCK_M, BLOCK_D, HEAD_DIM, DESCRIPTORS)  # [BM, BLOCK_D]
        b_lse = load_lse(lse, o_query, used)
        # Keys in rows, so that the weights feed the next product as they are.
        scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        if CAPPED:
            capped = tanh(scores * (scale / (softcap * LOG2_E)), ACCURATE=b_q.dtype == tl.float32)
            weights = softmax_weights(capped, softcap * LOG2_E, b_lse[None, :], EXACT=b_q.dtype == tl.float32)
        else:
            weights = softmax_weights(scores, scale, b_lse[None, :], EXACT=b_q.dtype == tl.float32)
        if CAUSAL:
            if (tile < full_begin) | (tile >= full_end):
                visible = band_visible(start + o_query[None, :], key[:, None], window, WINDOWED)
                weights = tl.where(visible, weights, 0.0)
        if GATED and GATE_PER_QUERY:
            b_gate = tl.load(gate + o_query * gate_stride, mask=used, other=0.0).to(tl.float32)
            weights = weights * b_gate[None, :]
        elif GATED:
            weights = weights * gate
        b_grad = read_rows(grad_out, grad_stride, tile * BLOCK_M, used, BLOCK_M, BLOCK_D, HEAD_DIM, DESCRIPTORS)
        if WANT_V:
            grad_v = tl.dot(weights.to(b_grad.dtype), b_grad, grad_v, input_precision=PRECISION)
        if WANT_K:
            products = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [BN, BM]
            b_sums = tl.load(sums + o_query, mask=used, other=0.0)
            grad_scores = weights * (products - b_sums[None, :])
            if CAPPED:
                grad_scores = grad_scores * (1 - capped * capped)
            grad_k = tl.dot(grad_scores.to(b_q.dtype), b_q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def gradients_of_key_tile(
    q,
    k,
    v,
    gate,
    grad_out,
    lse,
    sums,
    grad_k,
    grad_v,
    mask,
    mask_stride,
    bounds,  # of the queries
    key_bounds,
    sequences,
    tile,
    kv_head,
    batch,
    queries,
    keys,
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
    GATED: tl.constexpr,
    GATE_PER_QUERY: tl.constexpr,
    START_PER_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute and store the gradients of one tile of keys and values, of the self or the cross term."""
    sequence = batch
    if bounds is not None:
        sequence, tile = packed_tile(key_bounds, sequences, tile, BLOCK_N)
    q_begin, q_count = sequence_span(bounds, sequence, queries)
    k_begin, k_count = sequence_span(key_bounds, sequence, keys)
    first_key = tile * BLOCK_N
    if first_key < k_count:
        key = first_key + tl.arange(0, BLOCK_N)  # [BN]
        first_index = 0
        used = key < k_count
        if CAUSAL:  # what no query sees must not reach the gradients, whatever it holds
            first_index = first_query_index(start, batch, queries, keys, window, START_PER_ROW)
            used = used & (key < first_index + q_count)
        if WINDOWED:
            used = used & (key > first_index - window)
        if mask is not None:
            mask_row = mask + tl.cast(batch, tl.int64) * mask_stride + k_begin
            used = tl.load(mask_row + key, mask=used, other=0) != 0
        b_k = load_rows(head_pointer(k, batch, kv_head, k_begin), k.row, first_key, used, BLOCK_N, BLOCK_D, HEAD_DIM)
        b_v = load_rows(head_pointer(v, batch, kv_head, k_begin), v.row, first_key, used, BLOCK_N, BLOCK_D, HEAD_DIM)
        sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        last_key = tl.minimum(first_key + BLOCK_N, k_count)
        begin, full_begin, full_end, end = queries_of_keys(
            first_key, last_key, first_index, q_count, window, BLOCK_M, CAUSAL, WINDOWED
        )
        if mask is not None:
            some = tl.max(used.to(tl.int32), 0)  # 0: a tile of masked slots only, whose gradients are 0
            begin, full_begin, full_end, end = begin * some, full_begin * some, full_end * some, end * some

        for member in range(GROUP):
            head = kv_head * GROUP + member
            row = (tl.cast(batch, tl.int64) * HEADS + head) * queries + q_begin
            sums_row = row
            if grad_k is not None:
                sums_row = sums + row
            gate_row = head_pointer(gate, batch, head, q_begin)
            if GATED and not GATE_PER_QUERY:
                gate_row = tl.load(gate_row).to(tl.float32)
            sum_k, sum_v = add_query_tiles(
                grad_k=sum_k,
                grad_v=sum_v,
                b_k=b_k,
                b_v=b_v,
                q=row_source(q, batch, head, q_begin, q_count, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS),
                grad_out=row_source(grad_out, batch, head, q_begin, q_count, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS),
                q_stride=q.row,
                grad_stride=grad_out.row,
                lse=lse + row,
                sums=sums_row,
                gate=gate_row,
                gate_stride=gate.row,
                first=begin,
                full_begin=full_begin,
                full_end=full_end,
                last=end,
                queries=q_count,
                key=key,
                start=first_index,
                window=window,
                scale=scale * LOG2_E,
                softcap=softcap,
                CAUSAL=CAUSAL,
                GATED=GATED,
                GATE_PER_QUERY=GATE_PER_QUERY,
                WINDOWED=WINDOWED,
                CAPPED=CAPPED,
                WANT_K=grad_k is not None,
                WANT_V=grad_v is not None,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                BLOCK_M=BLOCK_M,
                DESCRIPTORS=DESCRIPTORS,
                PRECISION=PRECISION,
            )

        inside = key < k_count
        if mask is not None:  # keys that no query sees have weights of 0 already
            sum_k = tl.where(used[:, None], sum_k, 0.0)
            sum_v = tl.where(used[:, None], sum_v, 0.0)
        if grad_k is not None:
            target = head_pointer(grad_k, batch, kv_head, k_begin)
            store_rows(target, grad_k.row, first_key, inside, sum_k * scale, BLOCK_N, BLOCK_D, HEAD_DIM)
        if grad_v is not None:
            target = head_pointer(grad_v, batch, kv_head, k_begin)
            store_rows(target, grad_v.row, first_key, inside, sum_v, BLOCK_N, BLOCK_D, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "sequences",
        "queries",
        "keys",
        "cross_keys",
        "start",
        "window",
        "scale",
        "softcap",
        "self_tiles",
        "cross_tiles",
    ]
)
def key_value_gradients_kernel(
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
    grad_k,
    grad_v,
    grad_cross_k,
    grad_cross_v,
    key_mask,
    key_mask_stride,
    cross_mask,
    cross_mask_stride,
    self_tiles,
    cross_tiles,
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
    GATE_PER_QUERY: tl.constexpr,
    START_PER_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys of one key head: cross tiles first, since all queries see them; then self tiles, longest first.

    Gradients that nobody asked for are None and cost nothing.
    """
    program = tl.program_id(0)
    tiles = self_tiles + cross_tiles
    tile = program % tiles
    kv_head = program // tiles % (HEADS // GROUP)
    batch = program // (tiles * (HEADS // GROUP))
    if grad_cross_k is not None or grad_cross_v is not None:
        if tile < cross_tiles:
            gradients_of_key_tile(
                q=q,
                k=cross_k,
                v=cross_v,
                gate=gate,
                grad_out=grad_out,
                lse=cross_lse,
                sums=cross_sums,
                grad_k=grad_cross_k,
                grad_v=grad_cross_v,
                mask=cross_mask,
                mask_stride=cross_mask_stride,
                bounds=bounds,
                key_bounds=cross_bounds,
                sequences=sequences,
                tile=tile,
                kv_head=kv_head,
                batch=batch,
                queries=queries,
                keys=cross_keys,
                start=0,
                window=0,
                scale=scale,
                softcap=softcap,
                HEADS=HEADS,
                GROUP=GROUP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                CAUSAL=False,
                WINDOWED=False,
                CAPPED=False,
                GATED=True,
                GATE_PER_QUERY=GATE_PER_QUERY,
                START_PER_ROW=False,
                DESCRIPTORS=DESCRIPTORS,
                PRECISION=PRECISION,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
    if grad_k is not None or grad_v is not None:
        if tile >= cross_tiles:
            gradients_of_key_tile(
                q=q,
                k=k,
                v=v,
                gate=gate,
                grad_out=grad_out,
                lse=self_lse,
                sums=self_sums,
                grad_k=grad_k,
                grad_v=grad_v,
                mask=key_mask,
                mask_stride=key_mask_stride,
                bounds=bounds,
                key_bounds=bounds,
                sequences=sequences,
                tile=tile - cross_tiles,
                kv_head=kv_head,
                batch=batch,
                queries=queries,
                keys=keys,
                start=start,
                window=window,
                scale=scale,
                softcap=softcap,
                HEADS=HEADS,
                GROUP=GROUP,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
                CAUSAL=CAUSAL,
                WINDOWED=WINDOWED,
                CAPPED=CAPPED,
                GATED=False,
                GATE_PER_QUERY=False,
                START_PER_ROW=START_PER_ROW,
                DESCRIPTORS=DESCRIPTORS,
                PRECISION=PRECISION,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
