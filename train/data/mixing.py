"""How often the records of each language are seen in an epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

TEMPERATURE = "temperature"


class Mixture(NamedTuple):
    """Records by language, and how many of each an epoch has.

    Attributes:
        languages: (n,) language of each record, as a number.
        counts: (L,) int64, so many records of each language in every epoch; more than there are: some are repeated.
    """

    languages: np.ndarray
    counts: np.ndarray

    def told(self, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """{language: {"records": so many there are, "epoch": so many an epoch has}}, of languages that have any."""
        there = np.bincount(self.languages, minlength=len(names)).tolist()
        counts = zip(names, there, self.counts.tolist(), strict=True)
        return {name: {"records": records, "epoch": count} for name, records, count in counts if records}


def check_mixing(mixing: Mapping[str, float]) -> None:
    """Pass the setting `mixing` of a stage: {"temperature": t}, 0 to 1, or {language code: weight}.

    Raises:
        ValueError: anything else.
    """
    if not mixing:
        raise ValueError("mixing: empty; takes temperature, or a weight for each language")
    if TEMPERATURE in mixing:
        if len(mixing) > 1:
            raise ValueError(f"mixing: temperature or weights of languages, not both; got {', '.join(mixing)}")
        if mixing[TEMPERATURE] > 1:
            raise ValueError(f"mixing: temperature must be at least 0 and at most 1, got {mixing[TEMPERATURE]}")
    elif not any(mixing.values()):
        raise ValueError("mixing: all weights are 0")


def mixture(mixing: Mapping[str, float], languages: np.ndarray, names: Sequence[str], stage: str) -> Mixture:
    """What an epoch of a stage is made of.

    It has as many records as there are of the languages whose weight is not 0, shared out in proportion to the weights, or to
    n^temperature for n records of a language (1: as they are, 0: all languages alike).

    Args:
        mixing: the stage's setting.
        languages: (n,) language of each record.
        names: codes of the languages.
        stage: its name, for messages.

    Raises:
        ValueError: a language of the data without a weight, or a weighted one without records.
    """
    present = np.bincount(languages, minlength=len(names))
    if TEMPERATURE in mixing:
        weights = np.where(present > 0, present.astype(float) ** mixing[TEMPERATURE], 0.0)
    else:
        having = [name for place, name in enumerate(names) if present[place]]
        if absent := [name for name in mixing if name not in having and mixing[name]]:
            raise ValueError(f"stages.{stage}.mixing: no records of {', '.join(absent)}; there are {_listed(having)}")
        if missing := [name for name in having if name not in mixing]:
            raise ValueError(
                f"stages.{stage}.mixing: no weight for {_listed(missing)}, of which there are records; 0 leaves one out"
            )
        weights = np.array([mixing.get(name, 0.0) if present[place] else 0.0 for place, name in enumerate(names)])
    counts = _shared_out(int(present[weights > 0].sum()), weights)
    found = Mixture(languages, counts)
    told = [f"{name or 'no language'} {of['epoch']} of {of['records']}" for name, of in found.told(names).items()]
    logger.info("%s: records of an epoch by language: %s", stage, ", ".join(told))
    return found


def mixed(mixture: Mixture, seed: Sequence[int], epoch: int) -> np.ndarray:
    """The records of one epoch, by language, not yet shuffled.

    The records of a language are gone through in a new random order each time all of them have been seen, so that over any
    epochs none is seen twice more often than another.

    Args:
        mixture: languages and counts.
        seed: of the whole order.
        epoch: from 0.
    """
    taken = []
    for language, count in enumerate(mixture.counts.tolist()):
        if not count:
            continue
        records = np.flatnonzero(mixture.languages == language)
        begin, end = epoch * count, (epoch + 1) * count
        rounds = range(begin // len(records), -(-end // len(records)))
        orders = [np.random.default_rng([*seed, 1 + language, number]).permutation(records) for number in rounds]
        first = begin - rounds[0] * len(records)
        taken.append(np.concatenate(orders)[first : first + count])
    return np.concatenate(taken)


def _shared_out(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` in whole numbers in proportion to weights, at least 1 where a weight is not 0; the largest rests are rounded up."""
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return np.where((weights > 0) & (counts == 0), 1, counts)


def _listed(names):
    return ", ".join(name or "no language ('')" for name in names)
