"""What the forward and backward kernels share: where a tile lies, which tiles a tile sees, how a tile is read."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_pointer(x, batch, head, first_row):
    """Pointer to row `first_row` of one head. 64 bits: a long batch of many heads passes 2^31 elements."""
    return (
        x.pointer
        + tl.cast(batch, tl.int64) * x.batch
        + tl.cast(head, tl.int64) * x.head
        + tl.cast(first_row, tl.int64) * x.row
    )


@triton.jit
def load_rows(pointer, stride, first, used, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows first .. first + BLOCK as [BLOCK, BLOCK_D], zero where not `used` ([BLOCK] bool, None = all are) and past HEAD_DIM."""
    pointers = row_pointers(pointer, stride, first, BLOCK, BLOCK_D)
    inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if used is not None and HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=used[:, None] & inside, other=0.0)
    elif used is not None:
        tile = tl.load(pointers, mask=used[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def row_source(
    x,
    batch,
    head,
    first,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows first .. first + rows of one head, for `read_rows`: a tensor descriptor, which ends where they end, or a pointer."""
    source = head_pointer(x, batch, head, first)
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(
            source, shape=[rows, HEAD_DIM], strides=[x.row, 1], block_shape=[BLOCK, BLOCK_D]
        )
    return source


@triton.jit
def read_rows(
    source,
    stride,
    first,
    used,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """`load_rows` from a `row_source`; a descriptor gives zeros past its rows and does not look at `used`."""
    if DESCRIPTORS:
        tile = source.load([first, 0])
    else:
        tile = load_rows(source, stride, first, used, BLOCK, BLOCK_D, HEAD_DIM)
    return tile


@triton.jit
def store_rows(pointer, stride, first, used, tile, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write the `used` rows of tile [BLOCK, BLOCK_D], rounded to the pointer's dtype."""
    pointers = row_pointers(pointer, stride, first, BLOCK, BLOCK_D)
    inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=used[:, None] & inside)


@triton.jit
def load_gate(gate, batch, head, o_row, used, GATE_PER_QUERY: tl.constexpr):
    """The gate of one head's rows in fp32: [BM], or a scalar where it is the same for all queries."""
    pointer = head_pointer(gate, batch, head, 0)
    if GATE_PER_QUERY:
        value = tl.load(pointer + o_row * gate.row, mask=used, other=0.0)
    else:
        value = tl.load(pointer)
    return value.to(tl.float32)


@triton.jit
def load_lse(lse, o_row, used):
    """Log-sum-exps [BM] for the backward: +inf, which makes every weight 0, for a row that saw nothing."""
    value = tl.load(lse + o_row, mask=used, other=float("inf"))
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def row_pointers(pointer, stride, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    pointer += tl.cast(first, tl.int64) * stride
    return pointer + (tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def packed_tile(bounds, sequences, tile, BLOCK: tl.constexpr):
    """-> the packed sequence that tile number `tile` belongs to, and the tile's number within it, maybe past its end.

    Sequence i owns the numbers from bounds[i] // BLOCK + i on: at least as many as it has tiles, known without a sum
    over the sequences before it.
    """
    owner = -1
    for first in range(0, sequences, 256):
        o_sequence = first + tl.arange(0, 256)
        begin = tl.load(bounds + o_sequence, mask=o_sequence < sequences, other=0)
        reached = (begin // BLOCK + o_sequence <= tile) & (o_sequence < sequences)
        owner += tl.sum(reached.to(tl.int32), 0)
    return owner, tile - tl.load(bounds + owner) // BLOCK - owner


@triton.jit
def sequence_span(bounds, sequence, length):
    """-> first position and length of a packed sequence; without packing every batch row spans 0 .. length."""
    begin = 0
    if bounds is not None:
        begin = tl.load(bounds + sequence)
        length = tl.load(bounds + sequence + 1) - begin
    return begin, length


@triton.jit
def query_tile(bounds, sequences, queries, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> batch row, head, sequence and tile of queries of this program, the tile maybe past the sequence's end."""
    program = tl.program_id(0)
    if bounds is None:
        tiles = tl.cdiv(queries, BLOCK_M)
        batch = program // (tiles * HEADS)
        sequence = batch
        tile = tiles - 1 - program % tiles  # under a causal mask the last queries see most: longest first
    else:
        tiles = queries // BLOCK_M + sequences
        batch = 0
        sequence, tile = packed_tile(bounds, sequences, program % tiles, BLOCK_M)
    return batch, program // tiles % HEADS, sequence, tile


@triton.jit
def first_query_index(start, batch, queries, keys, window, START_PER_ROW: tl.constexpr):
    """Key index of a sequence's first query, kept within what can matter so that sums with it stay in 32 bits."""
    if START_PER_ROW:
        index = tl.load(start + batch).to(tl.int64)
        start = tl.minimum(tl.maximum(index, -queries), keys + window).to(tl.int32)
    return start


@triton.jit
def keys_of_queries(
    first, end, start, keys, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Key tiles that the queries first .. end see -> begin, full_begin, full_end, end.

    All of these queries see all keys of the tiles full_begin .. full_end; the tiles around them need a mask.
    """
    seen = keys
    seen_by_all = keys
    if CAUSAL:
        seen = tl.minimum(keys, tl.maximum(start + end, 0))
        seen_by_all = tl.minimum(keys, tl.maximum(start + first + 1, 0))
    tile_end = tl.cdiv(seen, BLOCK_N)
    full_end = seen_by_all // BLOCK_N
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = tl.minimum(tl.maximum(start + first - window + 1, 0) // BLOCK_N, tile_end)
        full_begin = tl.cdiv(tl.maximum(start + end - window, 0), BLOCK_N)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), tile_end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), tile_end)
    return begin, full_begin, full_end, tile_end


@triton.jit
def queries_of_keys(
    first, end, start, queries, window, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """Query tiles that see the keys first .. end -> begin, full_begin, full_end, end, as in `keys_of_queries`."""
    tile_end = tl.cdiv(queries, BLOCK_M)
    full_end = tile_end
    begin = 0
    full_begin = 0
    if CAUSAL:
        begin = tl.where(first - start < queries, tl.maximum(first - start, 0) // BLOCK_M, tile_end)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(end - 1 - start, 0), BLOCK_M), tile_end)
    if WINDOWED:
        tile_end = tl.minimum(tl.cdiv(tl.maximum(end - 1 - start + window, 0), BLOCK_M), tile_end)
        tile_end = tl.maximum(tile_end, begin)
        full_begin = tl.minimum(full_begin, tile_end)
        full_end = tl.minimum(tl.maximum(tl.maximum(first - start + window, 0) // BLOCK_M, full_begin), tile_end)
    return begin, full_begin, full_end, tile_end


@triton.jit
def band_visible(query, key, window, WINDOWED: tl.constexpr):
    """Causal (and windowed) visibility of key indices to query indices, which broadcast against each other."""
    visible = key <= query
    if WINDOWED:
        visible = visible & (query - key < window)
    return visible


@triton.jit
def listed_span(slots, list_start, sequence, begin, end):
    """Places in the list of used tiles that hold tiles begin .. end; without a list, a tile's place is its number."""
    if slots is not None:
        ranks = slots.ranks + list_start + sequence
        begin = tl.load(ranks + begin)
        end = tl.load(ranks + end)
    return begin, end


@triton.jit
def list_first(bounds, begin, sequence, length, BLOCK_N: tl.constexpr):
    """Where a sequence's list of used tiles starts."""
    if bounds is None:
        place = sequence * tl.cdiv(length, BLOCK_N)
    else:
        place = begin // BLOCK_N + sequence
    return place


@triton.jit
def tile_at(slots, list_start, place):
    """Number of the tile at one place of the list of used tiles."""
    if slots is not None:
        place = tl.load(slots.tiles + list_start + place)
    return place


@triton.jit
def used_keys(slots, mask, key, key_begin, key_end, WINDOWED: tl.constexpr):
    """Which of the keys [BN] the mask allows and lie where some query of the tile sees: key_begin .. key_end."""
    if slots is not None:
        used = tl.load(mask + key, mask=key < key_end, other=0) != 0
    else:
        used = key < key_end
    if WINDOWED:
        used = used & (key >= key_begin)
    return used


@triton.jit
def hide_unseen(
    values,  # [BM, BN]
    fill,
    used,  # [BN] or None = all
    query,  # [BM] key indices of the queries
    key,  # [BN]
    window,
    partial,  # whether some query does not see all used keys of this tile
    slots,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """values where a query sees the key, else fill. Position masks are computed in `partial` tiles only.

    A branch on a number that the whole program shares is free; a second loop over the full tiles costs 30 to 40 registers.
    """
    if slots is not None:
        values = tl.where(used[None, :], values, fill)
    if used is not None:
        if partial:
            visible = used[None, :]
            if CAUSAL:
                visible = visible & band_visible(query[:, None], key[None, :], window, WINDOWED)
            values = tl.where(visible, values, fill)
    return values


@triton.jit
def mask_row(slots, batch, begin):
    """Pointer to the mask of a sequence's first slot; without a mask a number that nobody reads."""
    pointer = 0
    if slots is not None:
        pointer = slots.mask + tl.cast(batch, tl.int64) * slots.stride + begin
    return pointer


@triton.jit
def list_used_tiles_kernel(mask, mask_stride, bounds, length, tiles, ranks, BLOCK_N: tl.constexpr):
    """One sequence: the numbers of its tiles in which the mask holds a True, and for each tile how many come before it."""
    sequence = tl.program_id(0)
    begin, count = sequence_span(bounds, sequence, length)
    place = list_first(bounds, begin, sequence, length, BLOCK_N)
    if bounds is None:
        mask += tl.cast(sequence, tl.int64) * mask_stride
    mask += begin
    used_before = 0
    for first in range(0, tl.cdiv(count, BLOCK_N), 32):
        tile = first + tl.arange(0, 32)  # [32]
        slot = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [32, BN]
        attended = tl.load(mask + slot, mask=slot < count, other=0).to(tl.int32)
        used = tl.max(attended, 1)
        rank = used_before + tl.cumsum(used, 0) - used
        tl.store(tiles + place + rank, tile, mask=used > 0)
        tl.store(ranks + place + sequence + tile, rank, mask=tile * BLOCK_N < count)
        used_before += tl.sum(used, 0)
    tl.store(ranks + place + sequence + tl.cdiv(count, BLOCK_N), used_before)


@triton.jit
def softmax_weights(scores, factor, lse, EXACT: tl.constexpr):
    """exp2(scores * factor - lse), lse broadcast against fp32 scores.

    EXACT, for fp32 tensors, subtracts first: the product of a score of 100 is rounded by 1e-5, the difference by nothing.
    Half precision has no use for that, and multiplies and subtracts in one instruction.
    """
    if EXACT:
        weights = tl.exp2((scores - lse / factor) * factor)
    else:
        weights = tl.exp2(scores * factor - lse)
    return weights


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh by exp2, to about 1e-7 absolute; ACCURATE: to a few ulp near 0 too, by its Taylor series."""
    power = tl.exp2(tl.abs(x) * (LOG2_E * -2.0))
    size = (1 - power) / (1 + power)
    if ACCURATE:
        square = x * x
        series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        size = tl.where(square < 0.0625, tl.abs(x) * series, size)
    return tl.where(x < 0, -size, size)
