"""Whether this library became slower: its times over the yardstick of their run, now and as recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.report.results import Results, read_results
from layalign.figures import markdown_table

# Seconds of a call by which a CPU's rows may be slower anyway: what Python takes around a decoding step of 0.1 ms was 30 us
# in one process and 50 in the next.
CPU_SLACK = 50e-6


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One of our rows on both sides. recorded, now: time over the yardstick; change: 0.25 is a quarter slower; seconds: of a
    call now; slack: those that do not count."""

    suite: str
    case: str
    implementation: str
    fullname: str
    recorded: float
    now: float
    seconds: float
    slack: float

    @property
    def change(self) -> float:
        """Of the time over the yardstick."""
        return self.now / self.recorded - 1

    def is_slower(self, tolerance: float) -> bool:
        """Past the tolerance, and by more than the slack."""
        return self.seconds * (1 - self.recorded * (1 + tolerance) / self.now) > self.slack


class Comparisons(NamedTuple):
    """both: rows on both sides; only_recorded, only_now: names of the others."""

    both: list[Comparison]
    only_recorded: list[str]
    only_now: list[str]


def recorded_for(kind: str, folder: str | Path) -> Results:
    """The results of that kind of machine under `folder`.

    Raises:
        ValueError: there are none; the message names the kinds which are there.
    """
    path = Path(folder) / kind / "benchmarks.json"
    if not path.exists():
        kinds = sorted(found.parent.name for found in Path(folder).glob("*/benchmarks.json"))
        raise ValueError(f"{folder} has no results of {kind}; it has {', '.join(kinds) or 'none at all'}")
    return read_results(path)


def compare(now: Results, recorded: Results) -> Comparisons:
    """Our rows that are not their own yardstick.

    Raises:
        ValueError: the two have no row in common, so nothing would be checked.
    """
    sides = [
        {(row.suite, row.case, row.implementation): row for row in side.rows if _is_compared(row)}
        for side in (now, recorded)
    ]
    mine, theirs = sides
    both = [key for key in theirs if key in mine]
    if not both:
        raise ValueError(f"{now.path} and {recorded.path} share no row of ours with a yardstick")
    comparisons = [
        Comparison(
            **dict(zip(("suite", "case", "implementation"), key, strict=True)),
            fullname=mine[key].fullname,
            recorded=theirs[key].ratio,
            now=mine[key].ratio,
            seconds=mine[key].median,
            slack=0.0 if now.on_gpu else CPU_SLACK,
        )
        for key in both
    ]
    only_recorded, only_now = (
        [", ".join(key) for key in a if key not in b] for a, b in ((theirs, mine), (mine, theirs))
    )
    return Comparisons(comparisons, only_recorded, only_now)


def table(comparisons: Sequence[Comparison], tolerance: float) -> str:
    """Markdown; the rows that changed most are last, next to the prompt."""
    lines = [
        [
            ", ".join((one.suite, one.case, one.implementation)),
            f"{one.recorded:.3f}",
            f"{one.now:.3f}",
            f"{one.change:+.1%}",
            "slower" if one.is_slower(tolerance) else "",
        ]
        for one in sorted(comparisons, key=lambda one: one.change)
    ]
    return "\n".join(markdown_table(["time over the yardstick", "recorded", "now", "change", ""], lines))


def _is_compared(row):
    return row.ours and row.ratio is not None and row.implementation != row.yardstick
