"""From scores to softmax weights: the soft cap, the exponential, what the backward reads of the forward."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_weights(b_scores, factor, b_lse, EXACT: tl.constexpr):
    """exp2(scores * factor - lse), lse broadcast against fp32 scores.

    EXACT, for fp32 tensors, subtracts first: the product of a score of 100 is rounded by 1e-5, the difference by nothing.
    Half precision has no use for that, and multiplies and subtracts in one instruction.
    """
    if EXACT:
        b_weights = tl.exp2((b_scores - b_lse / factor) * factor)
    else:
        b_weights = tl.exp2(b_scores * factor - b_lse)
    return b_weights


@triton.jit
def capped_scores(b_scores, scale, softcap, EXACT: tl.constexpr):
    """tanh(scores / softcap): scores of the dot product, scale in base 2; EXACT for fp32 tensors."""
    return tanh(b_scores * (scale / (softcap * LOG2_E)), ACCURATE=EXACT)


@triton.jit
def weights_again(b_scores, scale, softcap, b_lse, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """-> the forward's weights, from the scores of the dot product and log-sum-exps in base 2, and what the cap took: of
    a gradient of scores is left times 1 - capped^2."""
    if CAPPED:
        b_capped = capped_scores(b_scores, scale, softcap, EXACT)
        b_weights = softmax_weights(b_capped, softcap * LOG2_E, b_lse, EXACT)
    else:
        b_capped = b_scores  # nobody reads it
        b_weights = softmax_weights(b_scores, scale, b_lse, EXACT)
    return b_weights, b_capped


@triton.jit
def join_sink(b_lse, b_sink):
    """-> log-sum-exps in base 2 with a sink, a score of base e, beside the keys, and what is left of their weights. Either may be -inf.

    The product within a difference is spelled out: see `chunks.merge`.
    """
    b_top = tl.maximum(b_lse, b_sink * LOG2_E)
    b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_unit = tl.zeros_like(b_base) + LOG2_E
    b_keys = tl.exp2(b_lse - b_base)
    b_total = b_keys + tl.exp2(tl.fma(tl.zeros_like(b_base) + b_sink, b_unit, -b_base))
    return b_base + tl.log2(b_total), b_keys / tl.where(b_total == 0, 1.0, b_total)


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh by exp2, to about 1e-7 absolute; ACCURATE: to a few ulp near 0 too, by its Taylor series."""
    power = tl.exp2(tl.abs(x) * (LOG2_E * -2.0))
    size = (1 - power) / (1 + power)
    if ACCURATE:
        square = x * x
        series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        size = tl.where(square < 0.0625, tl.abs(x) * series, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def load_lse(p_lse, o_row, m_used):
    """Log-sum-exps [BM] for the backward: +inf, which makes every weight 0, for a row that saw nothing."""
    # [BM]
    b_lse = tl.load(p_lse + o_row, mask=m_used, other=float("inf"))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse)
