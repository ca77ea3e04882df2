"""A file of JSON lines that a killed job continues without repeating or losing a line.

The job's description lies beside the lines, in a small JSON file written before the first of them. Lines are added only
where the description is the same; a file with lines and no description, or another, is refused and left as it is. A third
file, the path with `.sums` added, has a hash of every line: a line that was changed afterwards is named, not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layalign.kernels.files import InUse, regular, write_json, write_text

try:
    import fcntl
except ImportError:  # Windows has none; two jobs at once on one file go unnoticed there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
Check = Callable[[int, Record], str | None]

SUMS = ".sums"
_SUM = 16  # hexadecimal digits of a line's SHA-256


def line_of(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


class Journal:
    """The lines of one job, opened for adding; a context manager.

    Args:
        path: the JSON-lines file.
        job: JSON values that tell this job from others.
        job_path: where the description goes (default: the path with `.job.json` added).
        check: given a line's place, from 0, and its record, says what is wrong with it for this job, if anything is.

    Attributes:
        records: the lines already there.

    Raises:
        ValueError: changing nothing, where the file has lines of another job or of none, holds a broken, changed or wrong
            line, is no plain file, or is being written by another process.
    """

    def __init__(self, path: str | Path, job: Record, job_path: str | Path | None = None, check: Check | None = None):
        self.path = Path(path)
        self.job_path = Path(job_path) if job_path else self.path.with_name(self.path.name + ".job.json")
        self.sums_path = self.path.with_name(self.path.name + SUMS)
        if self.path.is_dir():
            raise ValueError(f"output: {self.path} is a folder, takes a file name")
        for file in (self.path, self.job_path, self.sums_path):
            regular(file, "output")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk did not take would lie there, and be written when the file is closed.
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self._claim(json.loads(json.dumps(job)))
            self.records = self._read(check)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` (dicts), each as one line, and wait until the disk has them.

        Raises:
            ValueError: the disk does not take them; the lines before are as they were.
        """
        lines = [line_of(record).encode() for record in records]
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(b"".join(lines))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            with open(self.sums_path, "ab") as sums:
                sums.write(b"".join(map(_sum_line, lines)))
        except OSError as error:
            os.truncate(self.path, size)
            raise ValueError(
                f"output: {self.path} could not be written ({error.strerror}); its {len(self.records)} lines are as they "
                "were. Make room and run the same command again"
            ) from error
        self.records.extend(records)

    def replace(self, records: Sequence[Record]) -> None:
        """Put `records` in the place of all lines, unless they are those."""
        self.records = list(records)
        lines = [line_of(record).encode() for record in records]
        if b"".join(lines) != self.path.read_bytes():
            # Lines without sums are believed, so a crash in between leaves none that are not.
            self.sums_path.unlink(missing_ok=True)
            write_text(self.path, b"".join(lines).decode())
            self._write_sums(lines)

    def remove(self) -> None:
        """Remove the lines and what lies beside them."""
        for file in (self.path, self.job_path, self.sums_path):
            file.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"output: {self.path} is being written by another process") from None

    def _claim(self, job: Record) -> None:
        """Check that the lines there are this job's; an empty file has no job, or one that never wrote a line."""
        written = self._written_job()
        if written == job:
            return
        if not os.fstat(self._file.fileno()).st_size:
            write_json(self.job_path, job, indent=2)
        elif written is None:
            raise ValueError(
                f"output: {self.path} exists and was not written by such a job ({self.job_path.name} is missing or broken); "
                "choose another output"
            )
        else:
            differs = sorted(key for key in {*written, *job} if written.get(key) != job.get(key))
            raise ValueError(
                f"output: {self.path} belongs to another job (different {', '.join(differs)}); "
                f"choose another output, or remove it and {self.job_path}"
            )

    def _written_job(self) -> Record | None:
        """The description beside the lines, None where there is none that can be read."""
        try:
            written = json.loads(self.job_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return written if isinstance(written, dict) else None

    def _read(self, check: Check | None) -> list[Record]:
        """The complete lines; what a killed writer left after the last of them is cut off, and missing sums are made."""
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        lines = [line + b"\n" for line in complete.split(b"\n")[:-1]]
        records = list(checked_lines(self.path, lines, check))
        if len(complete) < len(content):
            self._file.truncate(len(complete))
        # To the byte: the half of a line at its end, that a killed writer left, would be the beginning of the next one.
        if not self.sums_path.is_file() or self.sums_path.read_bytes() != b"".join(map(_sum_line, lines)):
            self._write_sums(lines)
        return records

    def _write_sums(self, lines: Sequence[bytes]) -> None:
        write_text(self.sums_path, b"".join(map(_sum_line, lines)).decode())


def checked_lines(path: Path, lines: Sequence[bytes], check: Check | None = None) -> Iterator[Record]:
    """The records of a journal's lines.

    Args:
        path: the JSON-lines file, for messages, and for the sums beside it.
        lines: of the file, each with its line feed.
        check: as for `Journal`.

    Raises:
        ValueError: a line that is no JSON object, has changed, or is not as `check` wants it.
    """
    way_out = "mend it, or remove this file to begin anew"
    sums = _sums(path)
    for place, line in enumerate(lines):
        where = f"{path}:{place + 1}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not JSON; {way_out}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object; {way_out}")
        wrong = check(place, record) if check is not None else None
        if wrong:
            raise ValueError(f"{where}: {wrong}; {way_out}")
        if place < len(sums) and sums[place] != _sum_line(line):
            raise ValueError(
                f"{where}: is not what was written there ({path.name}{SUMS} has another hash of it); {way_out}"
            )
        yield record


def _sums(path: Path) -> list[bytes]:
    """The complete lines of the sums beside a journal."""
    sums = path.with_name(path.name + SUMS)
    regular(sums, "output")
    try:
        return [line + b"\n" for line in sums.read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def _sum_line(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:_SUM].encode() + b"\n"
