"""What a task is: how its problems are read, and how answers to them are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol

# A JSON object with task, lang, index (its place in its language, from 0), question (str) and answer.
Problem = dict[str, Any]
# A problem with prediction (str) and what the task's scoring adds.
Record = dict[str, Any]
# {scorer: {lang: per cent}}
Scores = dict[str, dict[str, float]]


class Loader(Protocol):
    """Reads a task's problems, those of a language together."""

    def __call__(
        self, data: str | PathLike | None, languages: Sequence[str] | None, limit: int | None
    ) -> list[Problem]:
        """`data`: a folder, a file or a name that the task knows, None for the usual one; the others as in `load_task`."""


class Scoring(Protocol):
    """How the answers to a task's problems are scored."""

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
        prompt: the template published for what the LLM reads, with {text}; None where there is none.
    """

    name: str
    load: Loader
    scoring: Scoring
    prompt: str | None = None


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
        verdicts: dict[str, dict[str, list[bool]]] = {name: {} for name in self.scorers}
        for record in records:
            for name, by_language in verdicts.items():
                by_language.setdefault(record["lang"], []).append(record[name])
        return {
            name: {lang: 100 * sum(found) / len(found) for lang, found in by_language.items()}
            for name, by_language in verdicts.items()
        }
