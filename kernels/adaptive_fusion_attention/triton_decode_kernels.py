"""The decode kernels: `decode_kernel`, and `combine_kernel` where several programs share the chunks of a key head."""

import triton
import triton.language as tl

from .triton_decode_tiles import (
    attend_chunk,
    attended_span,
    chunk_count,
    merge,
    row_pointers,
    self_span,
    tile_of_rows,
    unit_after,
    write_rows,
)
from .triton_tiles import LOG2_E, head_pointer

# A partial result: a row of values, its largest score and sum, and 2 unused, so that rows start at multiples of 16 bytes.
BESIDE_VALUES = tl.constexpr(4)


@triton.jit
def partial_rows(partials, batch, head, place, chunks, rows, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where chunk number `place` of a key head leaves what its rows made of it."""
    slot = (tl.cast(batch, tl.int64) * KV_HEADS + head) * chunks + place
    return partials + slot * (rows * (HEAD_DIM + BESIDE_VALUES))


@triton.jit
def attend_chunks(
    q,  # [BLOCK_D, BM]
    k,
    v,
    mask,
    mask_stride,
    batch,
    kv_batch,  # batch row of k, v and mask
    head,
    first,  # chunks first .. last of those of this head
    last,
    number,  # of the head's first chunk, counted from key 0
    begin,
    end,
    query,  # [BM] key indices of the rows
    window,
    scale,
    softcap,
    partials,
    row,  # [BM]
    place,  # where the partial result of chunk `first` belongs
    chunks,
    rows,
    splits,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-> largest score, sum and values of these chunks merged in order; where there are splits, stores each chunk's instead."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    rest = unit_after(scale, CAPPED, EXACT=q.dtype == tl.float32)
    k_rows = head_pointer(k, kv_batch, head, 0)
    v_rows = head_pointer(v, kv_batch, head, 0)
    for index in range(first, last):
        chunk_top, chunk_total, chunk_values = attend_chunk(
            q,
            k_rows,
            v_rows,
            k.row,
            v.row,
            mask,
            mask_stride,
            kv_batch,
            number + index,
            begin,
            end,
            query,
            window,
            scale,
            softcap,
            CAUSAL,
            WINDOWED,
            CAPPED,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PRECISION,
        )
        # Not a compile-time choice: a growing cache must not compile a second kernel, nor split chunks round otherwise.
        if splits == 1:
            top, total, values = merge(top, total, values, chunk_top, chunk_total, chunk_values, rest)
        else:
            partial = partial_rows(partials, batch, head, place + index, chunks, rows, KV_HEADS, HEAD_DIM)
            o_value = tl.arange(0, BLOCK_D)[:, None]
            o_row = row * (HEAD_DIM + BESIDE_VALUES)
            in_rows = row < rows
            tl.store(partial + (o_row[None, :] + o_value), chunk_values, mask=in_rows[None, :] & (o_value < HEAD_DIM))
            tl.store(partial + (o_row + HEAD_DIM), chunk_top, mask=in_rows)
            tl.store(partial + (o_row + HEAD_DIM + 1), chunk_total, mask=in_rows)
    return top, total, values


# What changes from one step to the next, strides of masks among it: nothing here may compile another kernel.
_CHANGING = [
    "mask_stride",
    "cross_mask_stride",
    "queries",
    "keys",
    "cross_keys",
    "start",
    "start_stride",
    "window",
    "scale",
    "sharing",
    "chunks",
]


@triton.jit(do_not_specialize=[*_CHANGING, "softcap", "splits"])
def decode_kernel(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    out,
    self_lse,
    cross_lse,
    partials,
    mask,
    mask_stride,
    cross_mask,
    cross_mask_stride,
    queries,
    keys,
    cross_keys,
    start,
    start_stride,
    window,
    scale,
    sharing,  # batch rows that read one row of cross keys
    softcap,
    chunks,  # that there is room for in `partials`, a head
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    CROSS: tl.constexpr,
    START_PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of one key head over all its chunks, or over the share of one split: shapes as in `adaptive_fusion_attention`."""
    rows = queries * GROUP
    batch, head, row = tile_of_rows(rows, KV_HEADS, BLOCK_M)
    in_rows = row < rows
    o_query = row % queries
    o_head = head * GROUP + row // queries

    start, begin, end = self_span(
        start, start_stride, mask, mask_stride, batch, queries, keys, window, CAUSAL, WINDOWED, START_PER_ROW
    )
    self_chunks = chunk_count(begin, end, BLOCK_N)
    cross_chunks = 0
    if CROSS:
        cross_begin, cross_end = attended_span(cross_mask, cross_mask_stride, batch // sharing, 0, cross_keys)
        cross_chunks = chunk_count(cross_begin, cross_end, BLOCK_N)
    share = tl.cdiv(cross_chunks + self_chunks, splits)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, cross_chunks + self_chunks)

    inside = in_rows[None, :] & (tl.arange(0, BLOCK_D)[:, None] < HEAD_DIM)
    b_q = tl.load(row_pointers(q, batch, o_head, o_query, BLOCK_D), mask=inside, other=0.0)  # [BLOCK_D, BM]
    scale = scale * LOG2_E
    query = start + o_query
    cross_top = 0.0
    cross_total = 0.0
    cross_values = 0.0
    if CROSS:
        cross_top, cross_total, cross_values = attend_chunks(
            b_q,
            cross_k,
            cross_v,
            cross_mask,
            cross_mask_stride,
            batch,
            batch // sharing,
            head,
            first=first,
            last=tl.minimum(last, cross_chunks),
            number=cross_begin // BLOCK_N,
            begin=cross_begin,
            end=cross_end,
            query=query,
            window=window,
            scale=scale,
            softcap=softcap,
            partials=partials,
            row=row,
            place=0,
            chunks=chunks,
            rows=rows,
            splits=splits,
            CAUSAL=False,
            WINDOWED=False,
            CAPPED=False,
            KV_HEADS=KV_HEADS,
            HEAD_DIM=HEAD_DIM,
            BLOCK_D=BLOCK_D,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            PRECISION=PRECISION,
        )
    top, total, values = attend_chunks(
        b_q,
        k,
        v,
        mask,
        mask_stride,
        batch,
        batch,
        head,
        first=tl.maximum(first - cross_chunks, 0),
        last=last - cross_chunks,
        number=begin // BLOCK_N,
        begin=begin,
        end=end,
        query=query,
        window=window,
        scale=scale,
        softcap=softcap,
        partials=partials,
        row=row,
        place=cross_chunks,
        chunks=chunks,
        rows=rows,
        splits=splits,
        CAUSAL=CAUSAL,
        WINDOWED=WINDOWED,
        CAPPED=CAPPED,
        KV_HEADS=KV_HEADS,
        HEAD_DIM=HEAD_DIM,
        BLOCK_D=BLOCK_D,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        PRECISION=PRECISION,
    )
    if splits == 1:
        rest = unit_after(scale, CAPPED, EXACT=b_q.dtype == tl.float32)
        cross_rest = unit_after(scale, CAPPED=False, EXACT=b_q.dtype == tl.float32)
        write_rows(
            out,
            self_lse,
            cross_lse,
            gate,
            batch,
            o_head,
            o_query,
            in_rows,
            queries,
            top,
            total,
            values,
            cross_top,
            cross_total,
            cross_values,
            rest,
            cross_rest,
            KV_HEADS * GROUP,
            HEAD_DIM,
            BLOCK_D,
            CROSS,
        )


@triton.jit
def merge_partials(
    partials,
    batch,
    head,
    row,  # [BM]
    first,
    last,
    chunks,
    rows,
    rest,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """What the stored chunks first .. last of these rows merge to: [BM], [BM] and [BLOCK_D, BM]."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    o_value = tl.arange(0, BLOCK_D)[:, None]
    o_row = row * (HEAD_DIM + BESIDE_VALUES)
    for begin in range(first, last, CHUNKS):
        for step in tl.static_range(CHUNKS):  # loads that do not wait for each other
            place = begin + step
            there = (row < rows) & (tl.zeros_like(row) + place < last)  # past the last chunk one that holds nothing
            partial = partial_rows(partials, batch, head, place, chunks, rows, KV_HEADS, HEAD_DIM)
            chunk_top = tl.load(partial + (o_row + HEAD_DIM), mask=there, other=-float("inf"))
            chunk_total = tl.load(partial + (o_row + HEAD_DIM + 1), mask=there, other=0.0)
            inside = there[None, :] & (o_value < HEAD_DIM)
            chunk_values = tl.load(partial + (o_row[None, :] + o_value), mask=inside, other=0.0)
            top, total, values = merge(top, total, values, chunk_top, chunk_total, chunk_values, rest)
    return top, total, values


@triton.jit(do_not_specialize=_CHANGING)
def combine_kernel(
    partials,
    gate,
    out,
    self_lse,
    cross_lse,
    mask,
    mask_stride,
    cross_mask,
    cross_mask_stride,
    queries,
    keys,
    cross_keys,
    start,
    start_stride,
    window,
    scale,
    sharing,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    CROSS: tl.constexpr,
    START_PER_ROW: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A few rows of one key head: what their chunks left, merged in the order of chunks."""
    rows = queries * GROUP
    batch, head, row = tile_of_rows(rows, KV_HEADS, BLOCK_M)
    start, begin, end = self_span(
        start, start_stride, mask, mask_stride, batch, queries, keys, window, CAUSAL, WINDOWED, START_PER_ROW
    )
    scale = scale * LOG2_E
    rest = unit_after(scale, CAPPED, EXACT)
    cross_rest = unit_after(scale, False, EXACT)
    cross_chunks = 0
    cross_top = 0.0
    cross_total = 0.0
    cross_values = 0.0
    if CROSS:
        cross_begin, cross_end = attended_span(cross_mask, cross_mask_stride, batch // sharing, 0, cross_keys)
        cross_chunks = chunk_count(cross_begin, cross_end, BLOCK_N)
        cross_top, cross_total, cross_values = merge_partials(
            partials,
            batch,
            head,
            row,
            0,
            cross_chunks,
            chunks,
            rows,
            cross_rest,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            CHUNKS,
        )
    last = cross_chunks + chunk_count(begin, end, BLOCK_N)
    top, total, values = merge_partials(
        partials, batch, head, row, cross_chunks, last, chunks, rows, rest, KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_M, CHUNKS
    )
    write_rows(
        out,
        self_lse,
        cross_lse,
        gate,
        batch,
        head * GROUP + row // queries,
        row % queries,
        row < rows,
        queries,
        top,
        total,
        values,
        cross_top,
        cross_total,
        cross_values,
        rest,
        cross_rest,
        KV_HEADS * GROUP,
        HEAD_DIM,
        BLOCK_D,
        CROSS,
    )
