"""A row over several seeds: its mean, how far it spreads, and whether that is less than what sets it apart from another row."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def over_seeds(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One line of a table of what several seeds gave.

    Args:
        found: {seed: what `measure` returned}.

    Returns:
        {"measured": means, a figure a column, "spread": sample standard deviations, None where there are none (words, one seed), "seeds":
        {seed: what was given}, and "questions" a language and "trained_millions", which no seed changes}.
    """
    lines = list(found.values())
    columns = list(zip(*(line["measured"] for line in lines), strict=True))
    return {
        "measured": [statistics.fmean(values) if _numbers(values) else values[0] for values in columns],
        "spread": [statistics.stdev(values) if _numbers(values) and len(values) > 1 else None for values in columns],
        "why": None,
        "questions": lines[0].get("questions"),
        "trained_millions": lines[0].get("trained_millions"),
        "seeds": {seed: dict(line) for seed, line in found.items()},
    }


def apart(rows: Sequence[Mapping[str, Any]], column: int = 0) -> Iterator[tuple[str, float, bool]]:
    """How rows differ from the one that is the recipe as it is.

    Args:
        rows: of one part of a table, each over the same two or more seeds, or untrained with one figure; others are passed over.
        column: whose figures.

    Returns:
        (name, difference of means, whether every seed's figure is on the same side of all of the other's).
    """
    other = next((row for row in rows if row.get("as_is") and len(row.get("seeds") or ()) > 1), None)
    if other is None or not _numbers(_figures(other, column)):
        return
    theirs = _figures(other, column)
    for row in rows:
        own = _figures(row, column)
        # A row whose seeds are not all made yet waits.
        if row is other or not _numbers(own) or (row.get("seeds") and row["seeds"].keys() != other["seeds"].keys()):
            continue
        difference = statistics.fmean(own) - statistics.fmean(theirs)
        yield row["name"], difference, max(own) < min(theirs) or min(own) > max(theirs)


def _figures(row: Mapping[str, Any], column: int) -> list[Any]:
    if row.get("seeds"):
        return [line["measured"][column] for line in row["seeds"].values()]
    return [] if row["measured"] is None else [row["measured"][column]]


def _numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) for value in values)
