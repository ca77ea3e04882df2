"""The evaluation of a saved model into a folder of results, by one process or several."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from layalign.evaluation import comparison, report
from layalign.evaluation.loop import ask, batches
from layalign.evaluation.output import check_output
from layalign.evaluation.processes import JOB, RECORDS, Key, Processes, answered, key
from layalign.evaluation.runs import RESULTS, read_run, write_against
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.generation.logits import NaNLogits
from layalign.kernels.files import read_json, write_json, write_text
from layalign.prompts import DEFAULT_PROMPT, TASK_PROMPT
from layalign.tasks import load_tasks
from layalign.tasks.prompts import SAME_TEXT
from layalign.tasks.registry import Data, LoadedTask
from layalign.tasks.task import Problem, Record, Task
from layalign.versions import versions

if TYPE_CHECKING:
    from layalign.generation.texts import BatchedAnswerer
    from layalign.systems import System


def evaluate(
    model: System | str | PathLike,
    tasks: str | Sequence[str] = ("mgsm",),
    *,
    data: Data | Mapping[str, Data] = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    output: str | PathLike | None = None,
    against: str | PathLike | None = None,
    settings: GenerationSettings = DEFAULT_SETTINGS,
    progress: bool = True,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Evaluate a saved model, or another system, and write a folder.

    It gets records.jsonl (every question, answer and prediction, as it goes), results.json, table.md and
    accuracy_<task>.png. The same call after an interruption goes on where it stopped; a folder that holds another
    evaluation, or anything else, is refused.

    Args:
        model: folder or hub name of a LayAlign model, or one of `layalign.systems`, which has its own settings.
        tasks: names of tasks, or files of problems.
        data: a folder or datasets name for all tasks, or a dict {task: one}.
        languages, limit: as in `tasks.load_task`.
        output: the folder; runs/evaluate/<model's name> by default.
        against: the folder of a finished evaluation on the same problems, which the new one is compared with: against.json and
            against.md.
        settings: how the model is run, where `model` is a folder or hub name.
        progress: show a bar, then the tables.
        generate_kwargs: likewise, to transformers' generate; greedy without them.

    Returns:
        The content of results.json.

    Raises:
        ValueError: anything missing or malformed.
    """
    from layalign.systems import LayAlignModel, System

    if not isinstance(model, System):
        model = LayAlignModel(model=str(model), settings=settings, generate=generate_kwargs)
    elif generate_kwargs or settings is not DEFAULT_SETTINGS:
        raise ValueError("settings: a system has its own; give them to it")
    system, settings = model, model.settings
    other = None if against is None else read_run(against)
    processes = Processes.here()
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    loaded = load_tasks(tasks, data, languages, limit)
    prompts = {name: _prompt(system, task) for name, (task, _) in loaded.items()}
    problems = [problem for _, found in loaded.values() for problem in found]
    system.check(dict.fromkeys(problem["lang"] for problem in problems))
    folder = Path(output) if output else Path("runs") / "evaluate" / re.sub(r"[^\w.-]+", "-", system.name)
    generate = {name: repr(value) for name, value in sorted(system.generate.items())}
    if settings.encoder_max_length is not None:  # a journal of a job without it stays the same job's
        generate["encoder_max_length"] = repr(settings.encoder_max_length)
    config = {
        **system.fingerprint(),
        "tasks": tasks,
        "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        "languages": languages,
        "limit": limit,
        "max_new_tokens": settings.max_new_tokens,
        "prompt": settings.prompt,
        "dtype": settings.dtype or "auto",
        "generate": dict(sorted(generate.items())),
    }
    seconds: float = 0.0
    asked = False

    def make(kept, keep):
        """Load the model, and ask it this process's share of what no record answers; what it cannot read is refused before."""
        nonlocal seconds, asked
        started = time.perf_counter()
        left = _left(loaded, kept, settings.batch_size)
        asked = bool(left)
        share = left[processes.rank :: processes.count]
        if share:
            here = replace(system, settings=processes.placed(settings))
            answerers = {name: here.load(prompt) for name, prompt in prompts.items()}
            for batch in left:
                _check(answerers[batch.task], batch.problems)
            shown = progress and processes.first
            total = sum(len(batch.problems) for batch in share)
            with tqdm(total=total, unit="question", desc="evaluate", disable=not shown) as bar:
                for batch in share:
                    try:
                        keep(ask(answerers[batch.task], batch.problems, loaded[batch.task].task.scoring))
                    except NaNLogits as error:
                        first = "{}, {}, question {}".format(*key(batch.problems[0]))
                        raise ValueError(f"{first}, or one of those asked with it: {error}") from None
                    bar.update(len(batch.problems))
        seconds = time.perf_counter() - started

    if processes.first:
        check_output(folder, "evaluation", JOB, (RECORDS,))
    # Where a file of problems lies is no part of the job: it may have moved, and what it says is among the problems.
    job = {**config, "tasks": [Path(name).name for name in tasks]}
    records = answered(make, problems, folder, job, processes)
    results: dict[str, Any] = {
        "system": system.name,
        "tasks": {name: _task_results(name, task, records) for name, (task, _) in loaded.items()},
        "config": {**config, "batch_size": settings.batch_size},
        "versions": versions(),
        "seconds": seconds,
    }
    if not asked:  # nothing was measured: what was, and by which versions, stays
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = read_json(folder / RESULTS)
            results |= {name: before[name] for name in ("versions", "seconds")}
            results["config"]["batch_size"] = before["config"]["batch_size"]
    if processes.first:
        found_tasks = {name: task for name, (task, _) in loaded.items()}
        _write_reports(results, found_tasks, folder, system.name, progress)
        if other is not None:
            compared = write_against(folder, read_run(folder), other)
            if progress:
                print(compared)
    return results


class _Batch(NamedTuple):
    """Problems of one task that are asked at a time."""

    task: str
    problems: list[Problem]


def _left(loaded: Mapping[str, LoadedTask], kept: Collection[Key], size: int) -> list[_Batch]:
    """The batches of all problems without those in `kept`: what is asked together does not depend on where a job was cut,
    nor on how many processes share it."""
    left = []
    for name, (_, problems) in loaded.items():
        for places in batches(problems, size):
            missing = [problems[place] for place in places if key(problems[place]) not in kept]
            if missing:
                left.append(_Batch(name, missing))
    return left


def _prompt(system: System, task: Task) -> str | None:
    """What a system is to load for a task."""
    prompt = system.settings.prompt
    if prompt == DEFAULT_PROMPT and getattr(system, "shots", False) and task.prompt == SAME_TEXT:
        return SAME_TEXT  # such a question ends in "Answer:" or "Label:", and examples end in the default prompt's "Answer:"
    if prompt != TASK_PROMPT:
        return prompt
    if task.prompt is None:
        raise ValueError(f"prompt: got 'task', but no prompt is published for {task.name}")
    return task.prompt


def _check(answerer: BatchedAnswerer, problems: Sequence[Problem]) -> None:
    """Raises ValueError, with the question's name, for what the model cannot read."""
    answerer.check(
        [problem["question"] for problem in problems],
        lambda place: "{}, {}, question {}".format(*key(problems[place])),
        [problem["lang"] for problem in problems],
    )


def _task_results(name: str, task: Task, records: list[Record]) -> dict[str, Any]:
    chosen = [record for record in records if record["task"] == name]
    scores = task.scoring.scores(chosen)
    counts = Counter(record["lang"] for record in chosen)
    cut = Counter(record["lang"] for record in chosen if record.get("cut"))
    notes = list(task.scoring.notes()) if hasattr(task.scoring, "notes") else []
    if cut:
        said = ", ".join(f"{lang} {count} of {counts[lang]}" for lang, count in cut.items())
        notes.append(f"Answers that max_new_tokens cut, scored by what stands there: {said}.")
    return {
        "accuracy": scores,
        "summary": {scorer: report.summarize(by_language, task.groups) for scorer, by_language in scores.items()},
        "intervals": comparison.intervals(chosen, task.scoring, task.groups),
        "counts": dict(counts),
        **({"cut": dict(cut)} if cut else {}),
        **({"signatures": task.scoring.signatures()} if hasattr(task.scoring, "signatures") else {}),
        **({"notes": notes} if notes else {}),
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
    write_json(output / RESULTS, results, indent=2)
