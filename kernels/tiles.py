"""Tiles of one number, for the kernels of all operators: in a list of sizes Triton 3.6 takes constexprs only, which the fields of a C
become as parameters."""

import triton
import triton.language as tl


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] fp32."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def ones(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS, COLUMNS] of DTYPE."""
    return tl.full([ROWS, COLUMNS], 1.0, DTYPE)


@triton.jit
def vector(SIZE: tl.constexpr, VALUE: tl.constexpr):
    """[SIZE] fp32, all VALUE."""
    return tl.full([SIZE], VALUE, tl.float32)
