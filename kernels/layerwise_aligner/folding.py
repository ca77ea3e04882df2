"""Multiplying the shared projection into the key and value projections of the layers, and when that pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def fold_pays(tokens: int, encoder_width: int, llm_width: int, kv_width: int, backward: bool = False) -> bool:
    """Whether folding saves operations for this number of tokens.

    Forward it multiplies (kv, Dl) with (Dl, De) once for each stream and replaces, for each token, De x Dl + Dl x kv
    products by De x kv. Backward, where only the projection and what is before it are trained, it multiplies so twice (the
    weight again, and the projection's gradient) and replaces 2 x De x Dl + Dl x kv by 2 x De x kv.
    """
    once, each = kv_width * llm_width * encoder_width, encoder_width * kv_width
    unfolded = encoder_width * llm_width + llm_width * kv_width
    if backward:
        once, each, unfolded = 2 * once, 2 * each, unfolded + encoder_width * llm_width
    return tokens * (unfolded - each) > once


def augment(proj_weight: Tensor, proj_bias: Tensor | None) -> Tensor:
    """The projection with its bias as one more column, so that one product folds both: (Dl, De + 16), zeros in the last 15."""
    if proj_bias is None:
        return proj_weight
    # 16 columns keep rows, and the count of columns, at multiples of what vector loads and tensor descriptors take.
    return torch.cat([proj_weight, pad(proj_bias[:, None], (0, 15))], dim=1)


def fold(
    products: Any, weights: Any, biases: Tensor | None, augmented: Tensor, encoder_width: int
) -> tuple[Tensor, Tensor | None]:
    """Weights (G, kv, Dl) after the projection as (G, kv, De), accumulated in fp32 and rounded once, and biases (G, kv) or None.

    augmented: of `augment`.
    """
    folded = products.matmul(weights, augmented)
    if augmented.shape[1] > encoder_width:
        bias = folded[..., encoder_width]
        biases = bias.contiguous() if biases is None else bias + biases
    return folded[..., :encoder_width], biases
