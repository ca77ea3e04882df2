"""What a task is: how its problems are read, and how answers to them are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple, Protocol

from layalign.languages import MATHEMATICS_GROUPS, Groups

# A JSON object with task, lang, index (its place in its language, from 0), question (str) and answer; where a task has
# choices also choices (list[str], the answer among them).
Problem = dict[str, Any]
# A problem with prediction (str) and what the task's scoring adds; where choices were scored also loglikelihoods
# (list[float], nats, one a choice).
Record = dict[str, Any]
# {scorer: {lang: per cent}}
Scores = dict[str, dict[str, float]]


class Loader(Protocol):
    """Reads a task's problems, those of a language together."""

    def __call__(
        self, data: str | PathLike | None, languages: Sequence[str] | None, limit: int | None
    ) -> list[Problem]:
        """`data`: a folder, a file or a name that the task knows, None for the usual one; the others as in `load_task`."""


class Statistics(NamedTuple):
    """What a score is made of: a function of the sum of one row of numbers a record, so that any records can be drawn.

    Attributes:
        rows: one a record, all of the same length.
        score: function(sum of rows) -> per cent.
    """

    rows: list[Sequence[float]]
    score: Callable[[Sequence[float]], float]


class Scoring(Protocol):
    """How the answers to a task's problems are scored.

    One that also has `statistics(records) -> {scorer: Statistics}` of the records of one language gets intervals and
    comparisons; one that has `signatures() -> {scorer: str}` and `notes() -> list[str]` has them in the results.
    """

    def fields(self, prediction: str, answer: Any) -> dict[str, Any]:
        """JSON values that a record says of one answer."""

    def scores(self, records: Iterable[Record]) -> Scores:
        """{scorer: {lang: per cent}} of records, languages in the order of their first one."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: what it is called on the command line and, unless `load` says otherwise, in its problems.
        load: reads its problems.
        scoring: scores the answers to them.
        prompt: what the published experiments gave the LLM to read, with {text} for the question and, where it needs
            it, {language} for the English name of its language; None where nothing is published. A model's own prompt
            stays the default.
        groups: {"avg": codes, and where the paper has them "lrl" and "hrl": codes}, in the paper's order.
        measure: what its scores are, for the axis of a plot.
    """

    name: str
    load: Loader
    scoring: Scoring
    prompt: str | None = None
    groups: Groups = field(default_factory=lambda: MATHEMATICS_GROUPS)
    measure: str = "accuracy (%)"


@dataclass(frozen=True)
class Verdicts:
    """Scoring where each answer alone is right or wrong.

    Attributes:
        scorers: {name: function(prediction, answer) -> whether it is right}; a record has each verdict under that name.
        readings: {field: function(prediction) -> JSON value}, what else a record says of the prediction.
    """

    scorers: Mapping[str, Callable[[str, Any], bool]]
    readings: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def fields(self, prediction: str, answer: Any) -> dict[str, Any]:
        """Verdicts, then readings."""
        verdicts = {name: scorer(prediction, answer) for name, scorer in self.scorers.items()}
        return verdicts | {name: reading(prediction) for name, reading in self.readings.items()}

    def scores(self, records: Iterable[Record]) -> Scores:
        """The share of right answers."""
        scores: Scores = {name: {} for name in self.scorers}
        for lang, found in of_languages(records).items():
            for name, (rows, score) in self.statistics(found).items():
                scores[name][lang] = score([sum(column) for column in zip(*rows, strict=True)])
        return scores

    def statistics(self, records: Sequence[Record]) -> dict[str, Statistics]:
        """Right answers and answers, of records of one language."""
        return {name: shares(record[name] for record in records) for name in self.scorers}


def of_languages(records: Iterable[Record]) -> dict[str, list[Record]]:
    """{lang: its records}, languages in the order of their first one."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["lang"], []).append(record)
    return found


def shares(verdicts: Iterable[bool]) -> Statistics:
    """The share of true ones, in per cent."""
    return Statistics([(float(verdict), 1.0) for verdict in verdicts], lambda total: 100 * total[0] / total[1])
