"""What the LLM reads, [bos] [adapter output] [boundary] [prompt and target] with its padding squeezed out, and its loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Share of padding from which packing pays for moving the encoder states and the results once more. Adapter and aligner with
# it against without, on a CPU (De 512 to 768, 8 to 12 states, 128 to 768 positions): 0.95 to 1.02 of the time at a share of 0.05,
# 0.89 to 0.97 at 0.1, 0.51 to 0.71 at 0.5, with gradients or without.
PACKED_FROM = 0.1


def squeeze(mask: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Gather indices that move the padding of each row to one side and drop columns that are padding in every row.

    Args:
        mask: (B, N) bool, True = real token; any pattern.
        side: "left" or "right", where the padding goes.

    Returns:
        index (B, N') long and the new mask (B, N'); the order of real tokens is kept. N' is at least 1. And the number of real
        tokens, which a GPU is waited for together with N'.
    """
    longest = tokens = 0
    if mask.numel():
        lengths = mask.sum(1)
        longest, tokens = torch.stack([lengths.max(), lengths.sum()]).tolist()
        longest = max(longest, 1)
    key = mask if side == "left" else ~mask
    order = key.to(torch.int8).argsort(dim=1, stable=True)
    index = order[:, -longest:] if side == "left" else order[:, :longest]
    return index, mask.gather(1, index), tokens


def real_tokens(mask: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """Where the real tokens lie in the flattened mask (B, T), (tokens,) long; None where they are too many for packing to pay."""
    if torch.compiler.is_compiling() or mask.numel() - tokens <= PACKED_FROM * mask.numel():
        return None
    # Not nonzero, which would wait for a GPU to count them once more.
    return (~mask).flatten().to(torch.int8).argsort(stable=True)[:tokens]


def pack(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """values (B, T, ...) -> (1, tokens, ...) at `places` of `real_tokens`; as they are where that is None."""
    return values if places is None else values.flatten(0, 1).index_select(0, places)[None]


def unpack(values: torch.Tensor, places: torch.Tensor | None, mask: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The inverse of `pack`, with zeros at padding, for values whose dimensions `dim` and the next are (1, tokens)."""
    if places is None:
        return values
    values = values.flatten(dim, dim + 1)
    padded = values.new_zeros(*values.shape[:dim], mask.numel(), *values.shape[dim + 1 :])
    return padded.index_copy_(dim, places, values).unflatten(dim, mask.shape)


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values (B, N, ...) at index (B, N') along the sequence."""
    shape = index.shape + (1,) * (values.dim() - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))


def positions(mask: torch.Tensor, count_padding: bool = False) -> torch.Tensor:
    """Position of every token, counting real tokens only unless told otherwise: (B, N) long, 0 for padding in front."""
    counted = torch.ones_like(mask, dtype=torch.long) if count_padding else mask.bool().long()
    return (counted.cumsum(1) - 1).clamp_(min=0)


def ids_and_mask(
    name: str, ids: torch.Tensor, mask: torch.Tensor | None, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, N) that were looked at, and their mask (B, N) as bool; without one all are real.

    Args:
        name: what the ids are called in messages.
        ids: (B, N) of int64 or int32.
        mask: (B, N), True or 1 = real token; None = all real.
        vocabulary: how many tokens there are.

    Raises:
        ValueError: a wrong shape or dtype, or, on a CPU, a token outside the vocabulary.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be (batch, length) of token ids, got shape {tuple(ids.shape)} of {ids.dtype}")
    # Free on a CPU; on a GPU it would wait for the device, whose own range check then has to do.
    if ids.device.type == "cpu" and ids.numel():
        worst = min(int(ids.min()), 0) or int(ids.max())
        if not 0 <= worst < vocabulary:
            raise ValueError(f"{name} holds token {worst}, the vocabulary has {vocabulary}")
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"the attention mask of {name} must have its shape {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    return ids, mask.bool()


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of logits (B, C, V) against targets (B, C), -100 ignored, summed and divided by the number of label tokens."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def align_labels(labels: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, published: bool) -> torch.Tensor:
    """Labels moved with the tokens they belong to.

    Args:
        labels: (B, M) of the last M columns of the sequence; -100: none.
        mask: (B, S) bool of the sequence before `squeeze`, True = real token.
        index: (B, S'), what `squeeze` made of it.
        published: leave labels in their columns, as the published code does.

    Returns:
        (B, S'), -100 at padding and where no label was given.
    """
    labels = F.pad(labels, (mask.shape[1] - labels.shape[1], 0), value=-100).masked_fill(~mask, -100)
    return labels[:, -index.shape[1] :] if published else labels.gather(1, index)


def predicting_columns(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets (B, C) of aligned labels (B, S), and the C columns that predict a label in at least one row."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    columns = (shifted != -100).any(0).nonzero().squeeze(1)
    return shifted[:, columns], columns
