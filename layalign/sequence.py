"""What the LLM reads, [bos] [adapter output] [boundary] [prompt and target] with its padding squeezed out, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Share of padding from which packing pays for moving the encoder states and the results once more. Adapter and aligner with
# it against without, on a CPU (De 512 to 768, 8 to 12 states, 128 to 768 positions): 0.95 to 1.02 of the time at a share of 0.05,
# 0.89 to 0.97 at 0.1, 0.51 to 0.71 at 0.5, with gradients or without.
PACKED_FROM = 0.1

# The end of a span that grows with the sequence: the operators cut it to the keys that there are.
OPEN = 2**31 - 1


class Padding(NamedTuple):
    """What is known of a sequence's padding without asking a device.

    Attributes:
        span: (B, 2) int32, begin and end of each row's real tokens; None: all are real.
    """

    span: torch.Tensor | None


class Lengths(NamedTuple):
    """The numbers of real tokens of each row: what a call has to know of its masks, `measure` asks a GPU for in one wait, and a
    caller may know already; then nothing waits, and prefill or a training step can be captured in a CUDA graph.

    Attributes:
        encoder: of encoder_input_ids.
        text: of input_ids, None where there are none.
        labels: how many real tokens come after a token with a label, each number that occurs in some row; None: logits of all of
            input_ids are computed.
    """

    encoder: Sequence[int]
    text: Sequence[int] | None = None
    labels: Sequence[int] | None = None


class Part(NamedTuple):
    """Embeddings (B, N, Dl), their mask (B, N) bool, and the number of real tokens of each row where it is known."""

    embeddings: torch.Tensor
    mask: torch.Tensor
    lengths: Sequence[int] | None


class Assembled(NamedTuple):
    """What the LLM reads, its padding squeezed to the left.

    Attributes:
        embeddings: (B, S, Dl).
        mask: (B, S) bool, True = real token.
        labels: (B, S), -100 where no loss, or None.
        padding: the mask as spans.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor | None
    padding: Padding


class Squeezed(NamedTuple):
    """A sequence with its padding on one side.

    Attributes:
        places: (B, N') long, where its tokens were; the order of real tokens is kept. N' is at least 1.
        mask: (B, N') bool, True = real token.
        tokens: the number of real tokens; None: not known.
        padding: the mask once more, as spans.
    """

    places: torch.Tensor
    mask: torch.Tensor
    tokens: int | None
    padding: Padding


def measure(
    encoder: tuple[torch.Tensor, torch.Tensor | None],
    text: tuple[torch.Tensor | None, torch.Tensor | None],
    labels: torch.Tensor | None,
    published: bool,
) -> Lengths | None:
    """The Lengths of a call, by one wait for a GPU, or none where there are neither masks nor labels.

    Args:
        encoder, text: ids (B, N) and their mask or None.
        labels: (B, M), those of the text, or None.
        published: of `align_labels`.

    Returns:
        None for shapes that do not fit, of which others have more to say, and under torch.compile.
    """
    if torch.compiler.is_compiling():
        return None
    given = [(ids, mask) for ids, mask in (encoder, text) if ids is not None]
    if any(ids.dim() != 2 or (mask is not None and mask.shape != ids.shape) for ids, mask in given):
        return None
    if labels is not None and (text[0] is None or labels.shape != text[0].shape):
        return None
    asked = [mask.bool().sum(1) for _, mask in given if mask is not None]
    if labels is not None:
        asked.append(_label_distances(labels, text[1], published))
    answers = iter(torch.cat(asked).tolist() if asked else ())
    known = [[ids.shape[1]] * len(ids) if mask is None else [next(answers) for _ in ids] for ids, mask in given]
    found = None if labels is None else [distance for distance, occurs in enumerate(answers) if occurs]
    return Lengths(known[0], known[1] if len(known) > 1 else None, found)


def _label_distances(labels, mask, published):
    """Whether each number (M,) of real tokens comes after a label in some row."""
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    after = torch.ones_like(mask) if published else mask
    after = after.long().flip(1).cumsum(1).flip(1) - after.long()
    labelled = ((labels != -100) & mask).long()
    return labelled.new_zeros(labels.shape[1]).scatter_reduce(0, after.flatten(), labelled.flatten(), "amax")


def squeeze(mask: torch.Tensor, side: str, lengths: Sequence[int] | None = None) -> Squeezed:
    """Move the padding of each row to one side and drop columns that are padding in every row.

    Args:
        mask: (B, N) bool, True = real token; any pattern.
        side: "left" or "right", where the padding goes; spans of padding on the left are open, for tokens to come.
        lengths: the number of real tokens of each row. Without it a GPU is waited for; under torch.compile, where a shape must not
            hang on values, all columns are kept.

    Raises:
        ValueError: on a CPU, lengths that the mask has not.
    """
    counts = mask.sum(1)
    longest: int
    tokens: int | None
    if lengths is not None:
        _check_lengths(lengths, counts)
        longest, tokens = max([0, *lengths]), sum(lengths)
    elif torch.compiler.is_compiling():
        longest, tokens = mask.shape[1], None
    elif mask.numel():
        longest, tokens = torch.stack([counts.max(), counts.sum()]).tolist()
    else:
        longest = tokens = 0
    if mask.numel():
        longest = max(longest, 1)
    key = mask if side == "left" else ~mask
    order = key.to(torch.int8).argsort(dim=1, stable=True)
    index = order[:, -longest:] if side == "left" else order[:, :longest]
    span = None
    if tokens != longest * len(mask):
        zeros = torch.zeros_like(counts)
        ends = (longest - counts, zeros + OPEN) if side == "left" else (zeros, counts)
        span = torch.stack(ends, 1).to(torch.int32)
    return Squeezed(index, mask.gather(1, index), tokens, Padding(span))


def join(parts: Sequence[Part], dtype: torch.dtype, labels: torch.Tensor | None, published: bool) -> Assembled:
    """Parts of a sequence, at least one, end to end and squeezed to the left.

    Args:
        parts: in their order.
        dtype: of the embeddings.
        labels: (B, M) of the last M columns, or None.
        published: of `align_labels`.
    """
    embeddings = torch.cat([part.embeddings.to(dtype) for part in parts], 1)
    mask = torch.cat([part.mask for part in parts], 1)
    known = [part.lengths for part in parts if part.lengths is not None]
    lengths = [sum(of_row) for of_row in zip(*known, strict=True)] if len(known) == len(parts) else None
    squeezed = squeeze(mask, "left", lengths)
    if labels is not None:
        labels = align_labels(labels, mask, squeezed.places, published)
        if not published:  # what stands first in a row is predicted by nothing, least of all by the padding before it
            labels = labels.masked_fill(squeezed.mask.cumsum(1) == 1, -100)
    return Assembled(take(embeddings, squeezed.places), squeezed.mask, labels, squeezed.padding)


def _check_lengths(lengths, counts):
    if len(lengths) != len(counts):
        raise ValueError(f"lengths: got {len(lengths)} numbers, takes one for each of {len(counts)} rows")
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and list(lengths) != counts.tolist():
        raise ValueError(f"lengths: got {list(lengths)}, the masks have {counts.tolist()} real tokens")


def real_tokens(mask: torch.Tensor, tokens: int | None) -> torch.Tensor | None:
    """Where the real tokens lie in the flattened mask (B, T), (tokens,) long; None where they are too many for packing to pay."""
    if tokens is None or torch.compiler.is_compiling() or mask.numel() - tokens <= PACKED_FROM * mask.numel():
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
    if ids.shape[0] == 0:
        raise ValueError(f"{name} holds no rows, takes one for each example, got shape {tuple(ids.shape)}")
    # Free on a CPU; on a GPU it would wait for the device, whose own range check then has to do.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
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


def check_label_shape(labels: torch.Tensor, input_ids: torch.Tensor | None) -> None:
    """Raises ValueError unless labels (B, M) are of input_ids (B, M)."""
    if input_ids is None or labels.shape != input_ids.shape:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {got}")


def checked_labels(labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Labels as int64, looked at.

    Args:
        labels: of int64 or int32, a token of the vocabulary each, or -100: no loss.
        vocabulary: how many tokens there are.

    Raises:
        ValueError: a wrong dtype, or, on a CPU, another number.
    """
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be token ids of int64 or int32, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocabulary))]
        if wrong.numel():
            raise ValueError(
                f"labels holds {int(wrong[0])}, takes tokens from 0 to {vocabulary - 1}, and -100 where there is no loss"
            )
    return labels.long()


def mean_loss(
    total: torch.Tensor, targets: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """A summed cross-entropy divided by the number of label tokens, those of targets (B, C) where none is given."""
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


def predicting_columns(labels: torch.Tensor, lengths: Lengths | None, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets (B, C) of aligned labels (B, S), and the C columns that predict them.

    Args:
        labels: of `align_labels`.
        lengths: without those of labels, the columns of all that may have one.
        most: M, how many those are.
    """
    last = labels.shape[1] - 2  # predicts the last token
    if lengths is None or lengths.labels is None:
        columns = torch.arange(max(last + 1 - most, 0), last + 1, device=labels.device)
    else:
        places = [last - distance for distance in reversed(lengths.labels) if distance <= last]
        columns = torch.tensor(places, dtype=torch.long, device=labels.device)
    return labels[:, columns + 1], columns


def kept_columns(logits_to_keep: int | torch.Tensor, states: torch.Tensor) -> int | torch.Tensor:
    """`logits_to_keep` as columns, where it is the number of some last ones.

    transformers slices by a number. On a CPU torch multiplies a slice (B, n, Dl), whose rows do not follow each other, by B copies
    of an output layer that is frozen (one that is trained it takes as it lies): of SmolLM2-135M in bf16, 25 texts and one thread of
    a CPU with AVX512-BF16, 4.3 s, where states picked by columns take 13 ms.

    Args:
        logits_to_keep: of a model's forward call.
        states: (B, S) or (B, S, Dl), what the LLM reads.
    """
    length = states.shape[1]
    if isinstance(logits_to_keep, torch.Tensor) or not 0 < logits_to_keep < length:
        return logits_to_keep
    return torch.arange(length - logits_to_keep, length, device=states.device)


def last_column(llm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What an LLM's `generate` is told so that it picks its last states instead of slicing them; nothing where it makes all logits."""
    if "logits_to_keep" not in inspect.signature(llm.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1], device=llm.device)}


def label_places(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, M) replaced by their columns, -100 where there is none: aligned in their stead, these tell where each came from."""
    if labels.dim() != 2:
        return labels  # refused with its shape by those who read it
    return torch.arange(labels.shape[1], device=labels.device).expand_as(labels).masked_fill(labels == -100, -100)


def at_places(labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Labels (B, M) at places (B, C) of `label_places`, -100 where there is none."""
    return labels.gather(1, places.clamp(min=0)).masked_fill(places == -100, -100)


def back_in_place(
    logits: torch.Tensor, places: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C, V) as (B, M, V), in the columns of the labels that they predict, zeros elsewhere; and labels (B, M), -100 where
    nothing predicts one.

    Args:
        logits: of the columns that `predicting_columns` found.
        places: (B, C), where in its row the label of each was, -100: nowhere.
        labels: (B, M).
    """
    real, index = places != -100, places.clamp(min=0)
    # At most one of those that are added to an element is not zero, so that nothing is rounded.
    spread = logits.new_zeros(*labels.shape, logits.shape[-1])
    spread = spread.scatter_add(1, index[..., None].expand_as(logits), logits.masked_fill(~real[..., None], 0))
    scored = torch.zeros_like(labels).scatter_add(1, index, real.to(labels.dtype)) > 0
    return spread, labels.masked_fill(~scored, -100)
