"""Word problems of one's own: a file of JSON lines with question, answer and lang."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from layalign.tasks import prompts
from layalign.tasks.reading import chosen, field, json_rows, numbered, text
from layalign.tasks.task import Problem, Task
from layalign.tasks.word_problems import SCORING, number


def load(data: str | PathLike | None, languages: Sequence[str] | None, limit: int | None) -> list[Problem]:
    """The problems of a JSON-lines file, or of problems.jsonl in a folder; their task is the file's name."""
    if data is None:
        raise ValueError("data: problems takes a JSON-lines file, got None")
    path = Path(data)
    if path.is_dir():
        path /= "problems.jsonl"
    by_language: dict[str, list[dict[str, Any]]] = {}
    for place, row in json_rows(path):
        lang = field(place, row, ("lang",))
        if not isinstance(lang, str) or not lang.strip():
            raise ValueError(f"{place}: lang: got {lang!r}, takes a language code")
        question = text(place, "question", field(place, row, ("question",)))
        answer = number(place, field(place, row, ("answer",)))
        by_language.setdefault(lang, []).append({"question": question, "answer": answer})
    return numbered(path.stem, {code: rows[:limit] for code, rows in chosen(by_language, languages, path).items()})


def task_of_file(path: str | PathLike) -> Task:
    """A task whose problems are those of one file, whatever `data` is."""
    return Task(
        name=Path(path).stem,
        load=lambda data, languages, limit: load(path, languages, limit),
        scoring=SCORING,
        prompt=prompts.MATH,
    )


TASK = Task(name="problems", load=load, scoring=SCORING, prompt=prompts.MATH)
