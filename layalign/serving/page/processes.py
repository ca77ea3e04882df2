"""The servers below the page: processes that are started, waited for, looked after and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from layalign.serving.page.asking import LOCAL

# Seconds between looks at a process; between words on one that starts; that it has to end by itself.
LOOK, WORD, GRACE = 0.3, 15.0, 30.0
LOOPBACK = "127.0.0.1"
# Of a log: the lines that are shown of a process that ended, and bytes that hold them.
LINES, BYTES = 15, 20_000


class ServerEnded(RuntimeError):
    """A server's process ended before it was told to; the message holds the last lines of its log."""


class ServerProcess:
    """A server, in a process group of its own: Ctrl-C goes to the page alone, which then ends its servers.

    Args:
        title: what sentences call it.
        command: that starts it.
        log: file for all that it prints.
        url: that it will answer at.
    """

    def __init__(self, title: str, command: Sequence[str], log: Path, url: str):
        self.title, self.log, self.url = title, log, url
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def check(self) -> None:
        """Pass a server that runs.

        Raises:
            ServerEnded: it does not.
        """
        status = self._process.poll()
        if status is not None:
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            lines = "".join(f"\n  {line}" for line in self._last_lines()) or " nothing"
            raise ServerEnded(f"{self.title} ended with {how}; the last lines of {self.log}:{lines}")

    def answers(self) -> bool:
        """Whether it says that it is ready."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5, **LOCAL).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def last_line(self) -> str:
        """Of its log."""
        return next(reversed(self._last_lines()), "")

    def _last_lines(self) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-LINES:]

    def tell(self) -> None:
        """Tell it to end; what it started is its own to tell."""
        self._process.terminate()

    def kill(self) -> None:
        """End it, and what it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None


class Told:
    """How often this process has been told to end, by Ctrl-C, SIGTERM or a closed terminal; a plain number, as a signal may come
    while an event's lock is held.

    Args:
        times: so far.
    """

    def __init__(self) -> None:
        self.times = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count within the block, in place of what these signals do."""

        def told(number: int, frame: object) -> None:
            self.times += 1

        before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def wait_until_ready(
    server: ServerProcess, others: Sequence[ServerProcess], told: Told, say: Callable[[str], None]
) -> None:
    """Wait until a server answers, or this process is told to end.

    Args:
        server: that starts.
        others: that run meanwhile.
        told: whether there is anything to wait for.
        say: takes words on how it goes.

    Raises:
        ServerEnded: one of them ended.
    """
    begun = said = time.monotonic()
    while not told.times:
        watch((server, *others))
        if server.answers():
            say(f"{server.title} is ready after {time.monotonic() - begun:.0f} s")
            return
        if time.monotonic() - said >= WORD:
            said = time.monotonic()
            say(
                f"{server.title} has been starting for {said - begun:.0f} s; it says: {server.last_line()[:160] or 'nothing yet'}"
            )
        time.sleep(LOOK)


def watch(servers: Sequence[ServerProcess]) -> None:
    """Pass servers that all run.

    Raises:
        ServerEnded: one does not.
    """
    for server in servers:
        server.check()


def end_all(servers: Sequence[ServerProcess], told: Told) -> None:
    """End servers: by SIGTERM, and by SIGKILL those that take too long.

    Args:
        servers: that may run.
        told: told once more, this waits no longer.
    """
    before = told.times
    for server in servers:
        server.tell()
    ends = time.monotonic() + GRACE
    while time.monotonic() < ends and told.times == before and not all(server.ended() for server in servers):
        time.sleep(LOOK)
    for server in servers:
        # Also where it has ended: what it started may be left.
        server.kill()


@contextmanager
def running(title: str, command: Sequence[str], log: Path, say: Callable[[str], None] = print) -> Iterator[str]:
    """A server on loopback for the length of the block, which gets its address.

    Args:
        title: what sentences call it.
        command: that starts it, without its host and port.
        log: file for all that it prints.
        say: takes words on how it goes.

    Raises:
        ServerEnded: it ended before it answered.
    """
    port, told = free_port(), Told()
    server = ServerProcess(title, [*command, "--host", LOOPBACK, "--port", str(port)], log, f"http://{LOOPBACK}:{port}")
    try:
        wait_until_ready(server, (), told, say)
        yield server.url
    finally:
        end_all([server], told)


def free_port() -> int:
    """One on loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return free.getsockname()[1]
