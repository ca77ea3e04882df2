"""Runs of pytest that go on when a test hangs, or ends its process: see bench/attempts.py for the files between the two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.attempts import LOST, read_lines, settle

POLL = 0.1  # seconds between looks at a process
UNNAMED = 2  # ends in a row with no test begun, before a run is given up
STARTS = 60  # of a run, however its processes end
_ENDED_WELL = (0, 1, 5)  # pytest's: all passed, some failed, none collected
_running: set[subprocess.Popen] = set()


@dataclass
class Run:
    """One process at a time, from its first start to the end of its tests.

    command: without --attempts. folder: of its attempts, new or as an earlier run left it. limit: seconds that one attempt may take.
    """

    command: Sequence[str]
    folder: Path
    limit: float
    log: Path
    process: subprocess.Popen = field(init=False)
    given_up: str | None = None
    starts: int = 0
    unnamed: int = 0
    seen: tuple[bytes, float] = (
        b"",
        0.0,
    )  # what was being tried when it was last looked at, and the time of its change
    since: float = 0.0

    def start(self) -> None:
        """The next process."""
        self.starts += 1
        self.seen = (b"", 0.0)
        self.process = start([*self.command, "-p", "bench.attempts", "--attempts", str(self.folder)], self.log)

    def look(self) -> bool:
        """Whether it goes on; a process that hangs is ended, and one that ended before its tests did is replaced."""
        status = self.process.poll()
        if status is None:
            if not self._hangs():
                return True
            why = f"hangs: no answer in {self.limit:.0f} s"
        elif status in _ENDED_WELL:
            why = None
        else:
            why = f"ended its process: {_said(status)}"
        end(self.process)  # and what it may have left running
        if why is None:
            return False
        if status == LOST or settle(self.folder, why) is not None:  # else nothing tells what to leave out next time
            self.unnamed = 0
        else:
            self.unnamed += 1
        if self.unnamed == UNNAMED or self.starts == STARTS:
            self.given_up = f"given up: pytest {why}; {last_line(self.log)}"
            return False
        self.start()
        return True

    def _hangs(self):
        """Whether the same has been tried for too long."""
        with suppress(FileNotFoundError):
            path = self.folder / "now"
            seen = path.read_bytes(), path.stat().st_mtime
            if seen != self.seen or seen[0].strip() in (b"", b"{}"):
                self.seen, self.since = seen, time.monotonic()
            return time.monotonic() - self.since > self.limit
        return False


@dataclass
class Outcome:
    """What came of a step.

    status: "done", "cut" (out of time) or "failed" (it could not be run at all). tests: one dict each, as bench/attempts.py writes
    them, with those of earlier runs. broken: implementations that ended their process. note: why it failed, or what a command said.
    figures: of a command, the numbers of a bench.report.results.Compiled.
    """

    status: str
    seconds: float = 0.0
    tests: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None
    figures: dict[str, int] = field(default_factory=dict)


def supervise(
    runs: Sequence[Run], seconds: float, each_second: Callable[[], None] = lambda: None
) -> tuple[str, str | None]:
    """Run them all at once until all have ended, for so many seconds at most. -> status of an Outcome, and its note."""
    end_by = time.monotonic() + seconds
    told = time.monotonic()
    for run in runs:
        run.start()
    going = list(runs)
    while going and time.monotonic() < end_by:
        time.sleep(POLL)
        going = [run for run in going if run.look()]
        if time.monotonic() - told > 1:
            told = time.monotonic()
            each_second()
    for run in going:
        end(run.process)
    given_up = [run.given_up for run in runs if run.given_up is not None]
    if given_up:
        return "failed", "; ".join(given_up)
    return ("cut", "out of time") if going else ("done", None)


def attempts_of(folders: Iterable[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> tests, broken, of all the folders."""
    folders = list(folders)
    return tuple(
        [line for folder in folders for line in read_lines(folder / name)] for name in ("done.jsonl", "broken.jsonl")
    )


def start(command: Sequence[str], log: Path, errors: Path | None = None) -> subprocess.Popen:
    """A process in a session of its own, with its output at the end of `log`. errors: the same for its standard error, by default
    `log` too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output, open(errors or log, "ab") as error_output:
        process = _start(command, output, error_output)
    _running.add(process)
    return process


def end(process: subprocess.Popen) -> None:
    """Kill it with all that it started: a process that waits for a GPU hears nothing else."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _running.discard(process)


def end_all() -> None:
    """Kill what still runs, before this process ends."""
    for process in list(_running):
        end(process)


def pytest_command(*arguments: str) -> list[str]:
    """Of a run whose log is read when something went wrong; -p no:cacheprovider: several run at once."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *arguments]


def _start(command: Sequence[str], output: IO[bytes], errors: IO[bytes]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True)


def last_line(log: Path) -> str:
    """Of what a process said."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _said(status):
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
