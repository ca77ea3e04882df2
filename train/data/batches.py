"""Batches of a token budget: which examples one forward call takes, a function of seed, epoch and lengths alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from layalign.train.data.sampling import EpochSampler

if TYPE_CHECKING:
    from layalign.train.stage_recipe import StageRecipe


class TokenBatches(torch.utils.data.Sampler):
    """Optimizer steps of exactly `step_size` examples, each divided into forward calls with alike numbers of tokens.

    Every step has the same number of calls, as the Trainer needs: the fewest with which each call of each step fits the budget.
    The examples of a step do not depend on the processes: accelerate gives call i to process i modulo their number. The last
    step of an epoch has the examples that are left; calls that get none are empty.

    Args:
        order: the examples of an epoch, in their order.
        lengths: (n,) tokens of each record.
        step_size: examples in one optimizer step.
        budget: tokens of one forward call, at most.
        processes: that train together.
        epochs: so many are looked at for the number of calls.

    Attributes:
        calls: forward calls of one process in one step.

    Raises:
        ValueError: a record longer than the budget.
    """

    def __init__(
        self, order: EpochSampler, lengths: np.ndarray, step_size: int, budget: int, processes: int, epochs: int
    ):
        if len(lengths) and lengths.max() > budget:
            worst = int(lengths.argmax())
            raise ValueError(
                f"batch_tokens: record {worst} of {len(lengths)} (counted from 0) takes {lengths[worst]} positions, more than {budget}; "
                f"raise it to {lengths[worst]}, or lower source_max_length and target_max_length"
            )
        self._order, self._lengths, self._step_size = order, np.asarray(lengths), step_size
        self._processes, self._size = processes, len(order)
        self.calls = 1
        for epoch in range(epochs):
            for step in self._steps(epoch):
                tokens = self._lengths[step]
                self.calls = max(self.calls, -(-int(tokens.sum()) // (budget * processes)))
                while _fullest(tokens, self.calls * processes) > budget:
                    self.calls += 1

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self._size // self._step_size) * self.calls * self._processes

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps(self._order.epoch):
            for call in divide(self._lengths[step], self.calls * self._processes):
                yield step[call].tolist()

    def _steps(self, epoch):
        before = self._order.epoch
        self._order.set_epoch(epoch)
        examples = np.fromiter(self._order, dtype=np.int64)
        self._order.set_epoch(before)
        return [examples[start : start + self._step_size] for start in range(0, len(examples), self._step_size)]


class EvaluationBatches(torch.utils.data.Sampler):
    """The held-out records, each once, in a number of batches that the processes divide: at the end some are empty. No batch holds
    records of two languages, so that each has its own loss and none is read twice.

    Args:
        lengths: (n,) tokens of each record.
        processes: that evaluate together.
        size: records in a batch; None: as many as the budget takes, at least one.
        budget: tokens of a batch.
        languages: (n,) number of each record's language; None: all of one.

    Attributes:
        languages: of each batch; -1 of one that is empty.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        processes: int,
        size: int | None,
        budget: int = 0,
        languages: np.ndarray | None = None,
    ):
        languages = np.zeros(len(lengths), dtype=np.int64) if languages is None else languages
        self._batches: list[list[int]] = [[]]
        self.languages = [int(languages.min()) if len(languages) else -1]
        tokens = 0
        for index in np.argsort(languages, kind="stable").tolist():
            batch, length, language = self._batches[-1], int(lengths[index]), int(languages[index])
            full = len(batch) >= size if size is not None else bool(batch) and tokens + length > budget
            if full or language != self.languages[-1]:
                self._batches.append(batch := [])
                self.languages.append(language)
                tokens = 0
            batch.append(index)
            tokens += length
        empty = -len(self._batches) % processes
        self._batches += [[] for _ in range(empty)]
        self.languages += [-1] * empty

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def check_budget(stage: StageRecipe) -> None:
    """Look at a stage's batch_tokens beside its other settings.

    Raises:
        ValueError: ones that it does not go with.
    """
    if stage.batch_tokens is None:
        return
    if not stage.packing:
        raise ValueError(
            "batch_tokens: counts the tokens of packed batches, but packing is not true; set it, or give batch_size"
        )
    if stage.global_batch_size is None:
        raise ValueError("batch_tokens: needs global_batch_size, the examples of one optimizer step (128 in the paper)")
    if stage.batch_size != type(stage).__dataclass_fields__["batch_size"].default:
        raise ValueError(f"batch_tokens: takes the place of batch_size, got {stage.batch_size}; give one of them")
    if stage.length_grouped:
        raise ValueError("length_grouped: is about padding, and batch_tokens leaves none; give one of them")


def divide(tokens: np.ndarray, parts: int) -> list[list[int]]:
    """Examples divided into so many parts with alike sums: the longest first, each into the part that has the least so far.

    Args:
        tokens: (n,) of each example.
        parts: how many; those beyond n are empty.

    Returns:
        the indices of each part, ascending.
    """
    heap = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for index in np.argsort(-tokens, kind="stable").tolist():
        total, part = heapq.heappop(heap)
        found[part].append(index)
        heapq.heappush(heap, (total + int(tokens[index]), part))
    return [sorted(part) for part in found]


def _fullest(tokens: np.ndarray, parts: int) -> int:
    return max(int(tokens[part].sum()) for part in divide(tokens, parts) if part)
