"""What a plan looks at of a stage's data: how many records there are, some of an epoch, and the longest; never all in memory."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from layalign.train.data.data_source import DataSource
from layalign.train.data.mixing import mixture
from layalign.train.data.sources import Line, stream_sources
from layalign.train.recipe import Recipe
from layalign.train.stage_recipe import StageRecipe

SAMPLE = 2000


class Found(NamedTuple):
    """A stage's data.

    Attributes:
        epoch: examples of one.
        sample: at most SAMPLE of them; where languages are mixed, each has its share, its records again where it has too few.
        whole: whether the sample is all of an epoch.
        longest: of what an epoch may have the records with the most characters, a batch of them.
    """

    epoch: int
    sample: list[Line]
    whole: bool
    longest: list[Line]


def records(name: str, recipe: Recipe, notes: list[str]) -> tuple[Found | None, int | None]:
    """What a stage trains on, None where it is not there, and how many records are held out.

    Args:
        name: of the stage.
        recipe: its data files need not be there.
        notes: what could not be known, and why, is added to them.
    """
    stage = recipe.stages[name]
    sources = (*stage.data, *(stage.eval_data or ()))
    missing = [str(path) for source in sources for path in source.files(recipe.data_root) if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        notes.append(f"{name}: data files are missing: {', '.join(missing[:3])}{more}")
        return None, stage.hold_out or None
    if recipe.decontaminate is not None:
        notes.append(f"{name}: decontaminate is not applied here; the examples may be fewer")
    try:
        seen = _read(stage.data, recipe.data_root, stage.mixing is not None, stage.batch_size)
        held_out = stage.hold_out
        if stage.eval_data:
            held_out = sum(part.count for part in _read(stage.eval_data, recipe.data_root, False, 0).values())
    except (ValueError, ImportError) as error:
        notes.append(f"{name}: the data cannot be read: {error}")
        return None, stage.hold_out or None
    count = sum(part.count for part in seen.values())
    left = count - (0 if stage.eval_data else stage.hold_out)
    if left <= 0:
        notes.append(f"{name}: hold_out {stage.hold_out} of {count} records leave none to train on")
        return None, stage.hold_out
    draw = np.random.default_rng(recipe.seed)
    if stage.mixing is not None:
        return _mixed(seen, stage, left / count, name, draw), held_out
    (part,) = seen.values()
    # Of records that are all here, training holds out just these.
    kept = np.sort(draw.permutation(len(part.sample))[max(len(part.sample) - left, 0) :])
    return Found(left, [part.sample[place] for place in kept], len(kept) == left, part.longest()), held_out


def limit(stage: StageRecipe) -> int | None:
    """The most examples that a recipe takes of data that are not there; None: any number."""
    count = 0
    for source in stage.data:
        parts = len(source.languages or ()) if "{lang" in (source.path or "") + (source.target_path or "") else 1
        if source.limit is not None:
            count += parts * source.limit
        elif source.limit_per_language is not None and source.languages:
            count += len(source.languages) * source.limit_per_language
        else:
            return None
    return max(count - (0 if stage.eval_data else stage.hold_out), 1)


class _Seen:
    """Records that were gone through: how many, SAMPLE of them, each as likely as any other, and those with the most characters."""

    def __init__(self, batch: int):
        self.count, self._batch = 0, batch
        self.sample: list[Line] = []
        self._longest: list[tuple[int, int, Line]] = []
        self._draw = np.random.default_rng(0)

    def add(self, line: Line) -> None:
        self.count += 1
        if len(self.sample) < SAMPLE:
            self.sample.append(line)
        elif (place := int(self._draw.integers(self.count))) < SAMPLE:
            self.sample[place] = line
        entry = (_characters(line), self.count, line)
        if len(self._longest) < self._batch:
            heapq.heappush(self._longest, entry)
        elif self._batch and entry[0] > self._longest[0][0]:
            heapq.heapreplace(self._longest, entry)

    def longest(self) -> list[Line]:
        return [line for _, _, line in self._longest]


def _read(sources: Sequence[DataSource], data_root: str | None, by_language: bool, batch: int) -> dict[str, _Seen]:
    """The records of some sources by language, or all as one."""
    seen: dict[str, _Seen] = {}
    for line in stream_sources(sources, data_root, lambda _: None):
        key = line.record["lang"] if by_language else ""
        if key not in seen:
            seen[key] = _Seen(batch)
        seen[key].add(line)
    return seen


def _mixed(seen: Mapping[str, _Seen], stage: StageRecipe, left: float, name: str, draw: np.random.Generator) -> Found:
    """An epoch of mixed languages, of whose records a share is left when some are held out."""
    names = sorted(seen)
    places = np.repeat(np.arange(len(names)), [seen[code].count for code in names])
    counts = mixture(stage.mixing or {}, places, names, name).counts
    epoch = max(round(int(counts.sum()) * left), 1)
    size = min(epoch, SAMPLE)
    shares = np.diff(np.rint(np.cumsum(counts) * size / counts.sum()), prepend=0).astype(int)
    sample: list[Line] = []
    longest: list[Line] = []
    whole = left == 1 and size == epoch
    for code, count, share in zip(names, counts.tolist(), shares.tolist(), strict=True):
        part = seen[code]
        sample += [part.sample[place] for place in np.resize(draw.permutation(len(part.sample)), share)]
        longest += part.longest() if count else []
        whole = whole and count % part.count == 0
    return Found(epoch, sample, whole, heapq.nlargest(stage.batch_size, longest, _characters))


def _characters(line: Line) -> int:
    return len(line.record["source"]) + len(line.record["target"])
