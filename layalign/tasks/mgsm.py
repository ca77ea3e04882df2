"""MGSM: grade-school mathematics in eleven languages, a tab-separated file each (question, answer)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from layalign.languages import MATHEMATICS
from layalign.tasks.reading import LanguageFiles, Row, lines
from layalign.tasks.task import Task
from layalign.tasks.word_problems import SCORING, word_problem


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, {"question", "answer"}) of each line."""
    for place, line in lines(path):
        fields = line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"{place}: got {len(fields)} tab-separated fields, takes a question and an answer")
        yield place, dict(zip(("question", "answer"), fields, strict=True))


FILES = LanguageFiles(
    task="mgsm",
    hub="juletxara/mgsm",
    patterns=("mgsm_{code}.tsv",),
    languages=MATHEMATICS,
    problem=word_problem,
    rows=rows,
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=SCORING)
