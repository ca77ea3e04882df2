"""Attention of a few queries without gradients: one program for each batch row and key head reads its keys once.

Every chunk of keys, counted from key 0 or a span's begin, has a softmax of its own, and chunks merge in their order. A program does
both; where programs are too few for the GPU, several share the chunks of a key head and a second launch merges: the same numbers in the
same order, so that neither the batch nor the number of splits changes a bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import LaunchConfig, architecture, dot_precision, launch, multiprocessors
from ...plans import fresh, nothing
from ..call import MOST_QUERIES, Call
from .arguments import (
    LONGEST_WINDOW,
    Constants,
    block_of_width,
    contiguous,
    empty_like,
    gate_rows,
    is_wide,
    mask_and_stride,
    rows,
    unit_stride,
)
from .chunks import BESIDE_VALUES, ChunkTerm, attend_chunk, merge, nothing_attended, unit_after
from .decode_rows import (
    DecodeMasks,
    DecodeOutputs,
    cross_span,
    load_partial,
    mask_row,
    partial_rows,
    row_pointers,
    self_span,
    store_partial,
    tile_of_rows,
    write_rows,
)
from .launch_table import combine_config, decode_config
from .rows import head_pointer
from .scores import LOG2_E
from .terms import Inputs

_UNSPLIT_CHUNKS = 4  # a program reads so many in about the time that a second launch takes

# What changes from one step to the next, strides of masks among it: nothing here may compile another kernel.
_CHANGING = ["s_mask", "s_cross_mask", "queries", "keys", "cross_keys", "start", "s_start", "window", "scale"]
_CHANGING += ["softcap", "sharing", "chunks", "splits"]


@triton.jit
def attend_chunks(
    b_q, k, v, span, batch, pages, s_pages, tile, window, partials, first, last, place, scale, softcap, chunks, splits,
    C: tl.constexpr, CROSS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The Attended of chunks first .. last of a KeySpan, merged in order; where there are splits, stores each chunk's instead.

    batch: row of k and v, or of `pages`, their block table; place: where the partial result of chunk 0 of the span belongs.
    """
    rest = unit_after(scale, C.CAPPED and not CROSS, EXACT=b_q.dtype == tl.float32)
    page = batch
    if pages is not None:
        page = 0
    term = ChunkTerm(
        head_pointer(k, page, tile.kv_head, span.origin),
        head_pointer(v, page, tile.kv_head, span.origin),
        k.row,
        v.row,
        k.batch,
        v.batch,
        mask_row(pages, s_pages, batch, 0),
        span.p_mask,
        span.begin,
        span.end,
        span.start + tile.o_query,
        window,
    )
    attended = nothing_attended(C)
    for index in range(first, last):
        chunk = attend_chunk(b_q, term, span.begin // C.BLOCK_N + index, scale, softcap, C, CROSS, MASKED)
        # Not a compile-time choice: a growing cache must not compile a second kernel, nor split chunks round otherwise.
        if splits == 1:
            attended = merge(attended, chunk, rest)
        else:
            store_partial(partial_rows(partials, tile, place + index, chunks, C), tile, chunk, C)
    return attended


@triton.jit(do_not_specialize=_CHANGING)
def decode_kernel(
    inputs, outputs, masks, s_mask, s_cross_mask, queries, keys, cross_keys, start, s_start, window, scale, softcap,
    sharing, chunks, splits, C: tl.constexpr
):  # fmt: skip
    """Rows of one key head over all its chunks, or over the share of one split: shapes as in `adaptive_fusion_attention`, or
    as in `adaptive_fusion_decode_paged`, where a batch stride of keys is that of pages.

    s_mask, s_cross_mask: row strides of masks or of block tables; sharing: batch rows that read one row of cross keys;
    chunks: that there is room for in `partials`, a head.
    """
    tile = tile_of_rows(queries, C)
    cross_batch = tile.batch // sharing
    own = self_span(masks, s_mask, tile.batch, queries, keys, start, s_start, window, C)
    cross = cross_span(masks, s_cross_mask, cross_batch, cross_keys, C)
    share = tl.cdiv(cross.chunks + own.chunks, splits)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, cross.chunks + own.chunks)

    m_inside = tile.m_row[None, :] & (tl.arange(0, C.BLOCK_D)[:, None] < C.HEAD_DIM)
    # [BLOCK_D, BM]
    b_q = tl.load(row_pointers(inputs.q, tile, C), mask=m_inside, other=0.0)
    scale = scale * LOG2_E
    cross_attended = None
    if C.CROSS:
        cross_attended = attend_chunks(
            b_q, inputs.cross_k, inputs.cross_v, cross, cross_batch, masks.cross_pages, s_cross_mask, tile, window, outputs.partials,
            first, tl.minimum(last, cross.chunks), 0, scale, softcap, chunks, splits, C, CROSS=True,
            MASKED=masks.cross_mask is not None,
        )  # fmt: skip
    attended = attend_chunks(
        b_q, inputs.k, inputs.v, own, tile.batch, masks.pages, s_mask, tile, window, outputs.partials,
        tl.maximum(first - cross.chunks, 0), last - cross.chunks, cross.chunks, scale, softcap, chunks, splits, C, CROSS=False,
        MASKED=masks.self_mask is not None,
    )  # fmt: skip
    if splits == 1:
        write_rows(
            outputs,
            inputs.gate,
            inputs.sink,
            tile,
            queries,
            attended,
            cross_attended,
            scale,
            C,
            EXACT=b_q.dtype == tl.float32,
        )


@triton.jit
def merge_partials(partials, tile, first, last, chunks, rest, CHUNKS: tl.constexpr, C: tl.constexpr):
    """The Attended of the stored chunks first .. last."""
    attended = nothing_attended(C)
    for begin in range(first, last, CHUNKS):
        for step in tl.static_range(CHUNKS):  # loads that do not wait for each other
            place = begin + step
            # Past the last chunk one that holds nothing.
            m_there = tile.m_row & (tl.zeros_like(tile.o_row) + place < last)
            p_partial = partial_rows(partials, tile, place, chunks, C)
            attended = merge(attended, load_partial(p_partial, tile, m_there, C), rest)
    return attended


@triton.jit(do_not_specialize=_CHANGING[:-1])
def combine_kernel(
    gate, sink, outputs, masks, s_mask, s_cross_mask, queries, keys, cross_keys, start, s_start, window, scale, softcap,
    sharing, chunks, C: tl.constexpr
):  # fmt: skip
    """A few rows of one key head: what their chunks left, merged in the order of chunks."""
    tile = tile_of_rows(queries, C)
    own = self_span(masks, s_mask, tile.batch, queries, keys, start, s_start, window, C)
    cross = cross_span(masks, s_cross_mask, tile.batch // sharing, cross_keys, C)
    scale = scale * LOG2_E
    cross_attended = None
    if C.CROSS:
        rest = unit_after(scale, False, C.EXACT)
        cross_attended = merge_partials(outputs.partials, tile, 0, cross.chunks, chunks, rest, C.CHUNKS, C)
    last = cross.chunks + own.chunks
    rest = unit_after(scale, C.CAPPED, C.EXACT)
    attended = merge_partials(outputs.partials, tile, cross.chunks, last, chunks, rest, C.CHUNKS, C)
    write_rows(outputs, gate, sink, tile, queries, attended, cross_attended, scale, C, C.EXACT)


class Decoded(NamedTuple):
    """out (B, Hq, S, D) and, where wanted, both log-sum-exps (B, Hq, S) fp32; out None of pages whose caller brings one."""

    out: Tensor | None
    self_lse: Tensor | None
    cross_lse: Tensor | None


def decodes(q: Tensor) -> bool:
    """Whether `decode` takes these queries: there are few, and the launch table has a line for them."""
    call = dict(architecture=architecture(q.device), dtype=q.dtype, head_dim=q.shape[3], rows=1)
    return 1 <= q.shape[2] <= MOST_QUERIES and 0 not in q.shape[:2] and decode_config(**call) is not None


def decode(call: Call, return_lse: bool) -> Decoded:
    """The results of a call of at least one query and one batch row, whose scale is given."""
    q, k, v, cross_k, cross_v = (unit_stride(x) for x in call[:5])
    keys, cross_keys = k.shape[2], cross_k.shape[2]
    crossing = cross_keys > 0
    results = empty_results(q, return_lse, crossing)
    config = config_of(q, k.shape[1])
    mask, s_mask = mask_and_stride(call.key_mask)
    cross_mask, s_cross_mask = mask_and_stride(call.cross_mask if crossing else None)
    spans = map(contiguous, (call.key_span, call.cross_span if crossing else None))
    attend_in_chunks(
        config,
        Inputs(*map(rows, (q, k, v, cross_k, cross_v)), gate_rows(call.gate, q), contiguous(call.sink)),
        results,
        DecodeMasks(mask, cross_mask, *spans),
        Lengths(s_mask, s_cross_mask, q.shape[2], keys, cross_keys),
        _place(call, config.block_n),
        (call.scale, call.softcap, q.shape[0] // cross_k.shape[0]),
        GROUP=q.shape[1] // k.shape[1],
        WIDE=is_wide((k, v, cross_k, cross_v), config.block_n),
        CAUSAL=call.causal,
    )
    return results


def config_of(q: Tensor, kv_heads: int) -> LaunchConfig:
    """The launch table's line for queries that `decodes` takes."""
    count = q.shape[1] // kv_heads * q.shape[2]
    return decode_config(architecture=architecture(q.device), dtype=q.dtype, head_dim=q.shape[3], rows=count)


def empty_results(q: Tensor, return_lse: bool, crossing: bool, out: Tensor | None = None) -> Decoded:
    """Room for the results; out: where there is some."""
    self_lse = cross_lse = None
    if return_lse:
        self_lse = fresh(q.new_empty(q.shape[:3], dtype=torch.float32))
        cross_lse = fresh(torch.empty_like(self_lse)) if crossing else torch.full_like(self_lse, -torch.inf)
    return Decoded(fresh(empty_like(q)) if out is None else out, self_lse, cross_lse)


def attend_in_chunks(
    config: LaunchConfig,
    inputs: Inputs,
    results: Decoded,
    masks: DecodeMasks,
    lengths: Lengths,
    place: Place,
    numbers: tuple[float, float | None, int],
    **constants: Any,
) -> None:
    """Launch the kernels of a call.

    numbers: scale, soft cap, and how many batch rows read one row of cross keys; constants: those that follow from nothing else.
    """
    q = inputs.q.pointer
    (batch, heads, queries, width), arch = q.shape, architecture(q.device)
    scale, softcap, sharing = numbers
    chunks = place.chunks + triton.cdiv(lengths.cross_keys, config.block_n)
    compiled_for = Constants(
        HEADS=heads,
        HEAD_DIM=width,
        BLOCK_D=block_of_width(width),
        WINDOWED=place.window is not None,
        CAPPED=softcap is not None,
        CROSS=lengths.cross_keys > 0,
        START_PER_ROW=isinstance(place.start, Tensor),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **constants,
    )
    group = compiled_for.GROUP

    def programs(block):
        return batch * (heads // group) * triton.cdiv(group * queries, block)

    splits = split_count(programs(config.block_m), chunks, q.device)
    partials = nothing(q.device)
    if splits > 1:
        size = batch * heads * queries * chunks * (width + BESIDE_VALUES.value)
        partials = fresh(q.new_empty(size, dtype=torch.float32))
    assert results.out is not None
    outputs = DecodeOutputs(rows(results.out), results.self_lse, results.cross_lse, partials)
    shared = (outputs, masks, *lengths, place.start, place.stride, place.window or 0)
    shared += (scale, softcap or 0.0, sharing, chunks)
    precise = compiled_for._replace(PRECISION=dot_precision(q.dtype, arch))
    launch(decode_kernel, (programs(config.block_m), splits), config, inputs, *shared, splits, C=precise)
    if splits > 1:
        config = combine_config(arch)
        sizes = dict(BLOCK_M=config.block_m, CHUNKS=config.block_k)
        constants_of_sum = compiled_for._replace(EXACT=q.dtype == torch.float32, **sizes)
        launch(
            combine_kernel, (programs(config.block_m),), config, inputs.gate, inputs.sink, *shared, C=constants_of_sum
        )


def split_count(programs: int, chunks: int, device: torch.device) -> int:
    """How many programs share a key head's chunks: 1 unless most of the GPU would be idle."""
    side_by_side = multiprocessors(device)
    if chunks <= _UNSPLIT_CHUNKS or programs >= 0.8 * side_by_side:
        return 1
    return max(1, min(side_by_side // programs, chunks))


class Lengths(NamedTuple):
    """Row strides of masks or of block tables, and how many queries, keys and cross keys there are: of pages, the room for them."""

    s_mask: int
    s_cross_mask: int
    queries: int
    keys: int
    cross_keys: int


class Place(NamedTuple):
    """Where queries stand: the first one's key index, an int or a tensor with its stride, the window or None, and the most
    chunks of their own keys that they see. Nothing here decides what is compiled: the index changes with every token."""

    start: int | Tensor
    stride: int
    window: int | None
    chunks: int


def _place(call, block):
    queries, keys, start, window = call.q.shape[2], call.k.shape[2], call.query_start, call.window
    if not call.causal:
        return Place(0, 0, None, triton.cdiv(keys, block))
    if isinstance(start, Tensor):
        stride = start.stride(0) if start.dim() else 0
        window = None if window is None else min(window, LONGEST_WINDOW)
        return Place(start, stride, window, triton.cdiv(keys, block))
    start = keys - queries if start is None else start
    end, begin = min(start + queries, keys), 0
    if window is not None:
        # Past the last key only the distance to the window counts: both stay within the kernels' 32 bits.
        window = min(max(window - max(start - keys, 0), -LONGEST_WINDOW), LONGEST_WINDOW)
    start = min(start, keys)
    if window is not None:
        begin = min(max(start - window + 1, 0), end)
    # Chunks are counted from a span's begin, which may cut a window's keys into one more.
    more = call.key_span is not None and begin > 0
    return Place(start, 0, window, triton.cdiv(end, block) - begin // block + more)
