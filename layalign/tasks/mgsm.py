"""MGSM: grade-school mathematics in eleven languages and newer ones, a tab-separated file each (question, answer)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from layalign.tasks import prompts
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.reading import Row, lines
from layalign.tasks.task import Task
from layalign.tasks.word_problems import SCORING, word_problem


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, {"question", "answer"}) of each line."""
    for place, line in lines(path):
        fields = line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"{place}: got {len(fields)} tab-separated fields, takes a question and an answer")
        yield place, dict(zip(("question", "answer"), (fields[0].lstrip(), fields[1]), strict=True))


FILES = LanguageFiles(
    task="mgsm",
    hub="juletxara/mgsm",
    problem=word_problem,
    places=("mgsm", "", "evaluation/mgsm"),
    patterns=("mgsm_{code}.tsv",),
    rows=rows,
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=SCORING, prompt=prompts.MATH)
