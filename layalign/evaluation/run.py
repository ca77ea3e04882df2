"""The evaluation loop, and the evaluation of a saved model into a folder of results."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm import tqdm

from layalign.evaluation import comparison, report
from layalign.evaluation.output import check_output
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.journal import Journal
from layalign.kernels.files import write_json, write_text
from layalign.tasks import Scoring, load_tasks
from layalign.tasks.registry import Data
from layalign.tasks.task import Problem, Record, Task
from layalign.tasks.word_problems import SCORING

DEFAULT_PROMPT = "default"
RECORDS, JOB = "records.jsonl", "evaluation.json"

Answer = Callable[[list[str]], Sequence[str]]


def evaluate_problems(
    answer: Answer,
    problems: Sequence[Problem],
    batch_size: int = 16,
    progress: bool = True,
    keep: Callable[[list[Record]], Any] | None = None,
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
    records = _asked(answer, problems, lambda _: scoring, batch_size, progress, keep)
    return {"accuracy": scoring.scores(records), "records": records}


def evaluate(
    model_path: str | PathLike,
    tasks: str | Sequence[str] = ("mgsm",),
    *,
    data: Data | Mapping[str, Data] = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    output: str | PathLike | None = None,
    prompt: str | None = DEFAULT_PROMPT,
    settings: GenerationSettings = DEFAULT_SETTINGS,
    progress: bool = True,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Evaluate a saved model and write a folder.

    It gets records.jsonl (every question, answer and prediction, as it goes), results.json, table.md and
    accuracy_<task>.png. The same call after an interruption goes on where it stopped; a folder that holds another
    evaluation, or anything else, is refused.

    Args:
        model_path: folder or hub name.
        tasks: names of tasks, or files of problems.
        data: a folder or datasets name for all tasks, or a dict {task: one}.
        languages, limit: as in `tasks.load_task`.
        output: the folder; runs/evaluate/<model's name> by default.
        prompt: "default" for the processor's template, None for no LLM text, or a str with {text}.
        settings: how the model is run.
        progress: show a bar, then the tables.
        generate_kwargs: to transformers' generate; greedy without them.

    Returns:
        The content of results.json.

    Raises:
        ValueError: anything missing or malformed.
    """
    from layalign.generation.texts import Answerer
    from layalign.loading import check_model_path, fingerprint, load_model
    from layalign.processor import DEFAULT

    check_model_path(model_path)
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    loaded = load_tasks(tasks, data, languages, limit)
    found_tasks = {name: task for name, (task, _) in loaded.items()}
    scorings = {name: task.scoring for name, task in found_tasks.items()}
    problems = [problem for _, found in loaded.values() for problem in found]
    folder = Path(output) if output else Path("runs") / "evaluate" / Path(model_path).name
    if settings.encoder_max_length is not None:  # a journal of a job without it stays the same job's
        generate_kwargs["encoder_max_length"] = settings.encoder_max_length
    config = {
        "model": fingerprint(model_path),
        "tasks": tasks,
        "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        "languages": languages,
        "limit": limit,
        "max_new_tokens": settings.max_new_tokens,
        "prompt": prompt,
        "dtype": settings.dtype or "auto",
        "generate": {name: repr(value) for name, value in sorted(generate_kwargs.items())},
    }

    def ask(missing, keep):
        """Load the model, and ask it what no record answers yet; a question it cannot read is refused before any is."""
        answerer = Answerer(
            *load_model(model_path, settings.dtype, settings.device),
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            prompt=DEFAULT if prompt == DEFAULT_PROMPT else prompt,
            **generate_kwargs,
        )
        questions = [problem["question"] for problem in missing]
        answerer.check(questions, lambda place: "{}, {}, question {}".format(*_key(missing[place])))
        _asked(answerer, missing, lambda problem: scorings[problem["task"]], settings.batch_size, progress, keep)

    records, seconds = _answered(ask, problems, folder, config)
    results = {
        "model": str(model_path),
        "tasks": {name: _task_results(name, task, records) for name, task in found_tasks.items()},
        "config": {**config, "batch_size": settings.batch_size},
        "versions": _versions(),
        "seconds": seconds,
    }
    _write_reports(results, found_tasks, folder, Path(model_path).name, progress)
    return results


def _asked(
    answer: Answer,
    problems: Sequence[Problem],
    scoring_of: Callable[[Problem], Scoring],
    batch_size: int,
    progress: bool,
    keep: Callable[[list[Record]], Any] | None,
) -> list[Record]:
    """A record of every problem, in their order."""
    if not problems:
        raise ValueError("problems: got none")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, takes a positive int")
    records: dict[int, Record] = {}
    longest_first = sorted(range(len(problems)), key=lambda place: -len(problems[place]["question"]))
    with tqdm(total=len(problems), unit="question", desc="evaluate", disable=not progress) as bar:
        for start in range(0, len(problems), batch_size):
            places = longest_first[start : start + batch_size]
            predictions = answer([problems[place]["question"] for place in places])
            if len(predictions) != len(places):
                raise ValueError(f"answer: got {len(predictions)} answers for {len(places)} questions")
            for place, prediction in zip(places, predictions, strict=True):
                problem = problems[place]
                fields = scoring_of(problem).fields(prediction, problem["answer"])
                records[place] = {**problem, "prediction": prediction, **fields}
            if keep is not None:
                keep([records[place] for place in places])
            bar.update(len(places))
    return [records[place] for place in range(len(problems))]


def _answered(
    ask: Callable[[list[Problem], Callable[[list[Record]], Any]], None],
    problems: list[Problem],
    output: Path,
    config: dict[str, Any],
) -> tuple[list[Record], float]:
    """Records of all problems in order, and the seconds it took to make those that were missing."""
    check_output(output, "evaluation", JOB, (RECORDS,))
    with Journal(output / RECORDS, config, output / JOB) as journal:
        kept = {_key(record) for record in journal.records}
        missing = [problem for problem in problems if _key(problem) not in kept]
        started = time.perf_counter()
        if missing:
            ask(missing, journal.append)
        records = {_key(record): record for record in journal.records}
        return [records[_key(problem)] for problem in problems], time.perf_counter() - started


def _key(record: Record) -> tuple[str, str, int]:
    return record["task"], record["lang"], record["index"]


def _task_results(name: str, task: Task, records: list[Record]) -> dict[str, Any]:
    chosen = [record for record in records if record["task"] == name]
    scores = task.scoring.scores(chosen)
    counts: dict[str, int] = {}
    for record in chosen:
        counts[record["lang"]] = counts.get(record["lang"], 0) + 1
    return {
        "accuracy": scores,
        "summary": {scorer: report.summarize(by_language, task.groups) for scorer, by_language in scores.items()},
        "intervals": comparison.intervals(chosen, task.scoring, task.groups),
        "counts": counts,
        **{said: getattr(task.scoring, said)() for said in ("signatures", "notes") if hasattr(task.scoring, said)},
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("layalign", "torch", "transformers")},
    }


def _write_reports(results: dict[str, Any], tasks: Mapping[str, Task], output: Path, name: str, show: bool) -> None:
    tables = []
    for task, found in results["tasks"].items():
        table = {f"{name} ({scorer} scorer)": scores for scorer, scores in found["accuracy"].items()}
        look: dict[str, Any] = {
            "groups": tasks[task].groups,
            "intervals": {f"{name} ({scorer} scorer)": ends for scorer, ends in found["intervals"].items()},
        }
        notes = "".join(f"\n{note}\n" for note in found.get("notes", ()))
        tables.append(report.markdown_table(table, title=task, **look) + notes)
        report.plot_accuracy(table, output / f"accuracy_{task}.png", title=task, measure=tasks[task].measure, **look)
        if show:
            report.print_table(table, title=task, **look)
            print(notes, end="")
    write_text(output / "table.md", "\n".join(tables))
    write_json(output / "results.json", results, indent=2)
