"""The cache folder, and the one way in which this project writes a file that readers find whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder(given: str | os.PathLike | None = None) -> Path:
    """`given`, else $LAYALIGN_CACHE, else layalign under $XDG_CACHE_HOME or ~/.cache."""
    folder = given or os.environ.get("LAYALIGN_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "layalign").expanduser()


@contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file to write ("w", UTF-8, or "wb"), which takes the place of `path` when the block ends, on disk before it does.

    Two processes that write one path do not mix: each has a file of its own, and the last to end is kept. After an
    exception `path` is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def fsync(path: str | os.PathLike) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
