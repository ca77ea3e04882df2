"""Asking a model every problem: batches, answers, likelihoods of given choices, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from layalign.generation.batches import longest_first
from layalign.spelling import check_count
from layalign.tasks import Scoring
from layalign.tasks.task import Problem, Record
from layalign.tasks.word_problems import SCORING

# Takes a list of questions, returns as many answers; a `generation.texts.BatchedAnswerer` is also told languages, and
# asked how likely it holds the choices of a problem.
Answer = Callable[[list[str]], Sequence[str]]
Keep = Callable[[list[Record]], Any]


def evaluate_problems(
    answer: Answer,
    problems: Sequence[Problem],
    batch_size: int = 16,
    progress: bool = True,
    keep: Keep | None = None,
    scoring: Scoring = SCORING,
) -> dict[str, Any]:
    """Ask every problem and score the answers, by default numbers both ways.

    Args:
        answer: takes a list of questions, returns as many answers.
        problems: dicts with lang, question and answer (as `scoring` takes it); other fields are carried along.
        batch_size: questions per call, longest first.
        progress: show a bar.
        keep: called with the new records after each batch.
        scoring: of the problems' task.

    Returns:
        {"accuracy": {scorer: {lang: per cent}}, "records": [...]}, one record per problem, in order: its fields,
        prediction (str) and what `scoring` adds; by default official, strict (bool), official_number (float) and
        strict_number (str or None).

    Raises:
        ValueError: no problems, or `answer` returns another number of answers.
    """
    if not problems:
        raise ValueError("problems: got none")
    found: dict[int, Record] = {}
    with tqdm(total=len(problems), unit="question", desc="evaluate", disable=not progress) as bar:
        for places in batches(problems, batch_size):
            records = ask(answer, [problems[place] for place in places], scoring)
            found |= zip(places, records, strict=True)
            if keep is not None:
                keep(records)
            bar.update(len(places))
    records = [found[place] for place in range(len(problems))]
    return {"accuracy": scoring.scores(records), "records": records}


def batches(problems: Sequence[Problem], size: int) -> Iterator[list[int]]:
    """Places of the problems of each batch, longest questions first.

    Raises:
        ValueError: a size that is no positive int.
    """
    check_count("batch_size", size)
    return longest_first([len(problem["question"]) for problem in problems], size)


def ask(answer: Answer, problems: Sequence[Problem], scoring: Scoring) -> list[Record]:
    """The records of one batch of problems of one task.

    Raises:
        ValueError: `answer` returns another number of answers.
    """
    questions = [problem["question"] for problem in problems]
    told = {"langs": [problem["lang"] for problem in problems]} if hasattr(answer, "loglikelihoods") else {}
    predictions = answer(questions, **told)
    if len(predictions) != len(problems):
        raise ValueError(f"answer: got {len(predictions)} answers for {len(problems)} questions")
    records = [
        {**problem, "prediction": prediction, **scoring.fields(prediction, problem["answer"])}
        for problem, prediction in zip(problems, predictions, strict=True)
    ]
    if hasattr(answer, "details"):  # such as what a translator gave the LLM to read
        for record, found in zip(records, answer.details(questions, **told), strict=True):
            record |= found
    chosen = [record for record in records if "choices" in record]
    if told and chosen:
        likelihoods = answer.loglikelihoods(  # type: ignore[attr-defined]
            [record["question"] for record in chosen],
            [record["choices"] for record in chosen],
            [record["lang"] for record in chosen],
        )
        for record, found in zip(chosen, likelihoods, strict=True):
            record["loglikelihoods"] = found
    return records
