"""A file of JSON lines that a killed job continues without repeating or losing a line.

The job's description lies beside the lines, in a small JSON file written before the first of them. Lines are added only
where the description is the same; a file with lines and no description, or another, is refused and left as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layalign.kernels.files import write_json

try:
    import fcntl
except ImportError:  # Windows has none; two jobs at once on one file go unnoticed there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]


def line_of(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


class Journal:
    """The lines of one job, opened for adding; a context manager.

    Args:
        path: the JSON-lines file.
        job: JSON values that tell this job from others.
        job_path: where the description goes (default: the path with `.job.json` added).

    Attributes:
        records: the lines already there.

    Raises:
        ValueError: changing nothing, where the file has lines of another job or of none, holds a broken line before its
            last, or is being written by another process.
    """

    def __init__(self, path: str | Path, job: Record, job_path: str | Path | None = None):
        self.path = Path(path)
        self.job_path = Path(job_path) if job_path else self.path.with_name(self.path.name + ".job.json")
        if self.path.is_dir():
            raise ValueError(f"output: {self.path} is a folder, takes a file name")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab+")  # noqa: SIM115
        try:
            self._lock()
            self._claim(json.loads(json.dumps(job)))
            self.records = self._read()
        except ValueError:
            self._file.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` (dicts), each as one line, and wait until the disk has them."""
        self._file.write("".join(map(line_of, records)).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.extend(records)

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
            raise ValueError(f"output: {self.path} is being written by another process") from None

    def _claim(self, job: Record) -> None:
        """Check that the lines there are this job's; an empty file has no job, or one that never wrote a line."""
        written = self._written_job()
        if written == job:
            return
        if not os.fstat(self._file.fileno()).st_size:
            write_json(self.job_path, job, indent=2)
        elif written is None:
            raise ValueError(f"output: {self.path} exists and was not written by such a job; choose another output")
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
        except (FileNotFoundError, ValueError):
            return None
        return written if isinstance(written, dict) else None

    def _read(self) -> list[Record]:
        """The complete lines; what a killed writer left after the last of them is cut off."""
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        records = []
        for number, line in enumerate(complete.split(b"\n")[:-1], 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{self.path}:{number}: not JSON; mend or remove this file to go on") from None
        self._file.truncate(len(complete))
        return records
