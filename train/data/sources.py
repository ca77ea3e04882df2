"""Training records of sources: {"source": text for the encoder, "target": text the LLM must write, "lang": code}."""

from __future__ import annotations

import logging
import math
import os
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from layalign.languages import language_code
from layalign.spelling import no_text
from layalign.train.data.rows import BadLine, rows_of
from layalign.train.prompts import check_template

if TYPE_CHECKING:
    from layalign.train.data.data_source import DataSource

logger = logging.getLogger(__name__)

_SHOWN = 10


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


class Line(NamedTuple):
    """One record, its place ("file:line"), and the source it is of (its path, or "records")."""

    place: str
    origin: str
    record: dict[str, str]


def read_sources(sources: Sequence[DataSource], data_root: str | os.PathLike | None = None) -> Read:
    """Read all records of several sources into memory, in order.

    Args:
        sources: read one after the other.
        data_root: folder that relative paths start at.

    Raises:
        ValueError: a missing, empty or unreadable file, files of different length, or a bad line, with its file and
            line number.
    """
    skipped: list[str] = []
    records = [line.record for line in stream_sources(sources, data_root, skipped.append)]
    report_skipped(len(skipped), skipped[:_SHOWN])
    return Read(records, skipped)


def stream_sources(
    sources: Sequence[DataSource],
    data_root: str | os.PathLike | None,
    skip: Callable[[str], object],
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Line]:
    """The records of several sources, one after the other; none is kept.

    Args:
        sources, data_root: as for `read_sources`.
        skip: called with "place: reason" of each bad line that is left out because its source asks for that.
        advance: called for each row that is read.

    Raises:
        ValueError: as `read_sources`, when the reading comes there.
    """
    for source in sources:
        for part in source.located(data_root):
            yield from _stream(part, skip, advance)


def report_skipped(count: int, first: Sequence[str]) -> None:
    """Say how many bad lines were left out, and which.

    Args:
        count: of all.
        first: "place: reason" of the first of them.
    """
    if count:
        shown = "\n  ".join(first)
        more = f"\n  and {count - len(first)} more" if count > len(first) else ""
        logger.warning("%d bad lines left out:\n  %s%s", count, shown, more)


def _stream(source, skip, advance):
    per_language, kept = Counter(), 0
    source_text, target_text = _text_reader(source.source), _text_reader(source.target)
    origin = source.path or "records"
    for place, row in rows_of(source):
        advance()
        try:
            lang = _language(source, row)
            record = {"source": source_text(row), "target": target_text(row), "lang": lang}
        except BadLine as error:
            if source.on_bad_line == "error":
                raise ValueError(f"{place}: {error}") from None
            skip(f"{place}: {error}")
            continue
        if source.languages is not None and lang not in source.languages:
            continue
        if source.limit_per_language is not None and per_language[lang] == source.limit_per_language:
            continue
        per_language[lang] += 1
        kept += 1
        yield Line(place, origin, record)
        if kept == source.limit:
            break
    if not kept:
        raise ValueError(f"{origin}: no records")
    if source.languages is not None and (absent := [lang for lang in source.languages if lang not in per_language]):
        limit = "" if source.limit is None else f" within the limit of {source.limit}"
        raise ValueError(f"{origin}: no records of languages {absent}{limit}; it has {dict(per_language)}")


def _language(source, row):
    """Language code of a reader's row: a dict, or the BadLine that its reader met."""
    if isinstance(row, BadLine):
        raise row
    if not isinstance(row, dict):
        raise BadLine(f"expected an object with fields, got {type(row).__name__}")
    if source.lang is not None:
        return language_code(source.lang)
    lang = row.get("lang", "") if source.lang_field is None else _field(row, source.lang_field)
    if not isinstance(lang, str):
        raise BadLine(f"field {source.lang_field or 'lang'!r} holds {type(lang).__name__}, not text")
    return language_code(lang)


def _text_reader(field):
    """A function from a row to the text of a field, or of a template over fields."""
    if not check_template(field, "field"):
        return lambda row: _as_text(_field(row, field), f"field {field!r}")

    def fill(row):
        try:
            text = _Filler().vformat(field, (), row)
        except (KeyError, IndexError, TypeError) as error:
            raise BadLine(
                f"template {field!r} does not fit: {type(error).__name__} {error}; fields: {_names(row)}"
            ) from None
        return _as_text(text, f"template {field!r}")

    return fill


def _as_text(value, name):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise BadLine(f"{name} holds {value}, not text")
        value = str(value)
    if not isinstance(value, str):
        raise BadLine(f"{name} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    if reason := no_text(value):
        raise BadLine(f"{name} {reason}")
    return value


def _field(row, name):
    if name not in row:
        raise BadLine(f"no field {name!r}; fields: {_names(row)}")
    return row[name]


def _names(row):
    return ", ".join(map(str, row)) or "none"
