"""Implementations of one operation measured side by side: first whether each is right, then rounds of all in turn.

The speed of a machine drifts, so a ratio is the median of the ratios within rounds. pytest-benchmark's tables get the
rounds by `Replay`: on its own it measures one implementation after the other.
"""

import statistics
from dataclasses import dataclass, field
from functools import partial

import torch


@dataclass
class Measurement:
    """What one implementation reached: the seconds of each round, or why there are none; bytes kept for the backward
    pass beside what was given; the most memory that a call took (on a GPU)."""

    seconds: list = field(default_factory=list)
    error: str | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    def median(self):
        return statistics.median(self.seconds)

    def ratio_to(self, other):
        """Median over the rounds of this one's time over the other's."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


class Replay:
    """A timer for pytest-benchmark (`@pytest.mark.benchmark(timer=)`) whose time passes by measured seconds only."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def enter(self, benchmark, measurement):
        """The measured rounds into the table; without any, fail with the reason."""
        assert measurement.error is None, measurement.error
        seconds = iter(measurement.seconds)
        benchmark.pedantic(self._pass, setup=lambda: ((next(seconds),), {}), rounds=len(measurement.seconds))

    def _pass(self, seconds):
        self.now += seconds


def measure(works, exact, like, device, min_rounds, min_seconds, clock):
    """-> {name: Measurement}. Each is timed in so many rounds, and for so many seconds on average, at least; by `clock`
    on a CPU, by events on a GPU.

    works: {name: function without arguments} -> list of tensors, or None where there is nothing to check.
    exact: function -> these tensors in fp64. like: name of the work whose error measures the others: right is what
    errs at most twice as much, plus two roundings, relative to the largest value of each result.
    """
    measurements = {name: Measurement() for name in works}
    errors = _relative_errors(works, exact())
    for name, (error, rounding) in errors.items():
        allowed = 2 * errors[like][0] + 2 * rounding
        if not error <= allowed:
            measurements[name].error = f"{name} is wrong: relative error {error:.2e}, allowed {allowed:.2e}"
    right = [name for name in works if measurements[name].error is None]
    seconds_of = _DeviceClock(device) if device.type == "cuda" else partial(_host_seconds, clock)
    for name in right:
        measurements[name].peak_bytes = _peak_bytes(works[name], device)
    rounds, spent = 0, 0.0
    while rounds < min_rounds or spent < min_seconds * len(right):
        turn = rounds % len(right)
        for name in right[turn:] + right[:turn]:
            measurements[name].seconds.append(seconds_of(works[name]))
            spent += measurements[name].seconds[-1]
        rounds += 1
    return measurements


def saved_bytes(function, given):
    """What `function` keeps for the backward pass, in whole allocations, beside the memory of the tensors `given`."""
    known = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function()  # alive while counted: no address is used twice
    del results
    return sum(kept.values())


def _relative_errors(works, exact):
    """{name: (largest relative error, rounding of the dtype)}; a NaN anywhere makes the error NaN."""
    errors = {}
    for name, work in works.items():
        results = work()
        if results is None:
            continue
        each = [_relative_error(got, want) for got, want in zip(results, exact, strict=True)]
        errors[name] = (torch.tensor(each).max().item(), torch.finfo(results[0].dtype).eps)
    return errors


def _relative_error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _host_seconds(clock, work):
    start = clock()
    work()
    return clock() - start


class _DeviceClock:
    """Seconds between two events around the work, which finds none of its data in the L2 cache."""

    def __init__(self, device):
        # More than the cache holds: filling 512 MB keeps the GPU busy for over 0.1 ms, in which the host runs ahead.
        size = max(2**29, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, work):
        self.flushed.zero_()
        self.events[0].record()
        work()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


def _peak_bytes(work, device):
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
