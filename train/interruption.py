"""SIGTERM and Ctrl-C: during a step remembered, after it obeyed, by every process of a run at the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# The second Ctrl-C stops at once. torchrun hands the first one on to processes that had it already: that is no second one.
_SECOND_AFTER = 1.0
_ONCE = "the same command goes on from the last checkpoint, if there is one"


class Agreed:
    """What all processes have agreed to do now: the number of a signal to obey (0: none), and whether to save."""

    def __init__(self, signal_number: int = 0, save: bool = False):
        self.signal_number, self.save = signal_number, save or bool(signal_number)


class Interruption:
    """Turns signals into decisions of all processes.

    Until `installed`, signals do what they always did, and nothing is ever to be obeyed.

    Attributes:
        caught: number of the signal that this process has been sent; 0: none.
        deferring: whether a signal is only remembered, because what would be lost can be saved soon.
    """

    def __init__(self) -> None:
        self.caught, self.deferring = 0, False
        self._caught_at = 0.0
        self._group: Any = None

    @contextmanager
    def installed(self) -> Iterator[Interruption]:
        """Handle SIGTERM and SIGINT in this block. In another thread than the main one, Python cannot: nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in _NAMES}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # None: a handler that was not set from Python, and cannot be set back from it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember a signal in this block: what would be lost can be saved soon."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def agree(self, save: bool = False) -> Agreed:
        """Decide together with the other processes; all of them call this at the same places.

        Args:
            save: whether this process wants a checkpoint.

        Returns:
            what any of them has been told or wants.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return Agreed(self.caught, save)
        if self._group is None:
            # A host's word to hosts: on gloo, no process waits for its GPU.
            gloo = dist.get_backend() == "gloo" or not dist.is_gloo_available()
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo")
        wishes = torch.tensor([self.caught, int(save)])
        if dist.get_backend(self._group) != "gloo":
            wishes = wishes.to(torch.accelerator.current_accelerator())
        dist.all_reduce(wishes, dist.ReduceOp.MAX, self._group)
        signal_number, wanted = wishes.tolist()
        return Agreed(signal_number, bool(wanted))

    def leave(self, signal_number: int, what_stands: str) -> NoReturn:
        """End the process as shells expect of one that a signal ended: with 128 + its number.

        Args:
            signal_number: the signal.
            what_stands: for the user; the first process says it.

        Raises:
            SystemExit: always.
        """
        if what_stands and os.environ.get("RANK", "0") == "0":
            tqdm.write(f"layalign: stopped by {_NAMES[signal.Signals(signal_number)]}; {what_stands}", file=sys.stderr)
        raise SystemExit(128 + signal_number)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.caught = bool(self.caught), number
        if self.deferring and not again:
            self._caught_at = time.monotonic()
        elif not self.deferring or (number == signal.SIGINT and time.monotonic() - self._caught_at > _SECOND_AFTER):
            self.leave(number, _ONCE)
