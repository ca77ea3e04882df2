"""What one launch of a shipped kernel has to do: how often each of its programs turns each of its loops, and the bytes and operations.

From the launch alone, as it was recorded: its grid, the numbers it was given, and what it was compiled for. Masks count as full and
packed sequences as equally long, since nobody knows them ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turns = tuple[tuple[int, int], ...]  # of each hot loop, in the order of the code: short and long turns


@dataclass(frozen=True, slots=True)
class Work:
    """programs: in the order in which they start, what each turns; tiles: how often a program goes around the loop that holds the hot
    ones, 1 where none does. flops: on tensor cores; moved: bytes that reach memory, as the kernel is built; least: those that no
    kernel can do without. streams: the loops read memory and not the L2 cache. groups: groups of four warps that each go through the
    loops on their own, the first in the code, while another warp copies `copied` bytes a turn for all of them; 0: no such thing.
    """

    programs: Sequence[Turns]
    tiles: Sequence[int] | None
    flops: float
    moved: float
    least: float
    streams: bool = False
    groups: int = 0
    copied: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """grid, {name: number} of its arguments, {name: bytes of one number} of its tensors ("tuple.field"), {name: value} of what it was
    compiled for, bytes of one number of most."""

    grid: tuple[int, ...]
    numbers: Mapping[str, Any]
    tensors: Mapping[str, int]
    constants: Mapping[str, Any]
    itemsize: int

    def __getitem__(self, name: str) -> Any:
        return self.constants[name] if name in self.constants else self.numbers[name]


def _cdiv(a, b):
    return -(-a // b)


def _attention(launch: Launch):
    """Sizes of an attention launch: batch rows (or packed sequences), query and key heads, lengths of each of those."""
    sequences = launch.numbers.get("sequences") or 0
    queries, keys, cross = (launch.numbers[name] for name in ("queries", "keys", "cross_keys"))
    heads, group = launch["HEADS"], launch.constants.get("GROUP", 1)
    if sequences:
        return sequences, heads, heads // group, queries // sequences, keys // sequences, cross // sequences
    return None, heads, heads // group, queries, keys, cross


def _seen(launch, first, end, keys, queries, block):
    """-> short and long turns over the keys that the queries first .. end see."""
    if not launch["CAUSAL"]:
        return keys // block, int(keys % block > 0)
    start = launch.numbers.get("start")
    start = keys - queries if not isinstance(start, int) else start
    last = max(0, min(keys, start + end))
    full = max(0, min(keys, start + first + 1)) // block
    begin = 0
    if launch["WINDOWED"]:
        window = launch.numbers["window"]
        begin = max(start + first - window + 1, 0) // block
        full_begin = _cdiv(max(start + end - window, 0), block)
        full = max(full, full_begin) - full_begin
        return full, max(0, _cdiv(last, block) - begin - full)
    return full, _cdiv(last, block) - full


# As in gpu/order.py: heads of a section start with their longest tiles; together their keys fit the second cache.
_SECTION = 32 * 2**20


def _in_order(launch, by_tile, heads, rows, sharing):
    """What programs turn, in the order in which they start: by_tile, of a head's tiles in their order, for all heads, sections of them
    at a time. rows: that a head's programs read; sharing: neighbours that read the same."""
    section = max(_SECTION // (launch["BLOCK_D"] * 4) // max(rows, 1), 1)
    section = min(section, heads) * sharing
    counts = [min(section, heads - first) for first in range(0, heads, section)]
    return [turns for count in counts for turns in by_tile for _ in range(count)]


def _query_programs(launch: Launch) -> tuple[list[Turns], int]:
    """Of kernels whose programs are tiles of queries: the last tiles first, of all heads. -> and batch rows"""
    rows, heads, _, queries, keys, cross = _attention(launch)
    packed = rows is not None
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    tiles = _cdiv(queries, block_m)
    rows = rows or launch.grid[0] // (tiles * heads)
    crossing = ((cross // block_n, int(cross % block_n > 0)),) if launch["CROSS"] else ()
    head = []
    for tile in range(tiles):
        own = _seen(launch, tile * block_m, min((tile + 1) * block_m, queries), keys, queries, block_n)
        head.append((*crossing, own))
    if packed:  # one sequence after the other
        return head * (rows * heads), rows
    return _in_order(launch, head[::-1], heads * rows, keys + cross, launch["GROUP"]), rows


def _pairs(launch, rows):
    """Pairs of a query and a key that it sees, all heads: what no kernel can leave out."""
    _, heads, _, queries, keys, cross = _attention(launch)
    own = queries * keys - (queries * (queries - 1) // 2 if launch["CAUSAL"] else 0)
    if launch["WINDOWED"]:
        window = min(launch.numbers["window"], keys)
        own = min(own, queries * window)
    crossing = queries * cross if launch["CROSS"] or launch.numbers.get("cross_keys") else 0
    return rows * heads * (own + crossing)


def _sizes(launch, rows):
    """-> bytes of q and of keys and values, of both terms."""
    _, heads, kv_heads, queries, keys, cross = _attention(launch)
    width = launch["HEAD_DIM"] * launch.itemsize
    return rows * heads * queries * width, 2 * rows * kv_heads * (keys + cross) * width


def _forward(launch: Launch) -> Work:
    programs, rows = _query_programs(launch)
    q_bytes, key_bytes = _sizes(launch, rows)
    # Un-gated terms are written where the backward will want them; the cross one is read back, which the L2 cache serves.
    kept = sum(name in launch.tensors for name in ("outputs.cross_out", "outputs.self_out"))
    flops = 4 * launch["HEAD_DIM"] * _pairs(launch, rows)
    return Work(programs, None, flops, (2 + kept) * q_bytes + key_bytes, 2 * q_bytes + key_bytes)


def _hopper_forward(launch: Launch) -> Work:
    """The warp-specialised forward: the first tile of a term is attended to before its loops; the last queries of all heads first."""
    rows, heads, _, queries, keys, cross = _attention(launch)
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    tiles = _cdiv(queries, block_m)
    rows = launch.grid[0] // (tiles * heads)
    crossing: list[tuple[int, int]] = []
    if launch["CROSS"]:
        full = max(0, cross // block_n - 1)
        crossing = [(full, 0), (_cdiv(cross, block_n) - 1 - full, 0)][: 1 if launch["EVEN_CROSS"] else 2]
    programs = []
    for tile in reversed(range(tiles)):
        full, partial = _seen(launch, tile * block_m, min((tile + 1) * block_m, queries), keys, queries, block_n)
        before = [(0, 0)] if launch["WINDOWED"] else []  # partial tiles that come first are counted among the last
        first = min(full, 1)
        programs += [(*crossing, *before, (full - first, 0), (partial - 1 + first, 0))] * (rows * heads)
    q_bytes, key_bytes = _sizes(launch, rows)
    kept = sum(name in launch.tensors for name in ("outputs.cross_out", "outputs.self_out"))
    least = 2 * q_bytes + key_bytes
    flops = 4 * launch["HEAD_DIM"] * _pairs(launch, rows)
    copied = 2 * block_n * launch["HEAD_DIM"] * launch.itemsize
    return Work(programs, None, flops, least + kept * q_bytes, least, groups=block_m // 64, copied=copied)


def _query_gradients(launch: Launch) -> Work:
    programs, rows = _query_programs(launch)
    q_bytes, key_bytes = _sizes(launch, rows)
    least = 3 * q_bytes + key_bytes
    return Work(programs, None, 6 * launch["HEAD_DIM"] * _pairs(launch, rows), least, least)


def _key_value_gradients(launch: Launch) -> Work:
    """Of each tile of keys one loop over the tiles of queries of all heads that share them; cross tiles are the first."""
    rows, _, kv_heads, queries, keys, cross = _attention(launch)
    sequences = rows or 1
    group, block_m, block_n = launch["GROUP"], launch["BLOCK_M"], launch["BLOCK_N"]
    self_tiles, cross_tiles = _cdiv(keys, block_n), _cdiv(cross, block_n)
    rows = rows or launch.grid[0] // ((self_tiles + cross_tiles) * kv_heads)
    whole = _cdiv(queries, block_m) * group
    nothing = (0, 0)
    head: list[Turns] = [((whole, 0), nothing) for _ in range(cross_tiles * sequences)]
    start = keys - queries
    own: list[Turns] = []
    for tile in range(self_tiles):
        begin, full = 0, 0
        if launch["CAUSAL"]:
            first, end = tile * block_n, min((tile + 1) * block_n, keys)
            begin = min(max(first - start, 0) // block_m, _cdiv(queries, block_m))
            full = min(_cdiv(max(end - 1 - start, 0), block_m), _cdiv(queries, block_m))
        own.append((nothing, ((_cdiv(queries, block_m) - full) * group, (full - begin) * group)))
    heads = kv_heads * rows // sequences
    programs = _in_order(launch, head + own * sequences, heads, group * queries * sequences, 1)
    q_bytes, key_bytes = _sizes(launch, rows)
    least = 2 * q_bytes + 2 * key_bytes
    return Work(programs, None, 8 * launch["HEAD_DIM"] * _pairs(launch, rows), least, least)


def _hopper_key_value_gradients(launch: Launch) -> Work:
    """The warp-specialised one: one loop for both terms, each of its groups on 64 keys; the first tiles of all heads first."""
    _, _, kv_heads, queries, keys, cross = _attention(launch)
    group, block_m, block_n = launch["GROUP"], launch["BLOCK_M"], launch["BLOCK_N"]
    crossing, own = (_cdiv(count, block_n) * launch[term] for count, term in ((cross, "CROSS"), (keys, "SELF")))
    rows = launch.grid[0] // ((crossing + own) * kv_heads)
    tiles, start = _cdiv(queries, block_m), keys - queries
    turns = [(tiles * group, 0)] * crossing
    for tile in range(own):
        begin, full = 0, 0
        if launch["CAUSAL"]:
            begin = min(max(tile * block_n - start, 0) // block_m, tiles)
            full = min(_cdiv(max((tile + 1) * block_n - 1 - start, 0), block_m), tiles)
        turns.append(((tiles - full) * group, (full - begin) * group))
    programs = [(x,) for x in turns for _ in range(kv_heads * rows)]
    q_bytes, key_bytes = _sizes(launch, rows)
    least = 2 * q_bytes + 2 * key_bytes
    copied = 2 * block_m * launch["HEAD_DIM"] * launch.itemsize
    flops = 8 * launch["HEAD_DIM"] * _pairs(launch, rows)
    return Work(programs, None, flops, least, least, groups=block_n // 64, copied=copied)


def _hopper_query_gradients(launch: Launch) -> Work:
    """The warp-specialised one: a loop over cross tiles and one over own tiles, the last queries of all heads first."""
    rows, heads, _, queries, keys, cross = _attention(launch)
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    tiles = _cdiv(queries, block_m)
    rows = launch.grid[0] // (tiles * heads)
    crossing = [(cross // block_n, int(cross % block_n > 0))] if launch["CROSS"] else []
    programs = []
    for tile in reversed(range(tiles)):
        own = _seen(launch, tile * block_m, min((tile + 1) * block_m, queries), keys, queries, block_n)
        programs += [(*crossing, own)] * (rows * heads)
    q_bytes, key_bytes = _sizes(launch, rows)
    least = 3 * q_bytes + key_bytes
    copied = 2 * block_n * launch["HEAD_DIM"] * launch.itemsize
    flops = 6 * launch["HEAD_DIM"] * _pairs(launch, rows)
    return Work(programs, None, flops, least, least, groups=block_m // 64, copied=copied)


def _row_sums(launch: Launch) -> Work:
    count = launch.grid[0]
    rows = count * launch["BLOCK_M"]
    moved = rows * (3 * launch["HEAD_DIM"] * launch.itemsize + 8)
    return Work([()] * count, None, 0, moved, moved, streams=True)


def _decode(launch: Launch) -> Work:
    _, heads, kv_heads, queries, keys, cross = _attention(launch)
    block_m, block_n = launch["BLOCK_M"], launch["BLOCK_N"]
    tiles = _cdiv(launch["GROUP"] * queries, block_m)
    rows, splits = launch.grid[0] // (kv_heads * tiles), launch.grid[1]
    chunks = _cdiv(cross, block_n) + _cdiv(keys, block_n)
    share = _cdiv(chunks, splits)
    crossing = _cdiv(cross, block_n)
    programs = []
    for split in range(splits):
        begin, end = split * share, min((split + 1) * share, chunks)
        over_cross = max(0, min(end, crossing) - begin)
        own = max(0, end - max(begin, crossing))
        programs += [((over_cross, 0), (own, 0))] * launch.grid[0]
    q_bytes, key_bytes = _sizes(launch, rows)
    moved = 2 * q_bytes + key_bytes + (rows * heads * queries * chunks * 4 * launch["HEAD_DIM"] if splits > 1 else 0)
    return Work(
        programs, None, 4 * launch["HEAD_DIM"] * _pairs(launch, rows), moved, 2 * q_bytes + key_bytes, streams=True
    )


def _matmul(launch: Launch) -> Work:
    m, n, k, groups = (launch[name] for name in ("M", "N", "K", "groups"))
    tiles = groups * _cdiv(m, launch["BLOCK_M"]) * _cdiv(n, launch["BLOCK_N"])
    each = [tiles // launch.grid[0] + (place < tiles % launch.grid[0]) for place in range(launch.grid[0])]
    turns = _cdiv(k, launch["BLOCK_K"])
    moved = groups * (m * k + k * n + m * n) * launch.itemsize
    return Work([((count * turns, 0),) for count in each], each, 2 * groups * m * n * k, moved, moved)


def _summed_matmul(launch: Launch) -> Work:
    m, n, k, groups = (launch[name] for name in ("M", "N", "K", "groups"))
    tiles, parts = launch.grid[:2]
    turns = groups * _cdiv(k, launch["BLOCK_K"]) / parts
    least = groups * (m * k + k * n) * launch.itemsize + 4 * m * n
    moved = least + parts * m * n * 4
    return Work([((_cdiv(turns, 1), 0),)] * (tiles * parts), None, 2 * groups * m * n * k, moved, least)


def _mix(products: int):
    """Of the kernels that read all states and all streams once. products: with the weight or of its size; one more where they also
    write gradients of the states."""

    def work(launch: Launch) -> Work:
        size, streams, tiles, each = (launch[name] for name in ("X", "J", "tiles", "tiles_each"))
        states, stacked = launch["LAYERS"], _cdiv(streams, launch["BLOCK_M"])
        moved = size * (states + streams) * launch.itemsize
        written = launch.tensors.get("grad_states")
        multiplied = products
        if written is not None:
            moved += size * states * written
            multiplied += 1
        programs = [((min(each, tiles - place * each), 0),) for place in range(_cdiv(tiles, each))]
        if len(launch.grid) == 2 and launch.grid[0] > 1:
            programs = [x for x in programs for _ in range(launch.grid[0])]
        elif launch.constants.get("ONE_STREAM_TILE") is False:
            programs = [((turns[0][0] * stacked, 0),) for turns in programs]
        return Work(programs, None, 2.0 * multiplied * size * streams * states, moved, moved, streams=True)

    return work


_KERNELS: dict[str, Callable[[Launch], Work]] = {
    "forward_kernel": _forward,
    "hopper_forward_kernel": _hopper_forward,
    "query_gradients_kernel": _query_gradients,
    "key_value_gradients_kernel": _key_value_gradients,
    "hopper_key_value_gradients_kernel": _hopper_key_value_gradients,
    "hopper_query_gradients_kernel": _hopper_query_gradients,
    "row_sums_kernel": _row_sums,
    "decode_kernel": _decode,
    "matmul_kernel": _matmul,
    "summed_matmul_kernel": _summed_matmul,
    "mix_kernel": _mix(1),
    "mix_weight_gradients_kernel": _mix(2),
    "mix_state_gradients_kernel": _mix(1),
}


def work(kernel: str, launch: Launch) -> Work | None:
    """The Work of a launch; None for a kernel that nobody described, such as one that lists tiles, or attention whose products loop
    over columns (BLOCK_K)."""
    describe = _KERNELS.get(kernel)
    by_columns = "GROUP" in launch.constants and launch.constants.get("BLOCK_K")
    return None if describe is None or by_columns else describe(launch)
