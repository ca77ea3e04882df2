"""The cache folder, and the one way in which this project writes a file that readers find whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Of a folder that is written whole: size and SHA-256 of its other files, {"files": {name: {"size", "sha256"}}}.
MANIFEST = "manifest.json"
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_WRAPPED = re.compile(r"I/O error|os error \d+|PytorchStreamWriter|unexpected pos", re.IGNORECASE)


class InUse(ValueError):
    """What another process works at now."""


def cache_folder(given: str | os.PathLike | None = None) -> Path:
    """`given`, else $LAYALIGN_CACHE, else layalign under $XDG_CACHE_HOME or ~/.cache."""
    folder = given or os.environ.get("LAYALIGN_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "layalign").expanduser()


def regular(path: str | os.PathLike, name: str) -> None:
    """Refuse what stands at a file's path and is none: a folder, a link to nothing, or a pipe, which would be waited for for ever.

    Args:
        path: may not exist.
        name: the setting that the message begins with.

    Raises:
        ValueError: it is something else.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{name}: {path} is a link to {os.readlink(path)}, which does not exist")
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "pipe or device"
        raise ValueError(f"{name}: {path} is a {kind}, takes a file")


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


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: it cannot be written to; of a pipe that nobody reads, too, which is not waited for.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o644)
    with open(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        kind: the type that the value must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder or a pipe, or holds no such value; the message begins with the path.
    """
    regular(path, "file")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start + 1}); restore or remove it") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply to be read; restore or remove it") from None
    except ValueError as error:  # a number of thousands of digits among them
        reason = str(error).partition(";")[0]
        raise ValueError(f"{path}: not JSON that can be read ({reason}); restore or remove it") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: holds a {type(value).__name__}, takes a {kind.__name__}; restore or remove it")
    return value


def disk_error(error: BaseException) -> str | None:
    """What a disk refused (full, over a quota, too long a file, read-only, broken), whichever library met it; None for other errors."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _OF_DISKS else None
    # safetensors and torch.save wrap the system's error into their own.
    wrapped = type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError)
    return f"a write failed: {str(error).splitlines()[0]}" if wrapped and _WRAPPED.search(str(error)) else None


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` when the block ends; after an exception nothing is left of it.

    Raises:
        ValueError: something of that name is there.
    """
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already; choose another target, nothing is overwritten")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(target.parent)


def fsync(path: str | os.PathLike) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
    return digest.hexdigest()


def blocks_of(path: str | os.PathLike, size: int = 1 << 20) -> Iterator[bytes]:
    """A file's content in parts of at most `size` bytes."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block
