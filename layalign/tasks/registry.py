"""The tasks by name. A new one is a file beside this one that has a TASK, and a line in NAMES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import NamedTuple

from layalign.tasks.task import Problem, Task

NAMES = (
    "mgsm",
    "msvamp",
    "xcsqa",
    "xnli",
    "flores",
    "xcopa",
    "problems",
)

Data = str | PathLike | None


class LoadedTask(NamedTuple):
    """A task with the problems read for it."""

    task: Task
    problems: list[Problem]


def find_task(name: str | PathLike) -> Task:
    """The task of that name, or of a file of JSON lines with the fields question, answer and lang.

    Raises:
        ValueError: there is none.
    """
    if name in NAMES:
        return import_module(f"{__package__}.{name}").TASK
    if not str(name).endswith((".jsonl", ".json")):
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"task: got {name!r}, takes {names} or the path of a .jsonl file")
    from layalign.tasks.problems import task_of_file

    return task_of_file(name)


def load_task(
    task: str | PathLike, data: Data = None, languages: Sequence[str] | None = None, limit: int | None = None
) -> list[Problem]:
    """The problems of one task, languages in the paper's order.

    Args:
        task: a name in NAMES, or the path of a file of JSON lines with the fields question, answer and lang.
        data: for a task with published files a folder that holds them (itself or in a folder named after the task), or a
            name that `datasets.load_dataset` takes, with "datasets:" before it if a folder of that name exists, or a
            folder that datasets' `save_to_disk` wrote; None: the usual name on the hub. For "problems" such a file of
            JSON lines, or a folder with problems.jsonl.
        languages: codes, None for all.
        limit: problems taken per language, from the start, None for all.

    Returns:
        Dicts with `task`, `lang`, `index` (its place in its language, from 0), `question` (str, what the encoder reads)
        and `answer`; those of a task with choices also `choices` (list[str], the answer among them).

    Raises:
        ValueError: an unknown task or language, a missing or empty file, and a bad row (with file and line).
    """
    _check(languages, limit)
    return find_task(task).load(data, languages, limit)


def load_tasks(
    tasks: Sequence[str],
    data: Data | Mapping[str, Data] = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
) -> dict[str, LoadedTask]:
    """Several tasks with their problems, by the task's name in its problems; `data` for all of them or as {task: data}.

    Raises:
        ValueError: as `load_task`, and for no task, one twice, and data for none of them.
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: got {list(tasks)}, takes at least one, none twice")
    if isinstance(data, Mapping) and (unknown := sorted(set(data) - set(tasks))):
        raise ValueError(f"data: got {', '.join(unknown)}, not among the tasks {', '.join(tasks)}")
    _check(languages, limit)
    loaded: dict[str, LoadedTask] = {}
    for name in tasks:
        task = find_task(name)
        problems = task.load(data.get(name) if isinstance(data, Mapping) else data, languages, limit)
        if problems[0]["task"] in loaded:
            raise ValueError(f"tasks: two are called {problems[0]['task']}")
        loaded[problems[0]["task"]] = LoadedTask(task, problems)
    return loaded


def _check(languages: Sequence[str] | None, limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: got {limit!r}, takes a positive int or None")
    if isinstance(languages, str):
        raise ValueError(f"languages: got the string {languages!r}, takes a list of two-letter codes")
