"""Folders that are either whole or not there: written beside, hashed, fsynced, then renamed into place.

A sealed folder holds manifest.json, written last, with the size and SHA-256 of every other file. After a crash at any
moment a folder under its final name is complete; damage that came later shows against the manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from layalign.kernels.files import fsync, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DISK_ERROR = re.compile(r"I/O error|os error \d+|PytorchStreamWriter|unexpected pos", re.IGNORECASE)
_STEP = re.compile(r"checkpoint-(\d+)")


@contextmanager
def sealed_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write into; when the block ends without an exception, seal it and rename it to `target`.

    What stood at `target` is removed after the new folder is complete on disk, not before.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    with writing(partial, target.name):
        _remove(partial)
        partial.mkdir(parents=True)
        yield partial
        seal(partial)
        publish(partial, target)


@contextmanager
def writing(partial: Path, what: str) -> Iterator[None]:
    """Say plainly that what the block writes into `partial` could not be written, and give back the room it took.

    Raises:
        ValueError: in place of an error of the disk (full, over a quota, read-only), whichever library met it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # safetensors and torch.save wrap the system's error into their own.
        if not isinstance(error, OSError) and not _DISK_ERROR.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or f"a write failed: {str(error).splitlines()[0]}"
        free = shutil.disk_usage(next(folder for folder in partial.absolute().parents if folder.exists())).free >> 20
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"{what} could not be written below {partial.parent} ({reason}; {free} MB free there); what was saved before is "
            "as it was. Make room and run the same command again"
        ) from error


def seal(folder: str | os.PathLike) -> None:
    """Write a folder's files to disk and, last, its manifest."""
    files = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST):
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(Path(folder) / MANIFEST, {"files": files})
    for inner in (*(path for path in Path(folder).rglob("*") if path.is_dir()), Path(folder)):
        fsync(inner)


def publish(folder: Path, target: Path) -> None:
    """Rename a sealed folder to its final name."""
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    fsync(target.parent)
    _remove(old)


def damage(folder: str | os.PathLike) -> str | None:
    """Why a folder is not a whole sealed one; None if it is."""
    folder = Path(folder)
    if not folder.is_dir():
        return "not there"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} is damaged (its hash is not the manifest's)"
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written to the end"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable: {error}"
    return None


def newest_valid(folder: str | os.PathLike) -> Path | None:
    """The whole checkpoint with the most steps in a folder, or None. Others are reported and left where they are."""
    for checkpoint in reversed(_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("checkpoint %s ignored: %s", checkpoint, reason)
    return None


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for checkpoint in _checkpoints(folder)[:-keep]:
        _remove(checkpoint)


def sweep(folder: str | os.PathLike) -> None:
    """Remove what interrupted writes and removals have left in a folder, once what they were about is complete."""
    for pattern in (".*.partial", ".*.old", ".partial"):
        for leftover in Path(folder).glob(pattern):
            if leftover.is_dir():
                _remove(leftover)
            else:
                leftover.unlink()


def _checkpoints(folder):
    found = [
        (int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _remove(folder):
    """Remove a folder, under another name first: a half-removed one must not look like a checkpoint."""
    if folder.exists():
        doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.old")
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
        shutil.rmtree(doomed)


def sha256_of(path: str | os.PathLike) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
