"""The texts of a job, line by line: where they come from, and what is wrong with one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from layalign.kernels.files import regular


class Line(NamedTuple):
    """A text and its place among the lines given, counted from 1; `wrong` says why it cannot be answered, if it cannot."""

    number: int
    text: str
    wrong: str | None = None


def read_lines(texts: str | Sequence[str], file: str | Path | None) -> list[Line]:
    """Every text there is, from arguments, a file or standard input; lines of white space alone are passed over.

    Args:
        texts: texts given as arguments.
        file: a path, "-" for standard input. With neither, standard input is read unless it is a terminal.

    Raises:
        ValueError: both or none are given, no text is there, or a file cannot be read.
    """
    if isinstance(texts, str):
        texts = [texts]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"texts: got {wrong[0]!r} among them, takes texts")
    if texts and file is not None:
        raise ValueError("texts: give either texts or a file, not both")
    if texts:
        found = [Line(number, text) for number, text in enumerate(texts, 1)]
    elif file is not None and str(file) != "-":
        found = _decoded(_content(Path(file)))
    elif file is not None or not sys.stdin.isatty():
        file = "standard input"
        # As bytes, where there are any: one line that is not UTF-8 is that line's fault alone.
        raw = getattr(sys.stdin, "buffer", None)
        found = _decoded(raw.read() if raw is not None else sys.stdin.read().encode("utf-8", "surrogatepass"))
    else:
        raise ValueError("texts: nothing to answer; give a text, a file, or text on standard input")
    found = [Line(number, text.strip(), wrong) for number, text, wrong in found if text.strip() or wrong]
    if not found:
        raise ValueError(f"texts: {file or 'the text given'} is empty")
    return found


def _content(path: Path) -> bytes:
    regular(path, "file")
    if not path.is_file():
        raise ValueError(f"file: no such file: {path}")
    return path.read_bytes()


def _decoded(content: bytes) -> list[Line]:
    return [_line(number, raw) for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)]


def _line(number: int, raw: bytes) -> Line:
    try:
        return Line(number, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Line(
            number, raw.decode("utf-8", "replace"), f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
        )
