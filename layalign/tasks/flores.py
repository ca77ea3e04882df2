"""FLORES-101 and FLORES-200: translation of news and encyclopaedia sentences into English, a file of lines each language.

Their own layouts: `flores101_dataset/devtest/swh.devtest`, `flores200_dataset/devtest/swh_Latn.devtest`, and `dev/*.dev`
beside it, which is taken where there is no devtest, as in a folder that is `dev` itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layalign.languages import FLORES_GROUPS
from layalign.tasks import prompts
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.reading import Row, field, lines, text
from layalign.tasks.task import Task
from layalign.tasks.translations import Translations

_FOLDERS = ("", "flores", "flores101", "flores200", "flores101_dataset", "flores200_dataset")


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, {"sentence"}) of each line."""
    return ((place, {"sentence": line}) for place, line in lines(path))


def problem(place: str, row: Row) -> dict[str, Any]:
    """The sentence, and as its answer the English one; ValueError with its place."""
    sentence = text(place, "sentence", field(place, row, ("sentence",)))
    target_place, target = row["target_place"], row["target"]
    return {
        "question": sentence,
        "answer": text(target_place, "sentence", field(target_place, target, ("sentence",))),
    }


FILES = LanguageFiles(
    task="flores",
    hub="facebook/flores",
    problem=problem,
    places=(
        *(f"{name}/devtest".lstrip("/") for name in _FOLDERS),
        *_FOLDERS,
        *(f"{name}/dev".lstrip("/") for name in _FOLDERS),
    ),
    patterns=("{code}.devtest", "{code}.dev"),
    order=FLORES_GROUPS["avg"],
    rows=rows,
    split="devtest",
    target="en",
)
TASK = Task(
    name=FILES.task,
    load=FILES.load,
    scoring=Translations(),
    prompt=prompts.TRANSLATION,
    groups=FLORES_GROUPS,
    measure="score (0 to 100)",
)
