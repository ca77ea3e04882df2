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


def joined(here: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """A table with what was measured of it elsewhere: of each row the seeds of both, and a row that was not measured here as it was there.
    Where it lay on either machine is left out.

    Args:
        here, earlier: of `make_table`; None: nothing was.
    """
    parts = []
    for place, part in enumerate(here["parts"]):
        others = [{}] * len(part["rows"]) if earlier is None else earlier["parts"][place]["rows"]
        parts.append(part | {"rows": [_joined_rows(*rows) for rows in zip(part["rows"], others, strict=True)]})
    return {**here, "parts": parts}


def _joined_rows(here: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    seeds = {**(earlier.get("seeds") or {}), **(here.get("seeds") or {})}
    if seeds:
        return {**here, **over_seeds({seed: _placeless(seeds[seed]) for seed in sorted(seeds, key=int)})}
    return _placeless(here if here["measured"] is not None or not earlier else earlier)


def _placeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("folder", "evaluation")}


def apart(rows: Sequence[Mapping[str, Any]], column: int = 0) -> Iterator[tuple[str, float, bool]]:
    """How rows differ from the reference.

    Args:
        rows: of one part of a table, each over the same two or more seeds, or untrained with one figure; others are passed over.
        column: whose figures.

    Returns:
        (name, difference of means, whether every seed's figure is on the same side of all of the other's).
    """
    other = next((row for row in rows if row.get("reference") and len(row.get("seeds") or ()) > 1), None)
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
