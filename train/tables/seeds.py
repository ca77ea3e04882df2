"""A row over several seeds: its mean, how far it spreads, and whether that is less than what sets it apart from another row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


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


class Apart(NamedTuple):
    """How a row differs from the reference: the difference of means over `seeds` seeds that both have, and whether every figure of one lies
    on the same side of all of the other's. seeds: 0 of a row that is not trained, 1 of one that cannot be compared yet."""

    name: str
    difference: float
    beyond: bool
    seeds: int


def apart(rows: Sequence[Mapping[str, Any]], column: int = 0) -> Iterator[Apart]:
    """How rows differ from the reference, where that has two seeds or more.

    Args:
        rows: of one part of a table; those without figures are passed over.
        column: whose figures.
    """
    other = next((row for row in rows if row.get("reference") and len(row.get("seeds") or ()) > 1), None)
    if other is None or not _numbers(_figures(other, column)):
        return
    for row in rows:
        if row is other or not _numbers(_figures(row, column)):
            continue
        both = sorted(other["seeds"].keys() & row["seeds"].keys(), key=int) if row.get("seeds") else None
        own, theirs = _figures(row, column, both), _figures(other, column, both)
        if both is not None and len(both) < 2:
            yield Apart(row["name"], 0.0, False, 1)
            continue
        difference = statistics.fmean(own) - statistics.fmean(theirs)
        beyond = max(own) < min(theirs) or min(own) > max(theirs)
        yield Apart(row["name"], difference, beyond, 0 if both is None else len(both))


def by_luck(seeds: int) -> float:
    """How often all figures of one row would lie on one side of all of another's if nothing but the seeds, so many each, told them
    apart: 2 n! n! / (2 n)!."""
    return 2 / math.comb(2 * seeds, seeds)


def _figures(row: Mapping[str, Any], column: int, seeds: Sequence[str] | None = None) -> list[Any]:
    if row.get("seeds"):
        return [line["measured"][column] for seed, line in row["seeds"].items() if seeds is None or seed in seeds]
    return [] if row["measured"] is None else [row["measured"][column]]


def _numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) for value in values)
