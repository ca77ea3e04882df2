"""What the two decode kernels share: which keys count, how chunks of them merge, how rows are placed and written.

Rows are the queries of the heads that share a key head, head by head. Tiles lie transposed, [.., rows]: keys and head width are
then the sides that tensor cores want long (64 on Hopper), and 16 rows do.
"""

import triton
import triton.language as tl

from .triton_tiles import LOG2_E, band_visible, load_rows, tanh

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_of_rows(rows, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> batch row, key head and rows [BM] of this program."""
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return program // tiles // KV_HEADS, program // tiles % KV_HEADS, row


@triton.jit
def attended_span(mask, mask_stride, batch, begin, end):
    """Keys begin .. end without those before the first and after the last that the mask attends to; without a mask all."""
    if mask is not None:
        pointer = mask + tl.cast(batch, tl.int64) * mask_stride
        first = end
        last = begin
        for place in range(begin, end, 1024):
            key = place + tl.arange(0, 1024)
            attended = tl.load(pointer + key, mask=key < end, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(attended, key, end), 0))
            last = tl.maximum(last, tl.max(tl.where(attended, key + 1, begin), 0))
        begin = first
        end = last
    return begin, end


@triton.jit
def self_span(
    start,
    start_stride,
    mask,
    mask_stride,
    batch,
    queries,
    keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    START_PER_ROW: tl.constexpr,
):
    """-> key index of the first query, within what can matter so that sums stay in 32 bits; the keys begin .. end it reads."""
    if START_PER_ROW:
        index = tl.load(start + tl.cast(batch, tl.int64) * start_stride).to(tl.int64)
        start = tl.minimum(tl.maximum(index, -queries), keys + window).to(tl.int32)
    begin = 0
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum(start + queries, 0))
    if WINDOWED:
        begin = tl.minimum(tl.maximum(start - window + 1, 0), end)
    begin, end = attended_span(mask, mask_stride, batch, begin, end)
    return start, begin, end


@triton.jit
def chunk_count(begin, end, BLOCK_N: tl.constexpr):
    """How many chunks of BLOCK_N keys, counted from key 0, hold the keys begin .. end."""
    return tl.where(end > begin, tl.cdiv(end, BLOCK_N) - begin // BLOCK_N, 0)


@triton.jit
def unit_before(scale, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """What scores are multiplied with before the largest is subtracted: see `softmax_weights`. scale: in base 2."""
    unit = scale
    if CAPPED:
        unit = LOG2_E
    if EXACT:
        unit = 1.0
    return unit


@triton.jit
def unit_after(scale, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """What the differences to the largest score are multiplied with."""
    unit = 1.0
    if EXACT:
        unit = scale
        if CAPPED:
            unit = LOG2_E
    return unit


@triton.jit
def load_columns(pointer, stride, first, used, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """`load_rows` transposed, [BLOCK_D, BLOCK]. A tile transposed later is not read ahead below Hopper, and spills 3 KB."""
    pointer += tl.cast(first, tl.int64) * stride
    o_value = tl.arange(0, BLOCK_D)[:, None]
    pointers = pointer + (o_value + tl.arange(0, BLOCK)[None, :] * stride)
    return tl.load(pointers, mask=used[None, :] & (o_value < HEAD_DIM), other=0.0)


@triton.jit
def attend_chunk(
    q,  # [BLOCK_D, BM]
    k,  # pointers to the first key and value of the head
    v,
    k_stride,
    v_stride,
    mask,
    mask_stride,
    batch,
    chunk,
    begin,  # keys outside begin .. end are not read
    end,
    query,  # [BM] key indices of the rows
    window,
    scale,  # of the scores, in base 2
    softcap,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax over one chunk of keys -> its largest score [BM], sum [BM] and weighted values [BLOCK_D, BM], from that score."""
    unit = unit_before(scale, CAPPED, EXACT=q.dtype == tl.float32)
    rest = unit_after(scale, CAPPED, EXACT=q.dtype == tl.float32)
    key = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    used = (key >= begin) & (key < end)
    if mask is not None:
        flags = mask + tl.cast(batch, tl.int64) * mask_stride
        used = used & (tl.load(flags + key, mask=used, other=0) != 0)
    b_k = load_rows(k, k_stride, chunk * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM)  # [BN, BLOCK_D]
    scores = tl.dot(b_k, q, input_precision=PRECISION)  # [BN, BM]
    if CAPPED:
        scores = softcap * tanh(scores * (scale / (softcap * LOG2_E)), ACCURATE=q.dtype == tl.float32)
    visible = used[:, None]
    if CAUSAL:
        visible = visible & band_visible(query[None, :], key[:, None], window, WINDOWED)
    scores = tl.where(visible, scores, -float("inf"))
    top = tl.max(scores, 0) * unit
    base = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2((scores * unit - base[None, :]) * rest)  # [BN, BM]
    b_v = load_columns(v, v_stride, chunk * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM)  # [BLOCK_D, BN]
    values = tl.dot(b_v, weights.to(b_v.dtype), input_precision=PRECISION)  # [BLOCK_D, BM]
    return top, tl.sum(weights, 0), values


@triton.jit
def merge(top, total, values, chunk_top, chunk_total, chunk_values, rest):
    """What has been seen so far, [BM], [BM] and [BLOCK_D, BM], and the next chunk.

    A chunk that holds nothing for a row, top -inf, leaves its bits alone. Every rounding is spelled out: the compiler must
    not fuse this in one way where a program merges its own chunks and in another where `combine_kernel` does.
    """
    new_top = tl.maximum(top, chunk_top)
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    old = tl.exp2((top - base) * rest)
    new = tl.exp2((chunk_top - base) * rest)
    total = tl.fma(total, old, chunk_total * new)
    values = tl.fma(values, tl.broadcast_to(old[None, :], values.shape), chunk_values * new[None, :])
    return new_top, total, values


@triton.jit
def normalise(top, total, values, rest):
    """-> softmax-weighted values [BLOCK_D, BM], natural log-sum-exp [BM]: 0 and -inf for a row that saw nothing."""
    total = tl.where(total == 0, 1.0, total)
    return values / total[None, :], tl.fma(top, tl.zeros_like(top) + rest, tl.log2(total)) * LN_2


@triton.jit
def row_pointers(x, batch, head, query, BLOCK_D: tl.constexpr):
    """Pointers [BLOCK_D, BM] to the rows of these heads and queries, both [BM]."""
    pointer = x.pointer + tl.cast(batch, tl.int64) * x.batch
    rows = tl.cast(head, tl.int64) * x.head + tl.cast(query, tl.int64) * x.row
    return pointer + (rows[None, :] + tl.arange(0, BLOCK_D)[:, None])


@triton.jit
def write_rows(
    out,
    self_lse,
    cross_lse,
    gate,
    batch,
    head,  # [BM]
    query,  # [BM]
    in_rows,  # [BM]
    queries,
    top,
    total,
    values,
    cross_top,
    cross_total,
    cross_values,
    rest,
    cross_rest,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CROSS: tl.constexpr,
):
    """Self term plus gated cross term, and both log-sum-exps where they are wanted."""
    result, lse = normalise(top, total, values, rest)
    row = (tl.cast(batch, tl.int64) * HEADS + head) * queries + query
    if CROSS:
        cross, lse_of_cross = normalise(cross_top, cross_total, cross_values, cross_rest)
        gates = gate.pointer + tl.cast(batch, tl.int64) * gate.batch
        gates += tl.cast(head, tl.int64) * gate.head + tl.cast(query, tl.int64) * gate.row
        b_gate = tl.load(gates, mask=in_rows, other=0.0).to(tl.float32)  # [BM]
        result = tl.fma(tl.broadcast_to(b_gate[None, :], cross.shape), cross, result)
        if cross_lse is not None:
            tl.store(cross_lse + row, lse_of_cross, mask=in_rows)
    if self_lse is not None:
        tl.store(self_lse + row, lse, mask=in_rows)
    written = in_rows[None, :] & (tl.arange(0, BLOCK_D)[:, None] < HEAD_DIM)
    pointers = row_pointers(out, batch, head, query, BLOCK_D)
    tl.store(pointers, result.to(out.pointer.dtype.element_ty), mask=written)
