"""Rows of data files, one after the other: what is parsed is not kept, so that a file may be larger than memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from layalign.train.data.dataset_rows import dataset_rows

if TYPE_CHECKING:
    from layalign.train.data.data_source import DataSource

_BLOCK = 1 << 20
# Where a block ends inside a literal, a number or an escape, json's error stands so far from the end at most.
_LITERAL = 12
# By how a file begins: what opens it, and what is not opened.
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_COMPRESSED = {b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
_LONGEST_BEGIN = 6


class BadLine(ValueError):
    """One unusable line; the reader that catches it adds where it stands."""


def rows_of(source: DataSource) -> Iterator[tuple[str, Any]]:
    """The rows of one source, read as they are taken.

    Args:
        source: with its paths in place (`DataSource.located`).

    Yields:
        the row's place ("file:line") and the row: a dict, or the BadLine that stands there.

    Raises:
        ValueError: a file that cannot be read, is empty or broken as a whole; files of a pair of different length.
    """
    return _ROWS[source.format](source)


def count_lines(path: str) -> int:
    """Lines of a file, the last one counted without its line feed too.

    Raises:
        ValueError: it cannot be read.
    """
    count, last = 0, b"\n"
    with _open(path) as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def is_packed(path: str) -> bool:
    """Whether a file is packed by gzip, bzip2 or xz: its own line feeds are not those of the text within.

    Raises:
        ValueError: it cannot be read.
    """
    return _opener(path) is not open


def json_value(text: str) -> Any:
    """The value that a text of JSON stands for.

    Raises:
        BadLine: it is none, or one that cannot be held.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}" if text.strip() else "empty line") from None
    except (RecursionError, ValueError) as error:  # nested thousandfold; a number of thousands of digits
        raise BadLine(f"JSON that cannot be held: {error}") from None


def _opener(path):
    try:
        with open(path, "rb") as file:
            begin = file.read(_LONGEST_BEGIN)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return next((opener for magic, opener in _PACKED.items() if begin.startswith(magic)), open)


@contextmanager
def _open(path) -> Iterator[IO[bytes]]:
    """The bytes of a file, or of what gzip, bzip2 or xz packed into it."""
    try:
        with _opener(path)(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _lines(path):
    """(line number, text or BadLine) of a text file; only a line feed ends a line, so that both files of a pair count
    alike.
    """
    with _open(path) as file:
        number = 0
        for number, raw in enumerate(file, 1):
            if number == 1:
                _refuse_compressed(path, raw)
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, BadLine(f"not UTF-8 (byte {error.start + 1} of the line)")
        if number == 0:
            raise ValueError(f"{path}: empty file")


def _refuse_compressed(path, begin):
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            raise ValueError(f"{path}: is compressed ({name}); unpack it, or pack it with gzip, bzip2 or xz")


def _pair_rows(source):
    counts = count_lines(source.path), count_lines(source.target_path)
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source.path} has {counts[0]} lines and {source.target_path} {counts[1]}; "
            "line-aligned files have equally many"
        )
    for (number, text), (_, target) in zip(_lines(source.path), _lines(source.target_path), strict=True):
        for path, side in ((source.path, text), (source.target_path, target)):
            if isinstance(side, BadLine) or not side.strip():
                yield f"{path}:{number}", side if isinstance(side, BadLine) else BadLine("empty line")
                break
        else:
            yield f"{source.path}:{number}", {"source": text, "target": target}


def _json_line_rows(source):
    for number, text in _lines(source.path):
        row = text
        if isinstance(text, str):
            try:
                row = json_value(text)
            except BadLine as error:
                row = error
        yield f"{source.path}:{number}", row


def _tsv_rows(source):
    columns = source.columns
    for number, text in _lines(source.path):
        place = f"{source.path}:{number}"
        if isinstance(text, BadLine):
            yield place, text
            continue
        cells = text.split("\t")
        if columns is None:
            columns = cells
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise ValueError(f"{place}: columns {twice} are there more than once")
            continue
        if len(cells) != len(columns):
            yield place, BadLine(f"{len(cells)} columns, expected {len(columns)}")
        else:
            yield place, dict(zip(columns, cells, strict=True))


def _json_list_rows(source):
    """Objects of one JSON list, decoded one by one: each has its line number, and a limit stops the reading."""
    with _open(source.path) as file:
        text = _Text(source.path, file)
        first = text.after_space()
        if not first:
            raise ValueError(f"{source.path}: empty file")
        if first != "[":
            raise ValueError(f"{source.path}: expected a list of objects, got {text.shown(20)!r}")
        text.step()
        while text.after_space() != "]":
            place = f"{source.path}:{text.line()}"
            yield place, text.value()
            following = text.after_space()
            if following == ",":
                text.step()
            elif following != "]":
                raise text.error("expected a comma or the end of the list")
        text.step()
        if text.after_space():
            raise text.error("more text after the list")


class _Text:
    """The text of a file from where it has been parsed to, some blocks at a time."""

    def __init__(self, path, file):
        self.path, self.file, self.ended = path, file, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        # Of the text's first character: its line, and how much of that line stands before it.
        self._line, self._before = 1, 0
        self._counted, self._newlines = 0, 0

    def after_space(self):
        """The next character that is no white space; "" at the end."""
        while True:
            while self._text[self._at : self._at + 1] in (" ", "\n", "\r", "\t") and self._at < len(self._text):
                self._at += 1
            if self._at < len(self._text) or self.ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def step(self):
        self._at += 1

    def shown(self, length):
        return self._text[self._at : self._at + length]

    def line(self):
        self._newlines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line + self._newlines

    def error(self, what):
        return ValueError(f"{self.path}:{self.line()}: not JSON: {what}")

    def value(self):
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                # A number that touches the end may go on behind it.
                if end < len(self._text) or self.ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LITERAL
                if self.ended or not cut:
                    column = error.colno + (self._before if error.lineno == 1 else 0)
                    line = self._line + error.lineno - 1
                    raise ValueError(f"{self.path}:{line}: not JSON: {error.msg} at column {column}") from None
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{self.path}:{self.line()}: JSON that cannot be held: {error}") from None
            self._more()

    def _more(self):
        """Drop what has been parsed and read on, the more the longer the value at hand is: none is parsed many times."""
        self._line = self.line()
        begin = self._text.rfind("\n", 0, self._at) + 1
        self._before = self._at - begin + (0 if begin else self._before)
        self._text, self._at, self._counted, self._newlines = self._text[self._at :], 0, 0, 0
        block = self.file.read(max(_BLOCK, len(self._text)))
        if self._line == 1 and not self._text:
            _refuse_compressed(self.path, block)
        self.ended = not block
        try:
            self._text += self._decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise ValueError(
                f"{self.path}:{line}: not UTF-8; what follows in a JSON list cannot be told, so it cannot be skipped"
            ) from None


def _memory_rows(source):
    records = source.records() if callable(source.records) else source.records
    if not isinstance(records, Iterable) or isinstance(records, (str, bytes, Mapping)):
        raise ValueError(
            f"records: the function gave {type(records).__name__}, takes one that gives an iterator over dicts"
        )
    for index, row in enumerate(records):
        yield f"records[{index}]", row


_ROWS = {
    "pairs": _pair_rows,
    "jsonl": _json_line_rows,
    "json": _json_list_rows,
    "tsv": _tsv_rows,
    "dataset": dataset_rows,
    "records": _memory_rows,
}
