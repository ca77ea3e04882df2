"""In which order programs take up tiles: the longest of all heads first, in sections of heads whose rows the second cache can hold."""

import triton
import triton.language as tl

# Bytes of keys and values (or of queries and gradients) that tiles of a section share. Below the 40 to 126 MB that GPUs with
# tensor memory accelerators or 80 multiprocessors have, since what streams through needs room too.
_SECTION = tl.constexpr(32 * 2**20)


@triton.jit
def head_and_tile(program, tiles, rows, SHARING: tl.constexpr, C: tl.constexpr):
    """-> number of a head among all batch rows' and number of its tile, of `tiles`: a section's heads have their first tile first.

    Causal tiles differ by a factor of the length: with the long ones at the end of each head, the last wave of programs would wait
    for some of them. Order does not change what a program computes.

    rows: what a head reads again and again, of two tensors. SHARING: neighbouring heads that read the same rows.
    """
    heads = tl.num_programs(0) // tiles
    section = tl.maximum(_SECTION // (C.BLOCK_D * 4) // tl.maximum(rows, 1), 1)
    section = tl.minimum(section, heads) * SHARING
    first = program // (section * tiles) * section
    count = tl.minimum(section, heads - first)
    program -= first * tiles
    return first + program % count, program // count
