"""The cache of tokenised records: a sealed folder for each content, mapped into memory when it is read.

A folder is called by a hash of all that its arrays depend on, so runs share it and none looks into another's. It is written
beside, hashed, fsynced and renamed; of several processes that want one, the first makes it and the others wait.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from layalign.folders import damage
from layalign.kernels.files import MANIFEST, write_json
from layalign.train.checkpoints import publish, seal, writing
from layalign.train.data.collate import EncodedRecords, Rows, content_hash
from layalign.train.data.encoding import Chunk

logger = logging.getLogger(__name__)

# Counted up when the same files and settings give other records than before.
FORMAT = 2
INFO = "info.json"
_LARGE = 100 << 20
# In the order of `content_hash`.
_ARRAYS = {
    "question_ids": np.int32,
    "question_begins": np.int64,
    "text_ids": np.int32,
    "text_begins": np.int64,
    "prompt_lengths": np.int32,
    "languages": np.uint16,
}


class Stored(NamedTuple):
    """Records of the cache, what was written down with them (a JSON object), and the folder they are in."""

    records: EncodedRecords
    info: dict[str, Any]
    folder: Path


class StoreWriter:
    """Appends encoded records to the arrays of a folder; a context manager.

    Args:
        folder: where the files go.

    Attributes:
        count: records so far.
    """

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self._files = {name: (folder / name).open("wb") for name in _ARRAYS}
        self._places: dict[str, int] = {}
        self._ends = {"question": 0, "text": 0}
        for side in self._ends:
            self._write(f"{side}_begins", np.zeros(1))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, chunk: Chunk) -> None:
        """Append some records."""
        self._write("question_ids", chunk.questions)
        self._write("text_ids", chunk.texts)
        for side, lengths in (("question", chunk.question_lengths), ("text", chunk.text_lengths)):
            ends = self._ends[side] + np.cumsum(lengths)
            self._ends[side] = int(ends[-1])
            self._write(f"{side}_begins", ends)
        self._write("prompt_lengths", chunk.prompt_lengths)
        places = [self._places.setdefault(language, len(self._places)) for language in chunk.languages]
        self._write("languages", np.array(places))
        self.count += len(places)

    def language_names(self) -> list[str]:
        """The languages met so far, as the records' numbers count them."""
        return list(self._places)

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, _ARRAYS[name]).data)


def stored(
    cache: str | os.PathLike, key: str, name: str, make: Callable[[Path], dict[str, Any]], waiting: bool = True
) -> Stored:
    """The records of a key: those in the cache, or new ones.

    Args:
        cache: folder of the cache.
        key: hash of all that the records depend on.
        name: what messages call them.
        make: writes a store into a folder (`StoreWriter`) and gives what is to be written down with it.
        waiting: say so where another process is at it.

    Raises:
        ValueError: as `make`; a cache that cannot be written to.
    """
    folder = Path(cache) / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache: {folder.parent} cannot be made: {error.strerror}; {_OTHERWISE}") from error
    whole, looked_through = None, False
    while True:
        with _locked(folder, name if waiting and not looked_through else "") as alone:
            if not folder.exists():
                return _made(folder, name, make, alone)
            if looked_through:
                reason = None if whole is not None and whole == _manifest(folder) else damage(folder)
                if reason is None:
                    os.utime(folder / MANIFEST)  # so that the clearing knows what is in use
                    logger.info("%s: tokenised before, %s", name, folder)
                    return _opened(folder)
                logger.warning("%s: the cached tokens in %s are of no use and made anew: %s", name, folder, reason)
                return _made(folder, name, make, alone)
        # Without the lock: all that waited for it would read the whole entry one after the other.
        manifest = _manifest(folder)
        whole, looked_through = manifest if damage(folder) is None else None, True


_OTHERWISE = "set cache, or the environment variable LAYALIGN_CACHE, to a folder with room"


def _made(folder, name, make, alone):
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        _make(folder, partial, name, make, alone)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(file.stat().st_size for file in folder.iterdir())
    level = logging.WARNING if size >= _LARGE else logging.INFO
    told = "%s: %.1f MB of tokens are now in %s, for other runs too; `layalign cache` lists them, `layalign cache --clear` removes them"
    logger.log(level, told, name, size / 1e6, folder)
    return _opened(folder)


def _manifest(folder):
    """What an entry's manifest says, which no other has: when it was made is hashed in it, too. None: it cannot be read."""
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return None


def _make(folder, partial, name, make, alone):
    with writing(partial, f"{name}: the cached tokens"):
        # With the lock, what bears this key's name was left by processes that were killed.
        for leftover in folder.parent.glob(f".{folder.name}.*") if alone else ():
            if leftover.is_dir():
                shutil.rmtree(leftover)
        partial.mkdir()
        write_json(partial / INFO, {"format": FORMAT, "made": time.time(), **make(partial)})
        seal(partial)
        publish(partial, folder)


def _opened(folder: Path) -> Stored:
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    hashes = {
        name: file["sha256"]
        for name, file in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
    }
    arrays = {name: _mapped(folder / name, dtype) for name, dtype in _ARRAYS.items()}
    records = EncodedRecords(
        Rows(arrays["question_ids"], arrays["question_begins"]),
        Rows(arrays["text_ids"], arrays["text_begins"]),
        arrays["prompt_lengths"],
        arrays["languages"],
        info["languages"],
        content_hash([hashes[name] for name in _ARRAYS], info["languages"]),
    )
    return Stored(records, info, folder)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    # An empty file cannot be mapped.
    # As a plain array: each slice of a memmap is one of its own, which takes longer than to read the ids.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a key; it ends with this process, however it ends. Gives whether there is one: some file systems have none."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if name:
                logger.warning("%s: another process tokenises the same data; waiting for it", name)
            lock.acquire()
    except NotImplementedError:
        yield False
        return
    except OSError as error:
        raise ValueError(f"cache: {folder.parent} cannot be written to: {error.strerror}; {_OTHERWISE}") from error
    try:
        yield True
    finally:
        lock.release()


class Entry(NamedTuple):
    """One key of the cache: its folder, its bytes, when it was last used (seconds since 1970), and what it holds, in words."""

    folder: Path
    size: int
    used: float
    what: str


def entries(cache: str | os.PathLike) -> list[Entry]:
    """What a cache holds, the latest used first."""
    found = []
    for manifest in Path(cache).glob(f"*/{MANIFEST}"):
        folder = manifest.parent
        if folder.name.startswith("."):  # sealed, and not yet called as it will be
            continue
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            what = f"{info['records']} records, {info['name']}: {', '.join(info['paths'][:2])}"
        except (OSError, ValueError, KeyError, TypeError):
            what = "damaged"
        size = sum(file.stat().st_size for file in folder.iterdir())
        found.append(Entry(folder, size, manifest.stat().st_mtime, what))
    return sorted(found, key=lambda entry: -entry.used)


def clear(cache: str | os.PathLike, found: Iterable[Entry]) -> int:
    """Remove entries of a cache, and what killed processes have left there. A run that reads them keeps what it has mapped.

    Returns:
        the bytes that were freed. An entry that a process is making or opening is left.
    """
    freed = 0
    for entry in found:
        lock = FileLock(entry.folder.with_name(f"{entry.folder.name}.lock"))
        try:
            with lock.acquire(timeout=0):
                doomed = entry.folder.with_name(f".{entry.folder.name}.old")
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(entry.folder, doomed)
                shutil.rmtree(doomed)
        except Timeout:
            continue
        freed += entry.size
    for leftover in Path(cache).glob(".*.partial"):
        lock = FileLock(Path(cache) / f"{leftover.name.split('.')[1]}.lock")
        try:
            with lock.acquire(timeout=0):
                freed += sum(file.stat().st_size for file in leftover.iterdir())
                shutil.rmtree(leftover)
        except Timeout:
            continue
    return freed
