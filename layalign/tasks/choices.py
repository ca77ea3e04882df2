"""Questions with choices: generated answers scored as published, and the choices' log-likelihoods compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from layalign.tasks.task import Record, Scores, Statistics, of_languages, shares

LOGLIKELIHOODS = "loglikelihoods"


class Choices:
    """Three scorers, side by side and never mixed.

    official: the generated text without white space around it is the answer, letter by letter, as published.
    loglikelihood: the choice with the highest of a record's `loglikelihoods` (nats, one a choice) is the answer; the
    first of equal ones. loglikelihood_per_byte: the same, each divided by the UTF-8 bytes of its choice. Both are left
    out unless every record has them.
    """

    def fields(self, prediction: str, answer: str) -> dict[str, Any]:
        """The published verdict."""
        return {"official": prediction.strip() == answer}

    def scores(self, records: Iterable[Record]) -> Scores:
        """The share of right answers."""
        records = list(records)
        scores: Scores = {name: {} for name in self._scorers(records)}
        for name, by_language in scores.items():
            for lang, found in of_languages(records).items():
                rows, score = self._statistics(name, found)
                by_language[lang] = score([sum(column) for column in zip(*rows, strict=True)])
        return scores

    def statistics(self, records: Sequence[Record]) -> dict[str, Statistics]:
        """Right answers and answers, of records of one language."""
        return {name: self._statistics(name, records) for name in self._scorers(records)}

    def _scorers(self, records: Sequence[Record]) -> list[str]:
        scored = bool(records) and all(record.get(LOGLIKELIHOODS) is not None for record in records)
        return [*VERDICTS] if scored else ["official"]

    def _statistics(self, name: str, records: Sequence[Record]) -> Statistics:
        return shares(VERDICTS[name](record) for record in records)


def most_likely(record: Record, per_byte: bool = False) -> str:
    """The choice of a record with the highest log-likelihood, the first of equal ones.

    Raises:
        ValueError: not one log-likelihood a choice, or one that is not a number.
    """
    choices, values = record["choices"], record[LOGLIKELIHOODS]
    if len(values) != len(choices) or any(value != value for value in values):
        where = f"{record['task']}, {record['lang']}, question {record['index']}"
        raise ValueError(f"{where}: loglikelihoods: got {values}, takes a number for each of {choices}")
    if per_byte:
        values = [value / len(choice.encode()) for value, choice in zip(values, choices, strict=True)]
    return choices[max(range(len(choices)), key=values.__getitem__)]


VERDICTS: dict[str, Callable[[Record], bool]] = {
    "official": lambda record: record["official"],
    "loglikelihood": lambda record: most_likely(record) == record["answer"],
    "loglikelihood_per_byte": lambda record: most_likely(record, per_byte=True) == record["answer"],
}
