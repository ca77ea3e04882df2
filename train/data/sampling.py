"""Which records a stage trains on in an epoch, and in which order: a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from layalign.train.data.mixing import Mixture, mixed

_GROUPED_BATCHES = 50
_BLOCK = 1 << 16


def epoch_order(
    size: int,
    generator: np.random.Generator,
    mixture: Mixture | None = None,
    seed: Sequence[int] = (),
    epoch: int = 0,
) -> np.ndarray:
    """The records of one epoch, shuffled.

    Args:
        size: number of records.
        generator: seeded by seed and epoch.
        mixture: how many records of each language an epoch has; None: every record once.
        seed, epoch: for a mixture, whose records of one epoch depend on those of the ones before.

    Returns:
        (m,) int64; `epoch_size` of them in every epoch. A mixture's may have records more than once, and leave others out.
    """
    if mixture is None:
        return generator.permutation(size)
    return generator.permutation(mixed(mixture, seed, epoch))


def epoch_size(size: int, mixture: Mixture | None = None) -> int:
    """How many records an epoch has, of `size` that there are."""
    return size if mixture is None else int(mixture.counts.sum())


class EpochSampler(torch.utils.data.Sampler):
    """A permutation of the records that is a function of seed and epoch, so that a resumed run needs no random state
    for it.

    Args:
        size: number of records.
        seed: int or tuple of ints.
        batch_size: records in one forward call.
        lengths: (size,) length of each record, to batch similar ones together; None: any with any.
        mixture: how many records of each language an epoch has; None: every record once.
        multiple: an epoch is filled up with its first records to a multiple of this many, so that its last step, too, takes the
            same records in any number of processes (accelerate would fill it up to a multiple of theirs); 1: not filled up.
    """

    def __init__(
        self,
        size: int,
        seed: int | tuple[int, ...],
        batch_size: int,
        lengths: np.ndarray | None = None,
        mixture: Mixture | None = None,
        multiple: int = 1,
    ):
        self.size, self.seed, self.batch_size, self.lengths, self.epoch = size, seed, batch_size, lengths, 0
        self.mixture, self.multiple = mixture, multiple

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-epoch_size(self.size, self.mixture) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        seed = np.atleast_1d(self.seed).tolist()
        generator = np.random.default_rng([*seed, self.epoch])
        order = epoch_order(self.size, generator, self.mixture, seed, self.epoch)
        if self.lengths is not None:
            order = self._group(order, generator)
        order = np.resize(order, len(self))
        # A list of all of them takes 40 bytes a record, for a whole epoch.
        return (index for start in range(0, len(order), _BLOCK) for index in order[start : start + _BLOCK].tolist())

    def _group(self, order, generator):
        """Sort by length within runs of some batches, and shuffle the batches. Only the last batch may be a short
        one.
        """
        run = self.batch_size * _GROUPED_BATCHES
        runs = [order[start : start + run] for start in range(0, len(order), run)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in runs])
        whole = len(order) - len(order) % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        return np.concatenate([generator.permutation(batches).reshape(-1), order[whole:]])
