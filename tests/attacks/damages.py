"""What can befall a file on a disk or on its way here: one rule each, the same for every kind of file."""

import os
import random
import shutil
from pathlib import Path


def flip(path: Path, seed: int) -> None:
    """One bit somewhere."""
    content = bytearray(path.read_bytes())
    moments = random.Random(seed)
    if content:
        content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, seed: int) -> None:
    """Cut off at some byte, the first or the last among them."""
    size = path.stat().st_size
    os.truncate(path, random.Random(seed).choice([0, size // 2, max(0, size - 1)]))


def delete(path: Path, seed: int) -> None:
    """Not there."""
    path.unlink()


def folder(path: Path, seed: int) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


def dangling_link(path: Path, seed: int) -> None:
    """A link to nowhere."""
    path.unlink()
    path.symlink_to(path.parent / "moved-away" / path.name)


def pipe(path: Path, seed: int) -> None:
    """A named pipe, which a reader would wait for."""
    path.unlink()
    os.mkfifo(path)


def empty(path: Path, seed: int) -> None:
    """No byte."""
    path.write_bytes(b"")


def null(path: Path, seed: int) -> None:
    """JSON, but nothing in it."""
    path.write_bytes(b"null\n")


def not_utf8(path: Path, seed: int) -> None:
    """Bytes of another encoding at the beginning."""
    path.write_bytes(b"\xff\xfe\xc3" + path.read_bytes())


def deep(path: Path, seed: int) -> None:
    """JSON nested a hundred thousand times."""
    path.write_bytes(b"[" * 100_000 + b"]" * 100_000)


def long_number(path: Path, seed: int) -> None:
    """A JSON object with a number of five thousand digits."""
    path.write_bytes(b'{"a": ' + b"9" * 5000 + b"}\n")


def huge(path: Path, seed: int) -> None:
    """What was there, and 64 MB of zeros (a sparse file)."""
    os.truncate(path, path.stat().st_size + (64 << 20))


RULES = (flip, truncate, delete, folder, dangling_link, pipe, empty, null, not_utf8, deep, long_number, huge)


def copied(pristine: Path, target: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(pristine, target, symlinks=True)
    return target
