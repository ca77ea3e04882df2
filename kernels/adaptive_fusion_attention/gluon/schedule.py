"""Where tiles lie and when they change hands: plain arithmetic of numbers, which the host, the kernel and the tests call alike.

Every function here is compiled into the kernel as it stands (`gluon.jit` of it), so none calls another, and what looks like a condition
is one on constants. Arguments in capitals are constants of the kernel.
"""

BLOCK_M = 128  # queries of a program: 64 for each of two groups of four warps, what one wgmma takes
BLOCK_N = 128  # keys of a tile
GROUPS = 2
WARPS = 4  # of each group; the producer has one
# Of the 504 registers that 3 x 128 threads start with, 168 each: what Triton leaves to the first group is 240 too.
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
# Head dim -> tiles of K, and of V, in flight: what 227 KB take beside the queries and the parked cross term (192 KB; 160 KB).
STAGES = {64: 4, 128: 2}
# Of the gradients of keys and values: queries of a tile (128 beside the sums of 64 keys are too many registers), and tiles in flight.
QUERY_BLOCK = 64
QUERY_STAGES = 4
# Two sums of [64, D] a group leave the producer less.
SUMMING_REGISTERS = 240
FEEDING_REGISTERS = 24


def place_and_phase(tile, STAGES):
    """Of the tile-th tile of a program: its place in the ring, and the parity of the place's barriers while it is there."""
    return tile % STAGES, tile // STAGES % 2


def query_tile_of(program, queries, rows, BLOCK_M):
    """-> first query of a program, and which of the `rows` = B * Hq heads it is of: the last queries of all heads come first.

    Under a causal mask they see most, and what starts last should be short; heads that share keys are neighbours.
    """
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    return (tiles - 1 - program // rows) * BLOCK_M, program % rows


def keys_of_row(span_begin, span_end, start, queries, keys, window, CAUSAL, WINDOWED):
    """-> the first key that any query of a batch row sees, and how many from there on: all else stays unread.

    Tiles are counted from that key, so that the bits of a row do not depend on the padding around its span.
    """
    begin = min(max(span_begin, 0), keys)
    end = min(span_end, keys)
    if CAUSAL:
        end = min(end, start + queries)
    if WINDOWED:
        begin = min(max(begin, start - window + 1), keys)
    return begin, max(end - begin, 0)


def tiles_of_queries(first, last, start, count, window, CAUSAL, WINDOWED, BLOCK_N):
    """-> begin, full_begin, full_end, end of the tiles of `count` keys that the queries first .. last see, the query 0 being at
    key `start`: all of them see all keys of the tiles full_begin .. full_end.

    There is always one tile, so that no agent needs to know of none: of no keys at all it is tile 1, which lies past them, and
    a descriptor reads zeros there.
    """
    seen = count
    seen_by_all = count
    if CAUSAL:
        seen = min(count, max(start + last, 0))
        seen_by_all = min(count, max(start + first + 1, 0))
    end = (seen + BLOCK_N - 1) // BLOCK_N
    full_end = seen_by_all // BLOCK_N
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = min(max(start + first - window + 1, 0) // BLOCK_N, end)
        full_begin = (max(start + last - window, 0) + BLOCK_N - 1) // BLOCK_N
    begin = max(begin, 1 - min(count, 1))
    end = max(end, begin + 1)
    full_begin = min(max(full_begin, begin), end)
    full_end = min(max(full_end, full_begin), end)
    return begin, full_begin, full_end, end


def key_tile_of_program(program, rows):
    """-> number of a program's tile of keys, and which of the `rows` = B * Hkv heads it is of: the first tiles of all heads come first.

    Cross tiles are counted first, since all queries see them; then, under a causal mask, the first keys are seen by most.
    """
    return program // rows, program % rows


def tiles_of_keys(first, count, start, queries, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N):
    """-> begin, end of the tiles of queries that see any of the keys first .. first + BLOCK_N of `count`, query 0 being at key
    `start`; none where there are no such keys."""
    last = min(first + BLOCK_N, count)
    end = (queries + BLOCK_M - 1) // BLOCK_M
    begin = 0
    if CAUSAL:
        begin = min(max(first - start, 0) // BLOCK_M, end)
    if WINDOWED:
        end = max(min((max(last - 1 - start + window, 0) + BLOCK_M - 1) // BLOCK_M, end), begin)
    return begin, begin + (end - begin) * min(max(last - first, 0), 1)


def in_band(ahead, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N):
    """Whether some query of a tile does not see some key of a tile, the first query being `ahead` keys ahead of the first key."""
    partial = False
    if CAUSAL:
        partial = ahead < BLOCK_N - 1
    if WINDOWED:
        partial = partial | (ahead + BLOCK_M - 1 >= window)
    return partial
