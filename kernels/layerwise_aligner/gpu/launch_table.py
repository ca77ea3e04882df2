"""The shipped launch configurations of the layer-wise aligner's kernels, and where their numbers come from.

No line spills a register (`layalign kernels` checks it). The mix waits for memory, so that among those lines what counts is
bytes on their way to a multiprocessor: its programs times the tiles that each has asked for. Products wait for tensor cores.
"""

from dataclasses import dataclass, replace

import torch

from ...launch import LaunchConfig, family


def _line(block_m, block_n, warps, stages):
    return LaunchConfig(block_m=block_m, block_n=block_n, warps=warps, stages=stages)


# family -> kernel -> encoder states up to -> streams and numbers in a tile, in bfloat16 and float16. No line for "mix_gradients",
# weights' and states' in one pass: each has a pass of its own, as all that were tried spill, 72 to 1,572 bytes. 8 warps repeat most
# of the weight gradients' work: all of them along the streams, of which there are too few.
_MIX_HALF = {
    "sm_80": {
        "mix": {32: _line(64, 128, 4, 3), 64: _line(64, 64, 4, 3), 128: _line(64, 64, 4, 2)},
        "mix_weight_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 2), 128: _line(16, 32, 4, 2)},
        "mix_state_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 2), 128: _line(64, 32, 4, 2)},
        "mix_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 2)},
    },
    "sm_90": {
        "mix": {32: _line(64, 128, 4, 3), 64: _line(64, 128, 4, 3), 128: _line(64, 64, 4, 2)},
        "mix_weight_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 3), 128: _line(64, 64, 8, 2)},
        "mix_state_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 2), 128: _line(64, 64, 4, 2)},
        "mix_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 3)},
    },
    "sm_100": {
        "mix": {32: _line(64, 128, 4, 3), 64: _line(64, 128, 4, 3), 128: _line(64, 64, 4, 2)},
        "mix_weight_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 3), 128: _line(64, 64, 8, 2)},
        "mix_state_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 2), 128: _line(64, 64, 4, 2)},
        "mix_gradients": {32: _line(64, 64, 4, 3), 64: _line(64, 64, 4, 3)},
    },
}
_MIX_HALF["sm_89"] = _MIX_HALF["sm_80"]  # none takes more than the 99 KB of shared memory there

# fp32 tiles are twice as large and multiplied three times (see `dot_precision`).
_MIX_FLOAT32 = {
    "sm_80": {
        "mix": {32: _line(64, 32, 4, 1), 64: _line(64, 16, 4, 1), 128: _line(64, 16, 4, 1)},
        "mix_weight_gradients": {32: _line(32, 32, 4, 1), 64: _line(32, 32, 4, 1), 128: _line(16, 16, 4, 1)},
        "mix_state_gradients": {32: _line(64, 16, 4, 1), 64: _line(64, 16, 4, 1), 128: _line(64, 16, 4, 1)},
    },
    "sm_90": {
        "mix": {32: _line(64, 32, 4, 2), 64: _line(64, 32, 4, 2), 128: _line(64, 16, 4, 1)},
        "mix_weight_gradients": {32: _line(64, 32, 4, 2), 64: _line(64, 16, 4, 2), 128: _line(16, 16, 4, 1)},
        "mix_state_gradients": {32: _line(64, 32, 4, 1), 64: _line(64, 16, 4, 2), 128: _line(64, 16, 4, 1)},
        "mix_gradients": {32: _line(64, 32, 4, 2)},
    },
    "sm_100": {
        "mix": {32: _line(64, 32, 4, 2), 64: _line(64, 16, 4, 1), 128: _line(32, 16, 4, 1)},
        "mix_weight_gradients": {32: _line(64, 32, 4, 2), 64: _line(16, 32, 4, 1), 128: _line(16, 16, 4, 1)},
        "mix_state_gradients": {32: _line(64, 32, 4, 1), 64: _line(32, 16, 4, 1), 128: _line(16, 16, 8, 1)},
        "mix_gradients": {32: _line(64, 32, 4, 2)},
    },
}
# 64 streams by 128 states take 136 KB of shared memory, where sm_89 has 99.
_MIX_FLOAT32["sm_89"] = _MIX_FLOAT32["sm_80"] | {
    "mix_state_gradients": _MIX_FLOAT32["sm_80"]["mix_state_gradients"] | {128: _line(16, 16, 4, 1)}
}


# HIP and GPUs to come: tiles that need little of anything.
_MIX_ELSEWHERE = _line(32, 32, 4, 1)

# Small, and unequal, so that tests of a few dozen numbers meet every kind of tile.
_MIX_INTERPRETER = {
    "mix": _line(32, 16, 4, 1),
    "mix_weight_gradients": _line(16, 32, 4, 1),
    "mix_state_gradients": _line(32, 16, 4, 1),
    "mix_gradients": _line(32, 32, 4, 1),
}


def mix_config(kernel, *, architecture, dtype, layers, streams, aligned=True):
    """The line for one launch: block_m streams and block_n numbers of each state in a tile.

    kernel: "mix", "mix_weight_gradients", "mix_state_gradients" or, for both in one pass, "mix_gradients", of which there is
    none (None) where every line would spill or no tile holds all streams; architecture: as `launch.architecture` names it;
    layers, streams: the encoder states and what they are mixed into; aligned: whether states and streams start at multiples
    of 16 bytes, without which both gradients in one pass spill (24 bytes on sm_90).
    """
    line = _mix_line(kernel, architecture, dtype, layers, streams)
    if kernel == "mix_gradients" and line is not None and (not aligned or streams > line.block_m):
        return None
    return line


def _mix_line(kernel, architecture, dtype, layers, streams):
    if architecture == "interpreter":
        return _MIX_INTERPRETER[kernel]
    arch = family(architecture)
    lines = (_MIX_FLOAT32 if dtype == torch.float32 else _MIX_HALF).get(arch)
    if lines is None:
        return _MIX_ELSEWHERE
    line = lines[kernel].get(next((limit for limit in (32, 64) if layers <= limit), 128)) if kernel in lines else None
    if dtype == torch.float32 or line is None:
        return line  # fewer streams would need other instructions, and more registers
    if arch in ("sm_90", "sm_100"):
        return line  # their tensor cores take 64 rows
    rows = next((rows for rows in (16, 32) if streams <= rows), line.block_m)
    return replace(line, block_m=min(rows, line.block_m))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductConfig(LaunchConfig):
    """A line of the products, whose programs stay and walk over tiles: how many a multiprocessor holds at a time, and whether they
    ask for the next tile's numbers before a tile is written (`JOINED`)."""

    programs: int = 1
    joined: bool = False


def _product(block_m, block_n, block_k, warps, stages, descriptors=False, programs=1, joined=False):
    tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
    return ProductConfig(**tile, warps=warps, stages=stages, descriptors=descriptors, programs=programs, joined=joined)


# Half precision, matrices at multiples of 16 bytes. On sm_90 four tiles under way and the result's take 229,408 bytes of 232,448:
# one program a multiprocessor.
_MATMUL_HALF = {
    "sm_80": _product(128, 128, 32, 8, 4),
    "sm_89": _product(128, 128, 32, 8, 4),
    "sm_90": _product(128, 256, 64, 8, 4, True, joined=True),
    "sm_100": _product(128, 256, 64, 8, 4, True, joined=True),
}
# Up to 64 rows, where half of a tile of 128 would be empty.
_MATMUL_FEW_ROWS = 64
_MATMUL_SHORT = {
    "sm_80": _product(64, 128, 32, 4, 4, programs=2),
    "sm_89": _product(64, 128, 32, 4, 4, programs=2),
    "sm_90": _product(64, 128, 64, 4, 4, True, programs=2),
    "sm_100": _product(64, 128, 64, 4, 4, True, programs=2),
}
# Numbers that cannot be read eight at a time pass through registers: larger tiles spill 600 bytes (sm_90, 128 x 128).
_MATMUL_UNALIGNED = _product(64, 64, 32, 8, 1, programs=2)
_MATMUL_UNALIGNED_FLOAT32 = _product(64, 32, 32, 8, 1)
# fp32 tiles are twice as large and multiplied three times (see `dot_precision`).
_MATMUL_FLOAT32 = _product(64, 64, 32, 8, 2)
_MATMUL_ELSEWHERE = _product(64, 64, 32, 4, 1, programs=2)  # HIP and GPUs to come: tiles that need little of anything
_MATMUL_INTERPRETER = _product(16, 32, 16, 4, 1)


def matmul_config(*, architecture, dtype, rows, aligned):
    """The line for one launch.

    architecture: as `launch.architecture` names it; rows: of the result, in one group; aligned: whether all
    matrices, and their rows, start at multiples of 16 bytes.
    """
    if architecture == "interpreter":
        return _MATMUL_INTERPRETER
    arch = family(architecture)
    if arch not in _MATMUL_HALF:
        return _MATMUL_ELSEWHERE
    if dtype == torch.float32:
        return _MATMUL_FLOAT32 if aligned else _MATMUL_UNALIGNED_FLOAT32
    if not aligned:
        return _MATMUL_UNALIGNED
    return (_MATMUL_SHORT if rows <= _MATMUL_FEW_ROWS else _MATMUL_HALF)[arch]
