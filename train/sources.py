"""Readers of training records: {"source": text for the encoder, "target": text the LLM must write, "lang": code}."""

from __future__ import annotations

import json
import logging
import os
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from layalign.languages import language_code
from layalign.train.prompts import check_template

if TYPE_CHECKING:
    from layalign.train.recipe import DataSource

logger = logging.getLogger(__name__)

_SHOWN = 10


class _BadLine(ValueError):
    """One unusable line; the reader that catches it adds where it stands."""


class _Filler(string.Formatter):
    """Fills a template with text and numbers only: a null or a list would otherwise be written out as Python shows
    it.
    """

    def format_field(self, value, format_spec):
        return _as_text(value, "a field of the template")


class Read(NamedTuple):
    """records: dicts with source, target and lang; skipped: "place: reason" of each bad line that was left out because its
    source asked for that."""

    records: list[dict[str, str]]
    skipped: list[str]


def read_sources(sources: Sequence[DataSource], data_root: str | os.PathLike | None = None) -> Read:
    """Read all records of several sources, in order.

    Args:
        sources: read one after the other.
        data_root: folder that relative paths start at.

    Raises:
        ValueError: a missing, empty or unreadable file, files of different length, or a bad line, with its file and
            line number.
    """
    read = Read([], [])
    for source in sources:
        for part in source.located(data_root):
            read.records.extend(_read(part, read.skipped))
    if skipped := read.skipped:
        shown = "\n  ".join(skipped[:_SHOWN])
        more = f"\n  and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        logger.warning("%d bad lines left out:\n  %s%s", len(skipped), shown, more)
    return read


def _read(source, skipped):
    kept, per_language = [], Counter()
    source_text, target_text = _text_reader(source.source), _text_reader(source.target)
    rows = _ROWS[source.format](source)
    for place, row in rows:
        try:
            lang = _language(source, row)
            record = {"source": source_text(row), "target": target_text(row), "lang": lang}
        except _BadLine as error:
            if source.on_bad_line == "error":
                raise ValueError(f"{place}: {error}") from None
            skipped.append(f"{place}: {error}")
            continue
        if source.languages is not None and lang not in source.languages:
            continue
        if source.limit_per_language is not None and per_language[lang] == source.limit_per_language:
            continue
        per_language[lang] += 1
        kept.append(record)
        if len(kept) == source.limit:
            break
    name = source.path or "records"
    if not kept:
        raise ValueError(f"{name}: no records")
    if source.languages is not None and (absent := [lang for lang in source.languages if lang not in per_language]):
        limit = "" if source.limit is None else f" within the limit of {source.limit}"
        raise ValueError(f"{name}: no records of languages {absent}{limit}; it has {dict(per_language)}")
    return kept


def _language(source, row):
    """Language code of a reader's row: a dict, or the _BadLine that its reader met."""
    if isinstance(row, _BadLine):
        raise row
    if not isinstance(row, dict):
        raise _BadLine(f"expected an object with fields, got {type(row).__name__}")
    if source.lang is not None:
        return language_code(source.lang)
    lang = row.get("lang", "") if source.lang_field is None else _field(row, source.lang_field)
    if not isinstance(lang, str):
        raise _BadLine(f"field {source.lang_field or 'lang'!r} holds {type(lang).__name__}, not text")
    return language_code(lang)


def _text_reader(field):
    """A function from a row to the text of a field, or of a template over fields."""
    if not check_template(field, "field"):
        return lambda row: _as_text(_field(row, field), f"field {field!r}")

    def fill(row):
        try:
            text = _Filler().vformat(field, (), row)
        except (KeyError, IndexError, TypeError) as error:
            raise _BadLine(
                f"template {field!r} does not fit: {type(error).__name__} {error}; fields: {_names(row)}"
            ) from None
        return _as_text(text, f"template {field!r}")

    return fill


def _as_text(value, name):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _BadLine(f"{name} holds {type(value).__name__}, not text")
    if not value.strip():
        raise _BadLine(f"{name} is empty")
    return value


def _field(row, name):
    if name not in row:
        raise _BadLine(f"no field {name!r}; fields: {_names(row)}")
    return row[name]


def _names(row):
    return ", ".join(map(str, row)) or "none"


def _lines(path):
    """(line number, text or _BadLine) of a text file; only a line feed ends a line, so that both files of a pair count
    alike.
    """
    with _open(path) as file:
        number = 0
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, _BadLine(f"not UTF-8 (byte {error.start + 1} of the line)")
        if number == 0:
            raise ValueError(f"{path}: empty file")


def _open(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _count_lines(path):
    count, last = 0, b"\n"
    with _open(path) as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def _pair_rows(source):
    counts = _count_lines(source.path), _count_lines(source.target_path)
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source.path} has {counts[0]} lines and {source.target_path} {counts[1]}; "
            "line-aligned files have equally many"
        )
    for (number, text), (_, target) in zip(_lines(source.path), _lines(source.target_path), strict=True):
        for path, side in ((source.path, text), (source.target_path, target)):
            if isinstance(side, _BadLine) or not side.strip():
                yield f"{path}:{number}", side if isinstance(side, _BadLine) else _BadLine("empty line")
                break
        else:
            yield f"{source.path}:{number}", {"source": text, "target": target}


def _json_line_rows(source):
    for number, text in _lines(source.path):
        row = text
        if isinstance(text, str):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                blank = not text.strip()
                row = _BadLine("empty line" if blank else f"not JSON: {error.msg} at column {error.colno}")
        yield f"{source.path}:{number}", row


def _json_list_rows(source):
    """Objects of one JSON list, decoded one by one: each has its line number, and a limit stops the reading."""
    with _open(source.path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source.path}:{line}: not UTF-8; a JSON file is read as a whole, so it cannot be skipped"
        ) from None
    if not text.strip():
        raise ValueError(f"{source.path}: empty file")
    decoder = json.JSONDecoder()
    at = _skip_space(text, 0)
    if text[at] != "[":
        raise ValueError(f"{source.path}: expected a list of objects, got {text[at : at + 20]!r}")
    at, line, counted = _skip_space(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source.path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        yield f"{source.path}:{line}", row
        at = _skip_space(text, at)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            where = text.count("\n", 0, at) + 1
            raise ValueError(f"{source.path}:{where}: not JSON: expected a comma or the end of the list")


def _skip_space(text, at):
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _tsv_rows(source):
    columns = source.columns
    for number, text in _lines(source.path):
        place = f"{source.path}:{number}"
        if isinstance(text, _BadLine):
            yield place, text
            continue
        cells = text.split("\t")
        if columns is None:
            columns = cells
            continue
        if len(cells) != len(columns):
            yield place, _BadLine(f"{len(cells)} columns, expected {len(columns)}")
        else:
            yield place, dict(zip(columns, cells, strict=True))


def _dataset_rows(source):
    import datasets

    try:
        if (Path(source.path) / "state.json").is_file():
            rows = datasets.load_from_disk(source.path)
        elif (Path(source.path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(source.path)[source.split]
        else:
            rows = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"dataset {source.path!r} (subset {source.subset}, split {source.split!r}): {error}"
        ) from error
    for index, row in enumerate(rows):
        yield f"{source.path} [{source.split}] row {index}", row


def _memory_rows(source):
    for index, row in enumerate(source.records):
        yield f"records[{index}]", row


_ROWS = {
    "pairs": _pair_rows,
    "jsonl": _json_line_rows,
    "json": _json_list_rows,
    "tsv": _tsv_rows,
    "dataset": _dataset_rows,
    "records": _memory_rows,
}
