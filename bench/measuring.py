"""Implementations of one operation measured side by side: first whether each is right, then rounds of all in turn.

The speed of a machine drifts, so a ratio is the median of the ratios within rounds. pytest-benchmark's tables get the
rounds by `Replay`: on its own it measures one implementation after the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attempts
from bench.clocks import seconds_by
from bench.machine import machine
from bench.memory import peak_bytes

BACKENDS = ("torch", "triton")  # this library's
LEFT_OUT = "is left out of this run"  # what a Missing says that another run may have
EXACT = "the exact result"  # as an attempt of its own: it may hang, too
# Relative error above which no work measures others; bf16 through 32 layers and back errs by 0.04. An exact result that is not one
# would else allow whatever is no worse than twice its own fault.
BROKEN = 0.25
Results = Sequence[Tensor]
Work = Callable[[], "Results | None"]


@dataclass(frozen=True)
class Missing:
    """Stands for an implementation that this machine does not have: its row is skipped with the reason."""

    reason: str


@dataclass
class Measurement:
    """What one implementation reached: the seconds of each round, or why there are none; bytes kept for the backward
    pass beside what was given; the most memory that a call took."""

    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    missing: str | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: Measurement) -> float:
        """Median over the rounds of this one's time over the other's."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


class Replay:
    """A timer for pytest-benchmark (`@pytest.mark.benchmark(timer=)`) whose time passes by measured seconds only."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def enter(self, benchmark: Any, measurement: Measurement) -> None:
        """The measured rounds into the table; without any, skip what is missing and fail what is wrong."""
        if measurement.missing is not None:
            pytest.skip(measurement.missing)
        assert measurement.error is None, measurement.error
        seconds = iter(measurement.seconds)
        benchmark.pedantic(self._pass, setup=lambda: ((next(seconds),), {}), rounds=len(measurement.seconds))

    def _pass(self, seconds):
        self.now += seconds


CLOCK = Replay()


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Each implementation is timed in so many rounds, and for so many seconds on average, at least.

    clock: of a CPU (time.perf_counter or time.process_time); a GPU's seconds are those between two events.
    """

    rounds: int
    seconds: float
    clock: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the rows of one table share.

    Attributes:
        suite, case: what is computed, and at which sizes.
        yardstick: name of the row that ratios are to.
        dtype: of the products.
        flops, moved: operations, and bytes, that the work cannot do without; 0 where not told.
        sizes: {"S": 512, ...}.
    """

    suite: str
    case: str
    yardstick: str
    dtype: torch.dtype
    flops: int = 0
    moved: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)


def by_backend(function: Callable, backends: Sequence[str] = BACKENDS) -> dict[str, Any]:
    """{backend: this library's `function` by that backend, or Missing}."""
    found: dict[str, Any] = {name: machine().by_backend(function, name) for name in backends}
    return found if machine().has_triton() else found | {"triton": Missing("triton needs a CUDA device")}


def measure(
    works: Mapping[str, Work | list[Work] | Missing],
    exact: Callable[[], Results],
    like: str,
    device: torch.device,
    effort: Effort,
    *,
    captured: bool = False,
    memory: bool | None = None,
    roundings: int = 2,
) -> dict[str, Measurement]:
    """Check all works, then time those that are right, a round of each in turn.

    Args:
        works: {name: function without arguments, a list of them over different inputs to take in turn, or Missing}; a
            function returns the list of tensors to check, or None where there is nothing to check. Of a list the first is
            checked.
        exact: function that returns these tensors in fp64.
        like: name of the work whose error measures the others: right is what errs at most twice as much, plus so many
            `roundings`, relative to the largest value of each result. Where it fails itself, the best of the others counts;
            where that one errs by more than BROKEN, none is judged.
        device: whose clock and memory count.
        effort: how many rounds, and for how long.
        captured: on a GPU, time the replay of a CUDA graph, which holds no launches from the host: for work of
            microseconds.
        memory: whether to measure the peak of a call; None does on a GPU, where it costs nothing.
        roundings: how many are allowed beside.
    """
    measurements = {name: Measurement() for name in works}
    present: dict[str, list[Work]] = {}
    for name, work in works.items():
        if isinstance(work, Missing):
            measurements[name].missing = work.reason
        elif (reason := attempts.why_not(name)) is not None:
            measurements[name].error = reason
        else:
            present[name] = work if isinstance(work, list) else [work]

    def keep(trials):
        """Of those present the ones whose trial succeeded -> {name: its result}"""
        for name, trial in trials.items():
            if trial.error is not None:
                measurements[name].error, measurements[name].seconds = trial.error, []
                del present[name]
        return {name: trial.result for name, trial in trials.items() if trial.error is None}

    wanted = tried(EXACT, exact, device)
    if wanted.error is not None:
        raise RuntimeError(wanted.error)
    wrong = judged({name: turns[0] for name, turns in present.items()}, wanted.result, like, roundings, device)
    keep({name: Trial(error=wrong.get(name)) for name in present})
    del wanted
    if memory or (memory is None and device.type == "cuda"):
        peaks = {name: tried(name, partial(peak_bytes, turns[0], device), device) for name, turns in present.items()}
        for name, peak in keep(peaks).items():
            measurements[name].peak_bytes = peak
    seconds_of = seconds_by(device, effort.clock)
    if captured and device.type == "cuda":
        captures = {
            name: tried(name, lambda turns=turns: [seconds_of.capture(work) for work in turns], device)
            for name, turns in present.items()
        }
        present.update(keep(captures))
    rounds, spent = 0, 0.0
    while present and (rounds < effort.rounds or spent < effort.seconds * len(present)):
        names = list(present)
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            turns = present[name]
            timed = tried(name, partial(seconds_of, turns[rounds % len(turns)]))
            for seconds in keep({name: timed}).values():
                measurements[name].seconds.append(seconds)
                spent += seconds
        rounds += 1
    return measurements


@dataclass(frozen=True)
class Trial:
    """What a piece of work returned, or in words why it returned nothing."""

    result: Any = None
    error: str | None = None


def tried(name: str, work: Callable[[], Any], device: torch.device | None = None) -> Trial:
    """Run the work of one implementation, whatever comes of it; with a device, until it is done there too.

    Triton's OutOfResources and CompilationError are plain Exceptions, and each peer has errors of its own: all of them cost
    the row of this implementation and no other. Where a GPU answers no longer, see `attempts.end_if_lost`.
    """
    with attempts.trying(name):
        try:
            result = work()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            why = f"fails: {attempts.in_a_line(error)}"
            attempts.end_if_lost(name, why)
            return Trial(error=f"{name} {why}")
    return Trial(result)


def judged(
    works: Mapping[str, Work], exact: Results, like: str, roundings: int, device: torch.device
) -> dict[str, str]:
    """{name: what is wrong with it} of those that are; a NaN anywhere, or no way to run at all, is wrong.

    Arguments as `measure` has them. Where `like` itself does not run, what errs least among the others stands for it.
    """
    found, wrong = {}, {}
    for name, work in works.items():
        trial = tried(name, partial(_error_and_rounding, work, exact), device)
        if trial.error is not None:
            wrong[name] = trial.error
        elif trial.result is not None:
            found[name] = trial.result
    for name, (error, rounding) in found.items():
        others = [found[like][0]] if like in found else [found[other][0] for other in found if other != name]
        if not others:
            wrong[name] = f"{name} cannot be judged: {like}, whose error others are measured by, has none"
            continue
        if not min(others) <= BROKEN:
            whose = like if like in found else "the best of the others"
            wrong[name] = (
                f"{name} cannot be judged: {whose} errs by {min(others):.2e}: it or the exact result is broken"
            )
            continue
        allowed = 2 * min(others) + roundings * rounding
        if not error <= allowed:
            wrong[name] = f"{name} is wrong: relative error {error:.2e}, allowed {allowed:.2e}"
    return wrong


def _error_and_rounding(work, exact):
    """Largest relative error among the results of a work, None where it has none to check, and a rounding of their dtype."""
    results = work()
    if results is None:
        return None
    each = [_relative_error(got, want) for got, want in zip(results, exact, strict=True)]
    return torch.tensor(each).max().item(), torch.finfo(results[0].dtype).eps


def _relative_error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()
