"""RESULTS/first_light.json, what every step came to, and RESULTS/first_light.md, what a reader wants of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.first_light.stages import Stage
from bench.first_light.supervise import Outcome
from bench.report.goals import goal_table
from bench.report.results import read_results
from bench.report.tables import described, full_report
from layalign.kernels.files import write_json, write_text

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels", "layalign", "bench", "tests")


class Record:
    """The outcomes of steps by name, of one GPU and one state of the sources; those of another are not read.

    before: a folder of the same, whose outcomes and rows are gone on from where `results` has none. fresh: steps to forget.
    """

    def __init__(self, results: Path, gpu: str, before: Path | None = None, fresh: Collection[str] = ()):
        self.results, self.path = results, results / "first_light.json"
        self.about = {"gpu": gpu, "sources": hash_of_sources()}
        self.outcomes: dict[str, Outcome] = {}
        self.forgot: str | None = None  # why an earlier record is not gone on from
        for folder in (results, *([before] if before else [])):
            if (folder / self.path.name).exists() and not self.outcomes:
                self._read(folder / self.path.name, fresh)
                self._take_rows(folder)

    def _read(self, path, fresh):
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in self.about if found.get(name) != self.about[name]]
        if other:
            self.forgot = f"{path} is of other {' and '.join(other)}: all steps begin anew"
        else:
            kept = {name: outcome for name, outcome in found["steps"].items() if name not in fresh}
            self.outcomes = {name: Outcome(**outcome) for name, outcome in kept.items()}

    def _take_rows(self, folder):
        """Those that the steps done before have measured."""
        for path in folder.glob("*/benchmarks.json") if self.outcomes and folder != self.results else ():
            place = self.results / path.parent.name / path.name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)

    def keep(self, step: str, outcome: Outcome) -> None:
        """On disk, whole."""
        self.outcomes[step] = outcome
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.about | {"steps": {name: asdict(one) for name, one in self.outcomes.items()}})

    def report(self, stages: list[Stage]) -> str:
        """Markdown: the steps, the tests that failed, and last the goals. Also written, with the tables of all rows."""
        lines = ["# First light", "", f"On {self.about['gpu']}."]
        for stage in stages:
            steps = {step.name: self.outcomes.get(step.name) for step in stage.steps}
            lines += ["", f"## {stage.name}: {stage.what}", ""]
            for name, outcome in steps.items():
                lines += [f"- {name}: {summary(outcome) if outcome else 'not begun'}", *_failing(outcome)]
        for path in sorted(self.results.glob("*/benchmarks.json")):
            results = read_results(path)
            if results.rows or results.failures:
                write_text(path.with_name("results.md"), full_report(results))
                lines += [
                    "",
                    f"## Goals on {results.machine['device']}",
                    "",
                    described(results),
                    "",
                    *goal_table(results),
                ]
        text = "\n".join(lines) + "\n"
        write_text(self.results / "first_light.md", text)
        return text


def summary(outcome: Outcome) -> str:
    """One line."""
    counts: dict[str, int] = {}
    for test in outcome.tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    words = [f"{count} {name}" for name, count in sorted(counts.items())]
    words += [f"{outcome.seconds:.0f} s"] + ([outcome.note] if outcome.note else [])
    return f"{outcome.status}; {', '.join(words)}"


def hash_of_sources() -> str:
    """Of all Python files that a step may run: results of another state are not gone on from."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _failing(outcome: Outcome | None) -> list[str]:
    lines: list[dict[str, Any]] = [] if outcome is None else outcome.tests
    failed = [line for line in lines if line["outcome"] == "failed"]
    return [f"  - {line['test'].partition('::')[2]}: {line['message']}" for line in failed]
