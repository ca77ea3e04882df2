"""How sure a score is, and whether two runs differ: bootstrap over the questions of a task.

A draw takes as many questions as there are, with replacement, and scores them. Languages with the same number of questions
are drawn alike, question by question: in MGSM, XNLI and the like the same question stands in every language, and an
average over languages is less sure than independent draws would make it seem. An interval holds the middle 95 % of the
draws. Where every answer is right, or none is, it has no width: that says nothing of questions not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from layalign import figures
from layalign.evaluation.report import AVERAGES, ordered_languages, summarize
from layalign.languages import MATHEMATICS_GROUPS, Groups
from layalign.spelling import check_count
from layalign.tasks import Scoring
from layalign.tasks.task import Record, Statistics, of_languages

DRAWS = 1000
LEVEL = 0.95


def intervals(
    records: Iterable[Record],
    scoring: Scoring,
    groups: Groups = MATHEMATICS_GROUPS,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """The 95 % percentile interval of each score.

    Args:
        records: of one task.
        scoring: the task's; one without `statistics` gives no intervals.
        groups: the task's averages.
        draws: how many.
        seed: of the draws.

    Returns:
        {scorer: {group or lang: [low, high]}}, in the unit of the scores.
    """
    by_language = of_languages(records)
    if not hasattr(scoring, "statistics") or not by_language:
        return {}
    found = _Draws(draws, seed).scores(scoring, by_language)
    return {
        scorer: {name: _ends(values) for name, values in _with_averages(of_scorer, groups).items()}
        for scorer, of_scorer in found.items()
    }


def compare(
    records_a: Iterable[Record],
    records_b: Iterable[Record],
    scoring: Scoring,
    groups: Groups = MATHEMATICS_GROUPS,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Two runs on the same problems, question by question.

    Args:
        records_a, records_b: of one task, in any order.
        scoring: the task's.
        groups: the task's averages.
        draws: how many.
        seed: of the draws.

    Returns:
        {"draws", "seed", "left_out": scorers that only one run has, "scores": {scorer: {group or lang: {"a", "b",
        "difference" (a - b), "low", "high" (its 95 % interval), "p"}}}}. p is two-sided: twice the share of draws, with
        one more counted, in which the difference is not on the side that it is on. It is not corrected for the number
        of languages.

    Raises:
        ValueError: a question of one run that the other has not, or has otherwise; a scoring without `statistics`.
    """
    if not hasattr(scoring, "statistics"):
        raise ValueError(f"scoring: {type(scoring).__name__} has no statistics, so its scores cannot be drawn again")
    a, b = _same_problems(records_a, records_b)
    drawn = _Draws(draws, seed)
    scores_a, scores_b = (scoring.scores(record for found in run.values() for record in found) for run in (a, b))
    draws_a, draws_b = drawn.scores(scoring, a), drawn.scores(scoring, b)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for scorer in (scorer for scorer in draws_a if scorer in draws_b):
        all_a, all_b = (_with_averages(found[scorer], groups) for found in (draws_a, draws_b))
        score_a, score_b = ({**found[scorer], **summarize(found[scorer], groups)} for found in (scores_a, scores_b))
        scores[scorer] = {
            name: _difference(score_a[name], score_b[name], values - all_b[name]) for name, values in all_a.items()
        }
    left_out = sorted(set(draws_a) ^ set(draws_b))
    return {"draws": draws, "seed": seed, "left_out": left_out, "scores": scores}


def comparison_table(comparison: Mapping[str, Any], a: str = "a", b: str = "b", title: str | None = None) -> str:
    """The result of `compare` in Markdown, a table a scorer; `a` and `b` are the runs' names."""
    lines = [f"## {title}", ""] if title else []
    for scorer, scores in comparison["scores"].items():
        header = [f"{scorer} scorer", a, b, "difference", "95 % interval", "p"]
        rows = [
            [
                AVERAGES.get(name, name),
                f"{found['a']:.1f}",
                f"{found['b']:.1f}",
                f"{found['difference']:+.1f}",
                f"{found['low']:+.1f} to {found['high']:+.1f}",
                f"{found['p']:.3f}",
            ]
            for name, found in scores.items()
        ]
        lines += [*figures.markdown_table(header, rows), ""]
    lines.append(f"Paired bootstrap, {comparison['draws']} draws of the questions; p is of each row alone.")
    if comparison["left_out"]:
        lines.append(f"Only one of the runs has the scorer {', '.join(comparison['left_out'])}.")
    return "\n".join(lines) + "\n"


class _Draws:
    """How often each of n questions is in each draw, (draws, n), the same for the same n."""

    def __init__(self, draws: int, seed: int) -> None:
        check_count("draws", draws)
        self.draws, self.seed = draws, seed
        self._counts: dict[int, np.ndarray] = {}

    def counts(self, questions: int) -> np.ndarray:
        if questions not in self._counts:
            generator = np.random.default_rng([self.seed, questions])
            shares = np.full(questions, 1 / questions)
            self._counts[questions] = generator.multinomial(questions, shares, size=self.draws).astype(np.float64)
        return self._counts[questions]

    def scores(self, scoring: Any, by_language: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, np.ndarray]]:
        """{scorer: {lang: (draws,) scores}} of the scorers that every language has."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for lang, records in by_language.items():
            statistics: dict[str, Statistics] = scoring.statistics(sorted(records, key=lambda record: record["index"]))
            for scorer, (rows, score) in statistics.items():
                totals = self.counts(len(records)) @ np.asarray(rows, dtype=np.float64)
                found.setdefault(scorer, {})[lang] = np.array([score(total) for total in totals.tolist()])
        return {scorer: by for scorer, by in found.items() if len(by) == len(by_language)}


def _with_averages(by_language: Mapping[str, np.ndarray], groups: Groups) -> dict[str, np.ndarray]:
    """Averages of the groups that have a language here, then languages in the table's order."""
    found = {}
    for name, languages in groups.items():
        values = [by_language[lang] for lang in languages if lang in by_language]
        if values:
            found[name] = np.mean(values, axis=0)
    return found | {
        lang: by_language[lang] for lang in ordered_languages({"": dict.fromkeys(by_language, 0.0)}, groups)
    }


def _ends(values: np.ndarray) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def _difference(a: float | None, b: float | None, differences: np.ndarray) -> dict[str, float]:
    assert a is not None and b is not None, "a group that has draws has a score"
    low, high = _ends(differences)
    # Draws of numbers that are equal on paper differ by rounding.
    other_side = min((differences <= 1e-9).sum(), (differences >= -1e-9).sum())
    p = min(1.0, 2 * (int(other_side) + 1) / (len(differences) + 1))
    return {"a": a, "b": b, "difference": a - b, "low": low, "high": high, "p": p}


def _same_problems(
    records_a: Iterable[Record], records_b: Iterable[Record]
) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The records of both runs by language, in the same order."""
    keyed = [{(record["lang"], record["index"]): record for record in records} for records in (records_a, records_b)]
    for here, there, which in ((keyed[0], keyed[1], "second"), (keyed[1], keyed[0], "first")):
        if missing := sorted(set(here) - set(there)):
            lang, index = missing[0]
            raise ValueError(
                f"runs: {here[missing[0]].get('task', 'problems')}, {lang}, question {index} is not in the {which} run "
                f"({len(missing)} of {len(here)} are not); takes two runs on the same problems"
            )
    if not keyed[0]:
        raise ValueError("runs: got no records")
    for key, record in keyed[0].items():
        for name in ("task", "question", "answer", "choices"):
            if record.get(name) != keyed[1][key].get(name):
                raise ValueError(
                    f"runs: {record.get('task', 'problems')}, {key[0]}, question {key[1]}: {name} is "
                    f"{record.get(name)!r} in the first run and {keyed[1][key].get(name)!r} in the second; takes two runs "
                    "on the same problems"
                )
    order = sorted(keyed[0])
    first, second = (of_languages(run[key] for key in order) for run in keyed)
    return first, second
