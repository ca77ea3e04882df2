"""One damaged folder tried: what a command made of it, in a process of its own, and what that is called."""

import faulthandler
import hashlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 60
GOOD = ("identical", "refused")


class Target(NamedTuple):
    """A kind of folder.

    name: of the kind.
    pristine: the whole one.
    run: does the user's work with a folder like it, by the command line's arguments or otherwise.
    result: what of that counts, as bytes.
    loose: files that may change when the work is refused (locks, logs).
    """

    name: str
    pristine: Path
    run: Callable[[Path], None]
    result: Callable[[Path], bytes]
    loose: tuple[str, ...] = ()

    def files(self) -> list[str]:
        """Every file, as a path below the folder."""
        return sorted(path.relative_to(self.pristine).as_posix() for path in self.pristine.rglob("*") if path.is_file())


class Outcome(NamedTuple):
    """word: identical or refused; or unnoticed, traceback, unnamed, changed, waiting. said: the last line on standard error."""

    word: str
    said: str


def command(*arguments: str) -> None:
    """A command line, in this process."""
    from layalign import cli

    sys.argv = ["layalign", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


def as_command(work: Callable[[], None]) -> None:
    """Work that no command does in little, ended as commands end."""
    from layalign import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "app", work)
        cli.main()


def outcome(target: Target, folder: Path, damaged: str, expected: bytes) -> Outcome:
    """Run the target's work on a damaged folder in a fork, and judge how it ended."""
    before = snapshot(folder, target.loose)
    status, text = forked(lambda: target.run(folder))
    last = _message(text)
    if status is None:
        return Outcome("waiting", last)
    if status == 0:
        return Outcome("identical" if _result(target, folder) == expected else "unnoticed", last)
    if status != 2 or "Traceback" in text or not last.startswith("layalign: "):
        return Outcome("traceback", last)
    if Path(damaged).name not in last and Path(damaged).parent.name not in last.replace(str(folder), ""):
        return Outcome("unnamed", last)
    if snapshot(folder, target.loose) != before:
        return Outcome("changed", last)
    return Outcome("refused", last)


def _message(text: str) -> str:
    """The last line on standard error, with settings that differ from a run's, which stand indented below it."""
    lines = [line for line in text.splitlines() if line.strip()]
    begins = next((place for place in reversed(range(len(lines))) if not lines[place].startswith("  ")), 0)
    return " ".join(lines[begins:])


def snapshot(folder: Path, loose: tuple[str, ...] = ()) -> dict[str, str]:
    """Kind and content of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): _kind(path) for path in sorted(folder.rglob("*")) if path.name not in loose
    }


def _kind(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_dir():
        return "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "pipe"


def _result(target: Target, folder: Path) -> bytes:
    def too_long(number, frame):
        raise TimeoutError("a pipe is left where a result should be")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    try:
        return target.result(folder)
    except (OSError, ValueError) as error:
        return repr(error).encode()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def forked(work: Callable[[], None]) -> tuple[int | None, str]:
    """Exit status of the work in a child, None where it had to be stopped, and what it wrote to both outputs: to a pipe, which no
    limit of a file's size meets."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            faulthandler.dump_traceback_later(SECONDS - 2, file=sys.stderr)  # where it waits
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(write)
    said = b""
    deadline = time.monotonic() + SECONDS
    while select.select([read], [], [], max(0, deadline - time.monotonic()))[0]:
        more = os.read(read, 1 << 16)
        if not more:
            break
        said += more
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), said.decode("utf-8", "replace")
