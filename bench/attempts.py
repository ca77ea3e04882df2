"""A pytest plugin for runs that something may end from within: `pytest -p bench.attempts --attempts FOLDER` goes on where the last run
of the same FOLDER broke off.

FOLDER/now says what is being tried, and its time of change since when: whoever finds it filled after the process's end knows what
ended it. FOLDER/done.jsonl has the tests that have a result, which are not run again; FOLDER/broken.jsonl the implementations that
ended their process, which are not tried again: their rows fail with the reason. bench/first_light/supervise.py starts such runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LOST = 77  # exit status of a process whose GPU answers no longer, as after an illegal address
_WIDTH = 2000  # bytes of `now`, which is written over in place
_LONGEST = 200  # characters of the name of a case or of an implementation
_attempts: Attempts | None = None


class Attempts:
    """The three files of a folder, for one process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        settle(self.folder, "its process ended")
        self.broken = read_lines(self.folder / "broken.jsonl")
        self.now: dict[str, Any] = {}
        self._file = os.open(self.folder / "now", os.O_RDWR | os.O_CREAT)

    def enter(self, **what: Any) -> None:
        """Say what is tried from here on; nothing: {}."""
        self.now = what
        os.pwrite(self._file, _padded(what), 0)


@contextmanager
def case(name: str) -> Iterator[None]:
    """What is tried within belongs to this case of the present test."""
    if _attempts is None:
        yield
        return
    before = _attempts.now
    _attempts.enter(**before, case=_short(name))
    try:
        yield
    finally:
        _attempts.enter(**before)


@contextmanager
def trying(name: str) -> Iterator[None]:
    """Within, `name` is what ends the process, should it end."""
    if _attempts is None:
        yield
        return
    before = _attempts.now
    _attempts.enter(**before | {"name": _short(name)})
    try:
        yield
    finally:
        _attempts.enter(**before)


def why_not(name: str) -> str | None:
    """Why an implementation is not to be tried again in the present case; None: nothing speaks against it.

    What hung or killed its process is not tried in the other cases of the same test function either: each would cost as long again.
    """
    if _attempts is None:
        return None
    now = _attempts.now
    for one in _attempts.broken:
        if one["name"] == _short(name) and one["group"] == now.get("group"):
            if one.get("case") == now.get("case"):
                return f"{name} {one['why']}"
            if one["everywhere"]:
                return f"{name} is not tried: in {one.get('case') or one['test']} it {one['why']}"
    return None


def end_if_lost(name: str, why: str) -> None:
    """End this process, to go on in a fresh one, where the GPU answers no longer after what `name` did."""
    if _attempts is not None and device_lost():
        settle(_attempts.folder, why, everywhere=False, name=name)
        _leave()


def device_lost() -> bool:
    """Whether the GPU, should this process use one, fails whatever it is asked, or a CUDA graph whose capture failed has left its
    stream current or the random numbers of the device to itself: all that follows would fail by it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda")
        return torch.cuda.current_stream() != torch.cuda.default_stream()
    except Exception:  # of whatever kind the broken context makes it
        return True


def settle(folder: Path, why: str, everywhere: bool = True, name: str | None = None) -> str | None:
    """Write down what was being tried when the process ended, or is about to. -> its name, None where nothing was.

    why: as the end of a sentence that begins with the name. everywhere: not to be tried in other cases of the test function either.
    """
    try:
        now = json.loads((folder / "now").read_bytes() or b"{}")
    except (FileNotFoundError, ValueError):
        return None
    name = _short(name) if name else now.get("name")
    (folder / "now").write_bytes(_padded({}))
    if not now:
        return None
    if name is not None:
        _append(folder / "broken.jsonl", now | {"name": name, "why": why, "everywhere": everywhere})
        return name
    _append(folder / "done.jsonl", {"test": now["test"], "outcome": "failed", "message": why, "seconds": None})
    return now["test"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; a last one that was cut is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def in_a_line(error: BaseException) -> str:
    """Kind and message of an exception, without what follows its first line; a compiler's ends with what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    said = lines[0] if not lines[0].endswith(":") else f"{lines[0]} {lines[-1]}"
    return f"{type(error).__name__}: {said[:300]}"


def pytest_addoption(parser):
    group = parser.getgroup("runs that may break off")
    group.addoption("--attempts", metavar="FOLDER", help="go on where the last run of this FOLDER broke off")
    group.addoption("--share", metavar="I/N", help="only every N-th test, from the I-th on, counted from 0")


def pytest_configure(config):
    global _attempts
    if (folder := config.getoption("attempts")) is not None:
        _attempts = Attempts(folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if (share := config.getoption("share")) is not None:
        index, count = map(int, share.split("/"))
        _keep(config, items, items[index::count])
    if _attempts is not None:
        done = {line["test"] for line in read_lines(_attempts.folder / "done.jsonl")}
        _keep(config, items, [item for item in items if item.nodeid not in done])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if _attempts is None:
        return (yield)
    item.stash[_REPORTS] = []
    _attempts.enter(test=item.nodeid, group=item.nodeid.partition("[")[0])
    result = yield
    outcome, message = _summed(item.stash[_REPORTS])
    seconds = round(sum(report.duration for report in item.stash[_REPORTS]), 2)
    done = {"test": item.nodeid, "outcome": outcome, "message": message, "seconds": seconds}
    _append(_attempts.folder / "done.jsonl", done)
    _attempts.enter()
    if outcome == "failed" and device_lost():
        _leave()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _REPORTS in item.stash:
        item.stash[_REPORTS].append(report)
    return report


_REPORTS = pytest.StashKey[list]()


def _summed(reports):
    """-> outcome of a test, and what it says where it did not pass."""
    for outcome in ("failed", "skipped"):
        for report in reports:
            if report.outcome == outcome:
                return outcome, _message(report)
    return "passed", None


def _message(report):
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    line = next((line for line in text.strip().splitlines() if line.strip()), "")
    return line.removeprefix("AssertionError: ").removeprefix("Failed: ")[:500]


def _keep(config, items, kept):
    left = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
    items[:] = kept


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _short(name):
    """A name of any length in few characters, the same in this process and in the files, where the next one looks it up."""
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _LONGEST - len(digest) - 1]} {digest}"


def _padded(what):
    return json.dumps(what).ljust(_WIDTH).encode()


def _leave():
    """Without a finaliser: those of tensors would ask the lost GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)
