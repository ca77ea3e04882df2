"""From a Call to the arguments of its kernels."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ... import autotuning
from ...launch import LaunchConfig, architecture, dot_precision, launch
from ...plans import fresh
from .. import gates
from ..call import Call
from .launch_table import launch_candidates, launch_config
from .packing import repaired_bounds
from .rows import Rows
from .terms import Inputs, Masks, UsedTiles, list_used_tiles_kernel

LONGEST_WINDOW = 2**30  # the kernels add it to lengths in 32 bits


class Numbers(NamedTuple):
    """What changes from call to call: no kernel is compiled for a value of these.

    sequences: packed ones, 0 without packing; start: key index of the first query, or a tensor of one for each batch row.
    """

    sequences: int
    queries: int
    keys: int
    cross_keys: int
    start: int | Tensor
    window: int
    scale: float
    softcap: float


NUMBERS = list(Numbers._fields)


class Constants(NamedTuple):
    """What a kernel is compiled for; what a kernel does not look at keeps its default, so that it compiles once."""

    HEADS: int
    HEAD_DIM: int
    BLOCK_D: int  # a power of two from 16 on
    GROUP: int = 1  # query heads that share a key head
    CAUSAL: bool = False
    WINDOWED: bool = False
    CAPPED: bool = False
    CROSS: bool = False  # there are cross keys
    EVEN_CROSS: bool = False  # and they are whole tiles
    GATE_PER_QUERY: bool = False
    START_PER_ROW: bool = False
    DESCRIPTORS: bool = False
    AHEAD: bool = False
    PRECISION: str = "ieee"
    EXACT: bool = False  # fp32 tensors, where the kernel reads none
    WIDE: bool = False  # a tile's rows lie 2^31 elements apart and more: see `is_wide`
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0  # head width that a product of scores takes at a time, 0: all of it
    CHUNKS: int = 0  # partial results of decoding read at a time
    PAGE: int = 0  # keys of a page of decoding's own keys, 0 where they lie end to end
    CROSS_PAGE: int = 0


# What a tuned configuration depends on besides sizes.
_TUNED_BY = ("GROUP", "CAUSAL", "WINDOWED", "CAPPED")


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def rows_or_none(x: Tensor | None) -> Rows | None:
    return None if x is None else rows(x)


def gate_rows(gate: Tensor, q: Tensor) -> Rows:
    """The gate as (B, Hq, S) Rows."""
    return rows(gates.spread(gate, q))._replace(pointer=gate)


def unit_stride(x: Tensor) -> Tensor:
    """x itself, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """A sink or spans, as the kernels read them."""
    return None if x is None else x.contiguous()


def is_wide(tensors: Iterable[Tensor], block: int, gate: Tensor | None = None) -> bool:
    """Whether 32 bits are too few for the elements from the first to the last row of a tile of `block` rows of (B, H, S, D)
    tensors, or from the first to the last of a head's gates (B, H, S)."""
    longest = block * max(x.stride(2) for x in tensors)
    if gate is not None:
        longest = max(longest, (gate.shape[2] + block) * gate.stride(2))
    return longest >= 2**31


def mask_and_stride(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A mask with unit last stride, and its other stride."""
    if mask is None:
        return None, 0
    mask = unit_stride(mask)
    return mask, mask.stride(0)


def empty_like(x: Tensor) -> Tensor:
    """As x, with a contiguous last dimension: the kernels write in the order of memory."""
    return torch.empty_like(unit_stride(x))


def block_of_width(width: int) -> int:
    """BLOCK_D of a head dim."""
    return max(16, triton.next_power_of_2(width))


class Prepared:
    """A call as the forward and the gradient kernels take it: tensors (q, k, v, cross_k, cross_v) with unit strides, numbers,
    bounds of packed sequences, whether there are cross keys, and the lists of used tiles of both masks, if they were made."""

    def __init__(self, call: Call, lists: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        self.call = call
        self.lists: tuple[Tensor | None, ...] = lists
        self.tensors = [unit_stride(x) for x in call[:5]]
        self.q = self.tensors[0]
        self.crossing = call.cross_k.shape[2] > 0
        self.bounds = repaired_bounds(call)  # (q's, cross keys')
        cross_span = call.cross_span if self.crossing else None
        self.spans = (contiguous(call.key_span), contiguous(cross_span))
        self.numbers, self.windowed = _numbers(call)

    @cached_property
    def gate(self) -> Tensor:
        """(B, Hq, S) by strides."""
        return gates.spread(self.call.gate, self.q)

    @cached_property
    def inputs(self) -> Inputs:
        return Inputs(*map(rows, self.tensors), gate_rows(self.call.gate, self.q), contiguous(self.call.sink))

    def query_tiles(self, block: int) -> int:
        """Programs per head that work on `block` queries each: whole tiles of every sequence."""
        return tile_count(self.numbers.queries, self.bounds[0], block)

    def masks(self, block: int) -> Masks:
        """The Masks of kernels that walk over tiles of `block` keys; the lists of tiles stay in self.lists."""
        masks = (self.call.key_mask, self.call.cross_mask if self.crossing else None)
        found = [used_tiles(*x, block) for x in zip(masks, self.bounds, self.spans, self.lists, strict=True)]
        tiles, self.lists = zip(*found, strict=True)
        return Masks(*tiles, *self.bounds, *self.spans)

    def constants(self, config: LaunchConfig, cross_tiles: bool, others: Iterable[Tensor] = ()) -> Constants:
        """The Constants of a launch. cross_tiles: its programs walk over tiles of cross keys; others: tensors like q or k that it
        reads or writes besides the call's."""
        _, heads, _, width = self.q.shape
        return Constants(
            HEADS=heads,
            HEAD_DIM=width,
            BLOCK_D=block_of_width(width),
            GROUP=heads // self.call.k.shape[1],
            CAUSAL=self.call.causal,
            WINDOWED=self.windowed,
            CAPPED=self.call.softcap is not None,
            CROSS=cross_tiles and self.crossing,
            EVEN_CROSS=cross_tiles
            and self.bounds[0] is None
            and self.spans[1] is None
            and self.numbers.cross_keys % config.block_n == 0,
            GATE_PER_QUERY=gates.per_query(self.call.gate),
            START_PER_ROW=isinstance(self.numbers.start, Tensor),
            DESCRIPTORS=config.descriptors,
            AHEAD=config.ahead,
            PRECISION=dot_precision(self.q.dtype, architecture(self.q.device)),
            WIDE=is_wide((*self.tensors, *others), max(config.block_m, config.block_n), self.gate),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )

    def is_plain(self, tensors: list[Tensor]) -> bool:
        """Whether a call reads tiles of these tensors that end where a sequence does, by strides that tensor descriptors take."""
        call = self.call
        partial = (call.key_mask, call.cross_mask, call.cu_seqlens, call.softcap)
        if any(x is not None for x in partial) or self.windowed:
            return False
        return all(map(is_described, tensors))


def at_16_bytes(x: Tensor) -> bool:
    """Whether rows of x, (B, H, N, D), start at multiples of 16 bytes, as tensor descriptors ask."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def is_described(x: Tensor) -> bool:
    """Whether tensor descriptors take x, (B, H, N, D): multiples of 16 bytes, and heads and rows that are not one expanded."""
    return at_16_bytes(x) and all(x.stride(dim) > 0 or x.shape[dim] <= 1 for dim in (1, 2))


def _numbers(call: Call) -> tuple[Numbers, bool]:
    """The Numbers of a call, and whether its window hides anything."""
    batch, _, queries, _ = call.q.shape
    keys = call.k.shape[2]
    start, window, windowed = call.query_start, call.window, call.window is not None
    if call.cu_seqlens is not None:
        start = 0
    elif start is None:
        start = keys - queries
    if isinstance(start, Tensor):
        if start.shape != (batch,) or not start.is_contiguous():
            start = start.expand(batch).contiguous()
        window = min(window, LONGEST_WINDOW) if windowed else 0
    else:
        # Past the last key only the distance to the window counts: both stay within the kernels' 32 bits.
        windowed = windowed and window < start + queries
        window = max(window - max(start - keys, 0), -LONGEST_WINDOW) if windowed else 0
        start = min(start, keys)
    sequences = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    lengths = sequences, queries, keys, call.cross_k.shape[2]
    return Numbers(*lengths, start, window, call.scale, call.softcap or 0.0), windowed


def tile_count(length: int, bounds: Tensor | None, block: int) -> int:
    """Programs per head: whole tiles of every sequence."""
    return triton.cdiv(length, block) if bounds is None else length // block + bounds.shape[0] - 1


def used_tiles(
    mask: Tensor | None, bounds: Tensor | None, spans: Tensor | None, lists: Tensor | None, block: int
) -> tuple[UsedTiles | None, Tensor | None]:
    """The tiles of `block` keys that a mask leaves to visit, with the memory of their lists; None for no mask.

    lists: of the same mask, made before, which serve again if they are for as many tiles: block sizes are powers of two, so that
    two of them cut sequences into as many tiles only where every sequence is one tile of either.
    """
    if mask is None:
        return None, None
    mask, stride = mask_and_stride(mask)
    count, length = mask.shape
    sequences = count if bounds is None else bounds.shape[0] - 1
    places = count * triton.cdiv(length, block) if bounds is None else length // block + sequences
    first_rank = triton.cdiv(places, 4) * 4  # aligned whatever the length: kernels are compiled for it
    size = first_rank + places + sequences
    made = lists is not None and len(lists) == size
    if not made:
        lists = fresh(torch.empty(size, dtype=torch.int32, device=mask.device))
    tiles, ranks = lists[:places], lists[first_rank:]
    if not made:
        config = LaunchConfig(block_m=1, block_n=block, warps=4, stages=1)
        arguments = (mask, stride, bounds, spans, length, tiles, ranks)
        launch(list_used_tiles_kernel, (sequences,), config, *arguments, BLOCK_N=block)
    return UsedTiles(mask, stride, tiles, ranks), lists


def run_tuned(kernel: str, run: Callable[[LaunchConfig], None], prepared: Prepared, plain: bool) -> None:
    """run(config) with the launch table's configuration, or the fastest of its lines where LAYALIGN_AUTOTUNE=1.

    Lengths of packed sequences are unknown and must not decide: the bits of one do not depend on what it is packed with.
    """
    q, packed = prepared.q, prepared.bounds[0] is not None
    length = None if packed else q.shape[2]
    call = dict(architecture=architecture(q.device), dtype=q.dtype, head_dim=q.shape[3], length=length, plain=plain)
    config = launch_config(kernel, **call)
    if autotuning.enabled() and q.device.type == "cuda":
        numbers = prepared.numbers
        lengths = (numbers.queries, numbers.keys, numbers.cross_keys)
        constants = prepared.constants(config, cross_tiles=True)
        key = call | {"length": [] if packed else [triton.next_power_of_2(x) for x in lengths]}
        key |= {name: str(getattr(constants, name)) for name in _TUNED_BY} | {"dtype": str(q.dtype)}
        lists = prepared.lists
        config = autotuning.tuned(kernel, key, launch_candidates(kernel, **call), run)
        prepared.lists = lists  # what a candidate left was made by launches that no plan repeats
    run(config)
