"""Reading a task's rows from files; what is wrong with one is told with its place.

A row is a JSON object or its like; its place is `file:line`, or the dataset and the row's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from layalign.languages import MATHEMATICS, in_order
from layalign.tasks.task import Problem

Row = Mapping[str, Any]
Rows = Iterable[tuple[str, Row]]
Value = TypeVar("Value")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each line of a UTF-8 file; empty lines at its end are not lines."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    if content == [b""]:
        raise ValueError(f"{path}: the file is empty")
    for number, line in enumerate(content, 1):
        try:
            yield f"{path}:{number}", line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each line of a file of JSON lines."""
    for place, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        yield place, _object(place, row, "per line")


def json_list_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each object of a file that is one JSON list; the place has the line where the object begins."""
    content = "\n".join(line for _, line in lines(path))
    decoder = json.JSONDecoder()
    position, number = _skipped(content, 0, 1)
    if not content.startswith("[", position):
        raise ValueError(f"{path}:{number}: got {content[position : position + 20]!r}, takes a JSON list of objects")
    position, number = _skipped(content, position + 1, number)
    ended = content.startswith("]", position)
    while not ended:
        try:
            row, end = decoder.raw_decode(content, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
        yield f"{path}:{number}", _object(f"{path}:{number}", row, "for each row of the list")
        number += content.count("\n", position, end)
        position, number = _skipped(content, end, number)
        ended = content.startswith("]", position)
        if not ended:
            if not content.startswith(",", position):
                raise ValueError(f"{path}:{number}: not JSON (the list needs a comma or its end here)")
            position, number = _skipped(content, position + 1, number)
    position, number = _skipped(content, position + 1, number)
    if position < len(content):
        raise ValueError(f"{path}:{number}: not JSON (more text after the list)")


def json_rows_either_way(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a file that is JSON lines or one JSON list, which its first character tells."""
    first = next(line for _, line in lines(path))
    return json_list_rows(path) if first.lstrip().startswith("[") else json_rows(path)


def table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each line but the first of a tab-separated file; the first names the fields. Nothing is quoted."""
    rows = lines(path)
    names = next(rows)[1].split("\t")
    for place, line in rows:
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ValueError(
                f"{place}: got {len(fields)} tab-separated fields, takes {len(names)} as in the first line"
            )
        yield place, dict(zip(names, fields, strict=True))


def file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a file, as its name's ending says: .tsv, else JSON."""
    return table_rows(path) if path.suffix == ".tsv" else json_rows_either_way(path)


def field(place: str, row: Row, names: Sequence[str]) -> Any:
    """The first of the named fields that is there and not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{place}: no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")


def text(place: str, name: str, value: Any) -> str:
    """`value`, white space at its ends included, as a published checkpoint was asked; ValueError unless it is a text
    that is not empty.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name}: got {value!r}, takes a text that is not empty")
    return value


def chosen(
    available: Mapping[str, Value],
    languages: Sequence[str] | None,
    where: Any,
    first: Sequence[str] = MATHEMATICS,
) -> dict[str, Value]:
    """Those of {language: value} that are asked for (None: all): those of `first` in its order, others after by code."""
    if languages is not None:
        if not languages:
            raise ValueError("languages: got an empty list, takes codes such as 'sw', or None for all")
        missing = [code for code in languages if code not in available]
        if missing:
            raise ValueError(f"languages: {', '.join(missing)} not in {where}, which has {', '.join(available)}")
    order = in_order(available, first)
    return {code: available[code] for code in order if languages is None or code in languages}


def numbered(task: str, by_language: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Problem]:
    """Problems of {language: what a row gives, at least question and answer}."""
    return [
        {"task": task, "lang": code, "index": index, **found}
        for code, rows in by_language.items()
        for index, found in enumerate(rows)
    ]


def _object(place: str, row: Any, which: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got a {type(row).__name__}, takes a JSON object {which}")
    return row


def _skipped(content: str, position: int, number: int) -> tuple[int, int]:
    """Position of what follows white space, and its line."""
    while position < len(content) and content[position] in " \t\r\n":
        number += content[position] == "\n"
        position += 1
    return position, number
