"""Which keys a program of the gradients of keys and values works on, and the queries that see them."""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..gpu.rows import Rows
from . import schedule
from .work import HeadRows, head_pointer, keys_of_row, span_of

key_tile_of_program = gluon.jit(schedule.key_tile_of_program)
tiles_of_keys = gluon.jit(schedule.tiles_of_keys)

# Of cross keys, which all queries see: where they would lie if they were the row's own.
FAR_AHEAD = gl.constexpr(2**30)
NO_WINDOW = gl.constexpr(2**31 - 1)


class KeyTile(NamedTuple):
    """Of one key head, the keys first .. first + BLOCK_N counted from key_begin, `seen` of which any query sees, of the `keys` of a row.

    crossing: 1 for cross keys, 0 for the row's own; ahead: the row's first query is so many keys ahead of the tile's first; window: of the
    row's own keys. The tiles of queries begin .. end see some; lse, sums: pointers to the queries' of this term.
    """

    crossing: object
    batch: object
    head: object
    first: object
    key_begin: object
    seen: object
    keys: object
    ahead: object
    window: object
    begin: object
    end: object
    lse: object
    sums: object


@gluon.jit
def either(cross, own, crossing, C: gl.constexpr):
    """The cross term's, or else the own."""
    if C.SELF and C.CROSS:
        chosen = cross if crossing else own
    elif C.CROSS:
        chosen = cross
    else:
        chosen = own
    return chosen


@gluon.jit
def head_rows(cross, own, tile, C: gl.constexpr):
    """HeadRows of one tensor of the tile's term."""
    if C.SELF and C.CROSS:
        chosen = Rows(
            either(cross.pointer, own.pointer, tile.crossing, C),
            either(cross.batch, own.batch, tile.crossing, C),
            either(cross.head, own.head, tile.crossing, C),
            0,
        )
        row = either(cross.row, own.row, tile.crossing, C)
    elif C.CROSS:
        chosen = cross
        row = cross.row
    else:
        chosen = own
        row = own.row
    return HeadRows(head_pointer(chosen, tile.batch, tile.head, 0), row)


@gluon.jit
def key_tile(own, cross, queries, keys, cross_keys, start, window, cross_tiles, batches, C: gl.constexpr):
    """The KeyTile of this program."""
    number, row = key_tile_of_program(gl.program_id(0), batches * (C.HEADS // C.GROUP))
    batch = row // (C.HEADS // C.GROUP)
    crossing = 0
    if C.CROSS:
        crossing = gl.cast(number < cross_tiles, gl.int32)
    number -= cross_tiles * (1 - crossing)
    first = number * C.BLOCK_N
    key_begin = 0
    seen = 0
    ahead = FAR_AHEAD
    begin = 0
    end = 0
    if C.SELF:
        if C.START_PER_ROW:
            start = gl.cast(min(max(gl.load(start + batch), -queries), keys + window), gl.int32)
        span_begin, span_end = span_of(own.spans, batch, keys)
        key_begin, seen = keys_of_row(span_begin, span_end, start, queries, keys, window, C.CAUSAL, C.WINDOWED)
        ahead = start - key_begin - first
        begin, end = tiles_of_keys(
            first, seen, start - key_begin, queries, window, C.CAUSAL, C.WINDOWED, C.BLOCK_M, C.BLOCK_N
        )
    if C.CROSS:
        span_begin, span_end = span_of(cross.spans, batch, cross_keys)
        cross_begin, cross_count = keys_of_row(span_begin, span_end, 0, 0, cross_keys, 0, False, False)
        _, cross_end = tiles_of_keys(first, cross_count, 0, queries, 0, False, False, C.BLOCK_M, C.BLOCK_N)
        if not C.SELF or crossing:
            key_begin = cross_begin
            seen = cross_count
            keys = cross_keys
            ahead = FAR_AHEAD
            window = NO_WINDOW
            begin = 0
            end = cross_end
    return KeyTile(
        crossing,
        batch,
        row % (C.HEADS // C.GROUP),
        first,
        key_begin,
        seen,
        keys,
        ahead,
        window,
        begin,
        end,
        either(cross.lse, own.lse, crossing, C),
        either(cross.sums, own.sums, crossing, C),
    )
