"""The shipped launch configurations of adaptive-fusion attention, and where their numbers come from.

No line spills a register under Triton 3.6 and 3.9 (`layalign kernels` checks it; bench/TUNING.md has what was compiled); among those,
tiles are as large as they get, the first sign of speed where none was measured. Two lines for each kernel and head dim: plain calls
read whole tiles and may use tensor descriptors; masks, packing, windows and soft caps need 10 to 40 registers more.
"""

from dataclasses import replace

import torch

from ...launch import LaunchConfig, family


def _line(block_m, block_n, warps, stages, descriptors=False, ahead=False, block_k=0):
    tile = dict(block_m=block_m, block_n=block_n, block_k=block_k)
    return LaunchConfig(**tile, warps=warps, stages=stages, descriptors=descriptors, ahead=ahead)


# family -> kernel -> head dim up to -> (plain, any other call), in bfloat16 and float16
_HALF = {
    # Ampere: 64 K registers for 255 a thread, no tensor memory accelerator. 64 x 64 forward tiles spill 32 to 96 bytes.
    "sm_80": {
        "forward": {
            64: (_line(128, 64, 4, 3), _line(128, 64, 8, 3)),
            128: (_line(128, 32, 8, 3), _line(128, 32, 8, 3)),
            256: (_line(64, 32, 8, 2), _line(32, 32, 4, 2)),
        },
        "key_value_gradients": {
            64: (_line(32, 64, 8, 1), _line(32, 64, 8, 1)),
            128: (_line(64, 64, 8, 2), _line(32, 64, 8, 2)),
            256: (_line(16, 32, 8, 1), _line(16, 32, 8, 1)),
        },
        "query_gradients": {
            64: (_line(64, 32, 4, 2), _line(128, 64, 8, 2)),
            128: (_line(64, 32, 4, 2), _line(64, 32, 8, 2)),
            256: (_line(64, 32, 8, 2), _line(64, 32, 8, 2)),
        },
    },
    # Ada, consumer Ampere and consumer Blackwell: the same instructions with 99 KB of shared memory.
    "sm_89": {
        "forward": {
            64: (_line(128, 64, 4, 3), _line(128, 64, 8, 3)),
            128: (_line(128, 32, 8, 3), _line(128, 32, 8, 3)),
            256: (_line(64, 32, 8, 2), _line(64, 32, 8, 2)),
        },
        "key_value_gradients": {
            64: (_line(32, 64, 8, 1), _line(32, 64, 8, 1)),
            128: (_line(32, 64, 8, 2), _line(32, 64, 8, 2)),
            256: (_line(16, 32, 8, 1), _line(16, 32, 8, 1)),
        },
        "query_gradients": {
            64: (_line(64, 32, 4, 2), _line(128, 64, 8, 2)),
            128: (_line(64, 32, 4, 2), _line(64, 32, 4, 2)),
            256: (_line(64, 32, 8, 1), _line(64, 32, 8, 1)),
        },
    },
    # Hopper: descriptors save 40 to 70 registers, which is what lets 128 x 128 fit. Two warp groups want 128 rows.
    "sm_90": {
        "forward": {
            64: (_line(128, 128, 8, 2, True), _line(128, 64, 8, 3)),
            128: (_line(128, 128, 8, 3, True), _line(128, 64, 8, 2)),
            256: (_line(64, 64, 8, 2, True), _line(64, 32, 8, 2)),
        },
        "key_value_gradients": {
            64: (_line(64, 64, 4, 2, True), _line(32, 64, 4, 2)),
            128: (_line(64, 64, 4, 2, True), _line(32, 128, 8, 2)),
            256: (_line(16, 32, 8, 1), _line(16, 32, 8, 1)),
        },
        "query_gradients": {
            64: (_line(128, 64, 8, 3, True, True), _line(128, 64, 8, 2)),
            128: (_line(128, 64, 8, 3, True, True), _line(128, 64, 8, 2)),
            256: (_line(64, 32, 8, 3, True), _line(64, 32, 8, 2)),
        },
    },
    # Blackwell: accumulators lie in tensor memory, but are read back to be rescaled; with masks a second stage spills in the backward.
    "sm_100": {
        "forward": {
            64: (_line(128, 128, 8, 2, True), _line(128, 64, 8, 3)),
            128: (_line(128, 64, 8, 3, True, True), _line(128, 64, 8, 2)),
            256: (_line(64, 32, 8, 2), _line(64, 32, 8, 2)),
        },
        "key_value_gradients": {
            64: (_line(32, 64, 4, 2), _line(32, 64, 4, 2)),
            128: (_line(64, 64, 8, 2), _line(64, 64, 8, 1)),
            256: (_line(16, 32, 8, 1), _line(16, 32, 8, 1)),
        },
        "query_gradients": {
            64: (_line(128, 128, 8, 2, True), _line(128, 64, 8, 2)),
            128: (_line(128, 64, 8, 2), _line(128, 32, 8, 2)),
            256: (_line(64, 32, 8, 1), _line(64, 32, 8, 1)),
        },
    },
}

# Up to 64 queries, where tiles of 128 rows would be half empty. Hopper only: elsewhere they spill 4 to 32 bytes.
_SHORT = 64
_HALF_SHORT = {"sm_90": _line(64, 32, 4, 2)}

# fp32 tiles are twice as large and multiplied three times (see `dot_precision`). A tile that stays for the whole loop then takes
# 2 x D registers of every thread, its upper and lower halves, however few rows it has: hence products of scores that take block_k
# columns of both at a time, read anew. Queries' gradients take tiles of as many keys as the forward, whose lists of used tiles serve
# again.
_FLOAT32 = {
    "forward": {64: _line(32, 32, 8, 1), 128: _line(16, 32, 8, 1), 256: _line(16, 32, 8, 1, block_k=64)},
    "key_value_gradients": {64: _line(32, 32, 8, 1), 128: _line(32, 16, 8, 1), 256: _line(32, 16, 8, 1, block_k=32)},
    "query_gradients": {
        64: _line(32, 32, 8, 1, block_k=32),
        128: _line(16, 32, 8, 1, block_k=64),
        256: _line(16, 32, 8, 1, block_k=64),
    },
}

# Decoding: head dim up to -> rows up to -> line, in bfloat16 and float16. block_n is the chunk of keys whose partial results
# merge. 16 rows are what a group of up to 16 query heads has for one token. Tiles lie transposed, so that q is replicated in
# every warp's registers but on Hopper: elsewhere 32 and 64 rows spill 16 to 780 bytes, and 16-row tiles share the second cache.
_DECODE = {
    64: {16: _line(16, 128, 4, 2)},
    128: {16: _line(16, 64, 4, 3)},
    256: {16: _line(16, 32, 8, 2)},
}
_DECODE_HOPPER = {
    64: {16: _line(16, 64, 4, 3), 32: _line(32, 64, 4, 3), 64: _line(64, 32, 8, 2)},
    128: {16: _line(16, 64, 4, 3), 32: _line(32, 64, 8, 2), 64: _line(64, 32, 8, 2)},
    256: {16: _line(16, 32, 8, 2), 32: _line(32, 32, 8, 2)},
}
_DECODE_FLOAT32 = {
    64: {16: _line(16, 32, 4, 2)}
}  # wider heads spill 92 to 128 bytes, with smaller tiles too (sm_80, sm_100)
_DECODE_INTERPRETER = {256: {16: _line(16, 16, 4, 1), 32: _line(32, 16, 4, 1)}}


# HIP and GPUs to come: tiles that need little of anything.
_ELSEWHERE = {
    "forward": _line(64, 32, 4, 1),
    "key_value_gradients": _line(32, 32, 4, 1),
    "query_gradients": _line(32, 32, 4, 1),
}

# Small, and unequal, so that tests of a few dozen positions meet every kind of tile.
_INTERPRETER = {
    "forward": _line(32, 16, 4, 1),
    "key_value_gradients": _line(16, 32, 4, 1),
    "query_gradients": _line(32, 16, 4, 1),
}


def launch_config(kernel, *, architecture, dtype, head_dim, length, plain):
    """The line for one launch.

    kernel: "forward", "key_value_gradients" or "query_gradients"; architecture: as `launch.architecture` names it;
    length: of the queries, None where it must not decide; plain: see `Prepared.is_plain`.
    """
    if architecture == "interpreter":
        return _INTERPRETER[kernel]
    width = next(limit for limit in (64, 128, 256) if head_dim <= limit)
    arch = family(architecture)
    if dtype == torch.float32:
        return _FLOAT32[kernel][width]
    if arch not in _HALF:
        return _ELSEWHERE[kernel]
    short = length is not None and length <= _SHORT and width <= 128 and kernel != "key_value_gradients"
    if short and arch in _HALF_SHORT:
        return _HALF_SHORT[arch]
    return _HALF[arch][kernel][width][0 if plain else 1]


def launch_candidates(kernel, *, architecture, plain, **call):
    """The shipped line, first, and what else is worth timing when LAYALIGN_AUTOTUNE=1 asks for it."""
    lines = [launch_config(kernel, architecture=architecture, plain=plain, **call)]
    arch = family(architecture)
    described = (False, True) if plain and arch in ("sm_90", "sm_100") else (False,)
    for block_m, block_n in ((32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
        warps = 8 if block_m * block_n >= 64 * 128 else 4
        lines += [_line(block_m, block_n, warps, stages, d) for stages in (2, 3) for d in described]
        if kernel == "query_gradients" and plain and arch == "sm_90":
            lines += [_line(block_m, block_n, warps, stages, True, ahead=True) for stages in (2, 3)]
    return list(dict.fromkeys(lines))


def decode_config(*, architecture, dtype, head_dim, rows):
    """The line of the decode kernel, None where the others serve: fp32 with heads wider than 64.

    rows: queries of all heads that share a key head. More than a tile's take several tiles.
    """
    lines = _DECODE_HOPPER if architecture == "sm_90" else _DECODE
    if dtype == torch.float32:
        lines = _DECODE_FLOAT32
    if architecture == "interpreter":
        lines = _DECODE_INTERPRETER
    if head_dim > max(lines):
        return None
    tiles = lines[next(limit for limit in lines if head_dim <= limit)]
    return next((line for limit, line in tiles.items() if rows <= limit), tiles[max(tiles)])


def paged_config(line):
    """The line of decoding over pages instead of this one of `decode_config`: twice the turns ahead. The numbers of a tile's pages are
    themselves asked for ahead, so that with the same stages tiles come half as early (predicted for 64 x 512 + 128 keys of 32 heads of
    128 on an H200: 321 us with 3 stages, 230 with 5; end to end 199)."""
    return replace(line, stages=2 * line.stages - 1)


def combine_config(architecture):
    """The line that merges what the decode kernel's splits left, block_k chunks read at a time."""
    if architecture == "interpreter":
        return LaunchConfig(block_m=16, block_n=0, block_k=2, warps=4, stages=1)
    return LaunchConfig(block_m=1, block_n=0, block_k=8, warps=4, stages=1)
