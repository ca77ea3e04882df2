"""The shipped launch configurations of the grouped matrix products: 0 spill bytes, checked by `layalign kernels`."""

import torch

from ..launch import LaunchConfig


def _line(block_m, block_n, block_k, warps, stages, descriptors=False):
    return LaunchConfig(
        block_m=block_m, block_n=block_n, block_k=block_k, warps=warps, stages=stages, descriptors=descriptors
    )


_FAMILIES = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_120": "sm_89", "sm_121": "sm_89"}

# Half precision, matrices at multiples of 16 bytes.
_HALF = {
    "sm_80": _line(128, 128, 32, 8, 4),
    "sm_89": _line(128, 128, 32, 8, 4),
    "sm_90": _line(128, 256, 64, 8, 4, True),
    "sm_100": _line(128, 256, 64, 8, 4, True),
}
# Up to 64 rows, where half of a tile of 128 would be empty.
_SHORT = 64
_HALF_SHORT = {
    "sm_80": _line(64, 128, 32, 4, 4),
    "sm_89": _line(64, 128, 32, 4, 4),
    "sm_90": _line(64, 128, 64, 4, 4, True),
    "sm_100": _line(64, 128, 64, 4, 4, True),
}
# Numbers that cannot be read eight at a time pass through registers: larger tiles spill 600 bytes (sm_90, 128 x 128).
_UNALIGNED = _line(64, 64, 32, 8, 1)
# fp32 tiles are twice as large and multiplied three times (see `dot_precision`).
_FLOAT32 = _line(64, 64, 32, 8, 2)
_ELSEWHERE = _line(64, 64, 32, 4, 1)  # HIP and GPUs to come: tiles that need little of anything
_INTERPRETER = _line(16, 32, 16, 4, 1)


def matmul_config(*, architecture, dtype, rows, aligned):
    """The line for one launch.

    architecture: as `launch.architecture` names it; rows: of the result, in one group; aligned: whether all
    matrices, and their rows, start at multiples of 16 bytes.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    family = _FAMILIES.get(architecture, architecture)
    if dtype != torch.float32 and family not in _HALF:
        return _ELSEWHERE
    if not aligned:
        return _UNALIGNED
    if dtype == torch.float32:
        return _FLOAT32
    return (_HALF_SHORT if rows <= _SHORT else _HALF)[family]
