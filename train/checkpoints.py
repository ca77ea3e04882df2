"""Folders that are either whole or not there: written beside, hashed, fsynced, then renamed into place.

A sealed folder holds manifest.json, written last, with the size and SHA-256 of every other file. After a crash at any
moment a folder under its final name is complete; damage that came later shows against the manifest.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from layalign.folders import damage
from layalign.kernels.files import MANIFEST, disk_error, fsync, sha256_of, write_json

logger = logging.getLogger(__name__)

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
        reason = disk_error(error) or getattr(error, "strerror", None)
        if reason is None:
            raise
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


def newest_valid(folder: str | os.PathLike) -> Path | None:
    """The whole checkpoint with the most steps in a folder, or None. Others are reported and left where they are."""
    for checkpoint in reversed(_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("checkpoint %s ignored: %s", checkpoint, reason)
    return None


def newest(folder: str | os.PathLike) -> Path | None:
    """The checkpoint with the most steps in a folder, whole or not; None where there is none."""
    return next(reversed(_checkpoints(folder)), None)


def prune(folder: str | os.PathLike, keep: int, whole: Container[Path] = ()) -> None:
    """Remove the checkpoints that are older than the `keep` newest whole ones.

    Args:
        folder: the checkpoints'.
        keep: at least 1. A damaged one does not count: it is no way back.
        whole: those that this process has written, which are not read again.
    """
    left = keep
    for checkpoint in reversed(_checkpoints(folder)):
        if not left:
            _drop(checkpoint)
        elif checkpoint in whole or damage(checkpoint) is None:
            left -= 1


def sweep(folder: str | os.PathLike) -> None:
    """Remove what interrupted writes and removals have left in a folder, once what they were about is complete."""
    for pattern in (".*.partial", ".*.old", ".partial"):
        for leftover in Path(folder).glob(pattern):
            _drop(leftover)


def _drop(path):
    """Remove what is not needed any more. Where that fails, as over NFS while a file of it is open, the rest goes on all the same."""
    try:
        if path.is_dir():
            _remove(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s, which is not needed any more, could not be removed: %s", path, error)


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
