"""Assembling what the LLM reads: [bos] [adapter output] [boundary] [prompt and target], with all padding squeezed to the left."""

import torch


def squeeze(mask, side):
    """Gather indices that move the padding of each row to one side and drop columns that are padding in every row.

    Args:
        mask: (B, N) bool, True = real token; any pattern.
        side: "left" or "right", where the padding goes.

    Returns:
        index (B, N') long and the new mask (B, N'); the order of real tokens is kept. N' is at least 1.
    """
    longest = max(int(mask.sum(1).max()), 1) if mask.numel() else 0
    key = mask if side == "left" else ~mask
    order = key.to(torch.int8).argsort(dim=1, stable=True)
    index = order[:, -longest:] if side == "left" else order[:, :longest]
    return index, mask.gather(1, index)


def take(values, index):
    """values (B, N, ...) at index (B, N') along the sequence."""
    shape = index.shape + (1,) * (values.dim() - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))


def positions(mask):
    """Position of every token, counting real tokens only: (B, N) long, 0 for padding."""
    return (mask.long().cumsum(1) - 1).clamp_(min=0)
