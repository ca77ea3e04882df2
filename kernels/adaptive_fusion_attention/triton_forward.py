"""Forward in one launch: the cross softmax, then the self softmax, over one query tile that stays on chip.

Only one accumulator is alive at a time: the un-gated cross result is stored (the backward needs it anyway) and read back for
the sum. Kept in registers it takes 210 to 255 of them at D = 128 and spills; stored, 171.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .triton_call import gate_rows, geometry, is_plain, rows, start, tile_count, unit_stride, used_slots
from .triton_tiles import (
    LOG2_E,
    first_query_index,
    head_pointer,
    hide_unseen,
    keys_of_queries,
    list_first,
    listed_span,
    load_gate,
    load_rows,
    mask_row,
    query_tile,
    read_rows,
    row_source,
    sequence_span,
    store_rows,
    tanh,
    tile_at,
    used_keys,
)


@triton.jit
def attend(
    accumulator,  # [BM, BLOCK_D] fp32
    top,  # [BM] fp32, largest score so far, base 2
    total,  # [BM] fp32, sum of exp2(score - top)
    q,  # [BM, BLOCK_D]
    k,
    v,
    k_stride,
    v_stride,
    slots,  # key mask and its list of used tiles, or None
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
    scale,  # of the scores, in base 2
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
    """Online softmax over tiles of keys -> accumulator, top, total."""
    begin, end = listed_span(slots, list_start, sequence, first, last)
    factor = scale
    if CAPPED:
        factor = LOG2_E
    unit = factor  # of `top`, and what then is left to multiply with: see `softmax_weights`
    rest = 1.0
    if q.dtype == tl.float32:
        unit = 1.0
        rest = factor
    for place in range(begin, end):
        tile = tile_at(slots, list_start, place)
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        used = None
        if not FULL or slots is not None:
            used = used_keys(slots, mask, key, key_begin, key_end, WINDOWED)
        b_k = read_rows(k, k_stride, tile * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM, DESCRIPTORS)  # [BN, BLOCK_D]
        scores = tl.dot(q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if CAPPED:
            scores = softcap * tanh(scores * (scale / (softcap * LOG2_E)), ACCURATE=q.dtype == tl.float32)
        partial = (tile < full_begin) | (tile >= full_end)
        scores = hide_unseen(scores, -float("inf"), used, query, key, window, partial, slots, CAUSAL, WINDOWED)

        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
        weights = tl.exp2((scores * unit - base[:, None]) * rest)  # [BM, BN]
        decay = tl.exp2((top - base) * rest)
        total = total * decay + tl.sum(weights, 1)
        accumulator = accumulator * decay[:, None]
        b_v = read_rows(v, v_stride, tile * BLOCK_N, used, BLOCK_N, BLOCK_D, HEAD_DIM, DESCRIPTORS)  # [BN, BLOCK_D]
        accumulator = tl.dot(weights.to(b_v.dtype), b_v, accumulator, input_precision=PRECISION)
        top = new_top
    return accumulator, top * rest, total


@triton.jit
def normalise(accumulator, top, total):
    """-> softmax-weighted values [BM, BLOCK_D] and log-sum-exp [BM] in base 2: 0 and -inf for a row that saw nothing."""
    total = tl.where(total == 0, 1.0, total)
    return accumulator / total[:, None], top + tl.log2(total)


_UNSPECIALIZED = ["sequences", "queries", "keys", "cross_keys", "start", "window", "scale", "softcap", "sharing"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    out,
    self_out,
    cross_out,
    self_lse,
    cross_lse,
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
    sharing,  # batch rows that read one row of cross keys
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
    """One tile of queries of one head: shapes as in `adaptive_fusion_attention`, the log-sum-exps in base 2."""
    batch, head, sequence, tile = query_tile(bounds, sequences, queries, HEADS, BLOCK_M)
    q_begin, q_count = sequence_span(bounds, sequence, queries)
    k_begin, k_count = sequence_span(bounds, sequence, keys)
    c_begin, c_count = sequence_span(cross_bounds, sequence, cross_keys)
    first = tile * BLOCK_M
    if first >= q_count:
        return
    start = first_query_index(start, batch, queries, keys, window, START_PER_ROW)

    o_query = first + tl.arange(0, BLOCK_M)  # [BM]
    in_sequence = o_query < q_count
    row = (tl.cast(batch, tl.int64) * HEADS + head) * queries + q_begin
    q_rows = head_pointer(q, batch, head, q_begin)
    b_q = load_rows(q_rows, q.row, first, in_sequence, BLOCK_M, BLOCK_D, HEAD_DIM)  # [BM, BLOCK_D]
    scale = scale * LOG2_E

    if CROSS:
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        cross_batch = batch // sharing
        cross_sequence = sequence // sharing
        place = list_first(cross_bounds, c_begin, cross_sequence, cross_keys, BLOCK_N)
        accumulator, top, total = attend(
            accumulator=accumulator,
            top=top,
            total=total,
            q=b_q,
            k=row_source(
                cross_k, cross_batch, head // GROUP, c_begin, c_count, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS
            ),
            v=row_source(
                cross_v, cross_batch, head // GROUP, c_begin, c_count, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS
            ),
            k_stride=cross_k.row,
            v_stride=cross_v.row,
            slots=cross_slots,
            mask=mask_row(cross_slots, cross_batch, c_begin),
            list_start=place,
            first=0,
            full_begin=0,
            full_end=c_count // BLOCK_N,
            last=tl.cdiv(c_count, BLOCK_N),
            sequence=cross_sequence,
            key_begin=0,
            key_end=c_count,
            query=o_query,
            window=window,
            scale=scale,
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
        accumulator, lse = normalise(accumulator, top, total)
        cross_rows = head_pointer(cross_out, batch, head, q_begin)
        store_rows(cross_rows, cross_out.row, first, in_sequence, accumulator, BLOCK_M, BLOCK_D, HEAD_DIM)
        tl.store(cross_lse + row + o_query, lse, mask=in_sequence)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(first + BLOCK_M, q_count)
    begin, full_begin, full_end, end = keys_of_queries(first, last, start, k_count, window, BLOCK_N, CAUSAL, WINDOWED)
    key_begin = start + first - window + 1
    key_end = k_count
    if CAUSAL:
        key_end = tl.minimum(k_count, start + last)
    place = list_first(bounds, k_begin, sequence, keys, BLOCK_N)
    limit = k_count
    if CAUSAL:
        # What lies past the sequence's last query stays unread; a descriptor has at least one row.
        limit = tl.minimum(k_count, tl.maximum(start + q_count, 1))
    accumulator, top, total = attend(
        accumulator=accumulator,
        top=top,
        total=total,
        q=b_q,
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
        scale=scale,
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
    result, lse = normalise(accumulator, top, total)
    tl.store(self_lse + row + o_query, lse, mask=in_sequence)
    if self_out is not None:
        self_rows = head_pointer(self_out, batch, head, q_begin)
        store_rows(self_rows, self_out.row, first, in_sequence, result, BLOCK_M, BLOCK_D, HEAD_DIM)
    if CROSS:
        tl.debug_barrier()  # the threads that read a cross result need not be those that stored it
        b_cross = load_rows(cross_rows, cross_out.row, first, in_sequence, BLOCK_M, BLOCK_D, HEAD_DIM)
        b_gate = load_gate(gate, batch, head, q_begin + o_query, in_sequence, GATE_PER_QUERY)
        if GATE_PER_QUERY:
            b_gate = b_gate[:, None]
        result += b_gate * b_cross.to(tl.float32)
    out_rows = head_pointer(out, batch, head, q_begin)
    store_rows(out_rows, out.row, first, in_sequence, result, BLOCK_M, BLOCK_D, HEAD_DIM)


def forward(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    key_mask,
    cross_mask,
    query_start,
    cu_seqlens,
    cross_cu_seqlens,
    causal,
    scale,
    window,
    softcap,
    save_self=True,
):
    """-> out, self_out, cross_out (un-gated) and both log-sum-exps (B, Hq, S) fp32 in base 2.

    self_out and cross_out are for the backward, like q; empty where T = 0, where out is the self term, and self_out also
    without save_self.
    """
    batch, heads, queries, _ = q.shape
    crossing = cross_k.shape[2] > 0
    q, k, v, cross_k, cross_v = (unit_stride(x) for x in (q, k, v, cross_k, cross_v))
    out = torch.empty_like(q)
    cross_out = torch.empty_like(q) if crossing else q.new_empty(0)
    self_out = torch.empty_like(q) if crossing and save_self else q.new_empty(0)
    self_lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cross_lse = q.new_empty(q.shape[:3], dtype=torch.float32) if crossing else torch.full_like(self_lse, -torch.inf)
    if q.numel() == 0:
        return out, self_out, cross_out, self_lse, cross_lse
    arguments, constants = geometry(
        q, k, cross_k, query_start, cu_seqlens, cross_cu_seqlens, causal, scale, window, softcap
    )
    sequences = arguments[2]

    def run(config):
        launch(
            forward_kernel,
            (tile_count(queries, cu_seqlens, config.block_m) * heads * batch,),
            config,
            *(rows(x) for x in (q, k, v, cross_k, cross_v)),
            gate_rows(gate, q),
            rows(out),
            *(rows(x) if x.numel() else None for x in (self_out, cross_out)),
            self_lse,
            cross_lse,
            used_slots(key_mask, cu_seqlens, sequences, config.block_n),
            used_slots(cross_mask, cross_cu_seqlens, sequences, config.block_n) if crossing else None,
            *arguments,
            batch // cross_k.shape[0],
            **constants,
            CROSS=crossing,
            EVEN_CROSS=cu_seqlens is None and cross_k.shape[2] % config.block_n == 0,
            GATE_PER_QUERY=gate.dim() == 3,
            DESCRIPTORS=config.descriptors,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )

    plain = is_plain((k, v, cross_k, cross_v), key_mask, cross_mask, cu_seqlens, constants)
    start("forward", run, q, k, cross_k, cu_seqlens, constants, plain)
    return out, self_out, cross_out, self_lse, cross_lse
