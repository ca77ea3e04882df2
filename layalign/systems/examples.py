"""Worked examples that an LLM reads before a question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from layalign.languages import language_code
from layalign.tasks.reading import Row, field, json_rows, lines, text


class Example(NamedTuple):
    """A question, its answer, and their language where it is known."""

    question: str
    answer: str
    lang: str | None = None


def read_examples(file: str | Path) -> list[Example]:
    """The examples in a file, in its order.

    Args:
        file: JSON lines (.jsonl, .json) with question, answer and, if each has one, lang; or tab-separated text of these two
            or three fields.

    Raises:
        ValueError: a missing or empty file, or a bad line, with its number.
    """
    path = Path(file)
    rows = json_rows(path) if path.suffix in (".jsonl", ".json") else _tab_separated(path)
    found: list[Example] = []
    for place, row in rows:
        question = text(place, "question", field(place, row, ("question",)))
        answer = text(place, "answer", field(place, row, ("answer",)))
        lang = row.get("lang")
        if lang is not None:
            lang = language_code(text(place, "lang", lang))
        if "{text}" in question + answer:
            raise ValueError(f"{place}: an example holds {{text}}, which stands for the question to answer")
        if found and (lang is None) != (found[0].lang is None):
            raise ValueError(f"{place}: lang: some examples have one and some have none; takes all or none")
        found.append(Example(question, answer, lang))
    return found


def chosen_examples(
    examples: Sequence[Example], shots: int, langs: Iterable[str | None]
) -> dict[str | None, list[Example]]:
    """For each language the first `shots` examples: those in it where examples say their language, else of all.

    Raises:
        ValueError: fewer than these.
    """
    chosen: dict[str | None, list[Example]] = {}
    for lang in langs:
        if not examples or examples[0].lang is None:
            fitting, whose = list(examples), ""
        elif lang is None:
            raise ValueError("examples: they are by language, and a question comes without one")
        else:
            fitting = [example for example in examples if example.lang == language_code(lang)]
            whose = f" in {lang!r}"
        if len(fitting) < shots:
            raise ValueError(f"shots: got {shots}, but there are {len(fitting)} examples{whose}")
        chosen[lang] = fitting[:shots]
    return chosen


def _tab_separated(path: Path) -> Iterator[tuple[str, Row]]:
    for place, line in lines(path):
        fields = line.split("\t")
        if len(fields) not in (2, 3):
            raise ValueError(
                f"{place}: got {len(fields)} tab-separated fields, takes question, answer and perhaps a language"
            )
        yield place, dict(zip(("question", "answer", "lang"), fields, strict=False))
