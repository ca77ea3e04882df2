"""The rings of K and V tiles, the producer that fills them, and what the groups do with a place."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import schedule
from .work import head_pointer

# Triton 3.7 renamed it.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

place_and_phase = gluon.jit(schedule.place_and_phase)
GROUPS = gl.constexpr(schedule.GROUPS)


class Ring(NamedTuple):
    """Places for tiles [STAGES, BN, D] in shared memory, with their barriers [STAGES, 1]."""

    tiles: object
    full: object
    empty: object


@gluon.jit
def make_ring(DTYPE: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr):
    """A Ring of empty places. STAGES: as in C; Triton 3.6 counts to parameters only."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, C.HEAD_DIM], DTYPE)
    tiles = gl.allocate_shared_memory(DTYPE, [STAGES, C.BLOCK_N, C.HEAD_DIM], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=GROUPS)
    return Ring(tiles, full, empty)


@gluon.jit
def describe(x, tile, term, shares, C: gl.constexpr):
    """A descriptor of the term's rows of one head: past them it reads zeros."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C.BLOCK_N, C.HEAD_DIM], x.pointer.dtype.element_ty)
    return tma.make_tensor_descriptor(
        head_pointer(x, tile.batch // shares, tile.head // C.GROUP, term.key_begin),
        shape=[max(term.keys, 1), C.HEAD_DIM],
        strides=[x.row, 1],
        block_shape=[C.BLOCK_N, C.HEAD_DIM],
        layout=LAYOUT,
    )


@gluon.jit
def fill(ring, number, source, row, C: gl.constexpr):
    """Start the copy of a tile, the number-th of the program, into the ring."""
    place, phase = place_and_phase(number, C.STAGES)
    mbarrier.wait(ring.empty.index(place), phase ^ 1)
    mbarrier.expect(ring.full.index(place), C.BLOCK_N * C.HEAD_DIM * 2)
    copy_tile(source, [row, 0], ring.full.index(place), ring.tiles.index(place))


@gluon.jit
def fill_rest(keys, weighted, term, k_ring, v_ring, C: gl.constexpr):
    """K of the tiles after a term's first, each before V of the tile before it."""
    for tile_number in range(term.begin + 1, term.end):
        number = term.before + tile_number - term.begin
        fill(k_ring, number, keys, tile_number * C.BLOCK_N, C)
        fill(v_ring, number - 1, weighted, (tile_number - 1) * C.BLOCK_N, C)


@gluon.jit
def produce(inputs, tile, cross, own, k_ring, v_ring, shares, C: gl.constexpr):
    """The producer warp: K of every tile before V of the one before, which is the order in which places become empty.

    A descriptor takes a while to make: the first K is on its way before that of V is made.
    """
    if C.CROSS:
        keys = describe(inputs.cross_k, tile, cross, shares, C)
        fill(k_ring, 0, keys, cross.begin * C.BLOCK_N, C)
        weighted = describe(inputs.cross_v, tile, cross, shares, C)
        fill_rest(keys, weighted, cross, k_ring, v_ring, C)
        own_keys = describe(inputs.k, tile, own, 1, C)
        fill(k_ring, own.before, own_keys, own.begin * C.BLOCK_N, C)
        fill(v_ring, own.before - 1, weighted, (cross.end - 1) * C.BLOCK_N, C)
    else:
        own_keys = describe(inputs.k, tile, own, 1, C)
        fill(k_ring, 0, own_keys, own.begin * C.BLOCK_N, C)
    own_weighted = describe(inputs.v, tile, own, 1, C)
    fill_rest(own_keys, own_weighted, own, k_ring, v_ring, C)
    fill(v_ring, own.before + own.end - own.begin - 1, own_weighted, (own.end - 1) * C.BLOCK_N, C)


@gluon.jit
def filled(ring, number, C: gl.constexpr):
    """The number-th tile of the program [BN, D], once it is there."""
    place, phase = place_and_phase(number, C.STAGES)
    mbarrier.wait(ring.full.index(place), phase)
    return ring.tiles.index(place)


@gluon.jit
def release(ring, number, C: gl.constexpr):
    """This group has read the number-th tile."""
    place, _ = place_and_phase(number, C.STAGES)
    mbarrier.arrive(ring.empty.index(place), count=1)
