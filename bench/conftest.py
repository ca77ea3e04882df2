"""`pytest bench/` runs the benchmarks, which `pytest` alone leaves out; `--small` shows that they run, in seconds."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from bench import attempts
from bench.ceilings import ceilings
from bench.clocks import allocate_as_later
from bench.machine import machine, use
from bench.measuring import CLOCK, LEFT_OUT, Effort
from bench.recording import FAILURES, GONE, describe_machine, keep_rows

NOTES = pytest.StashKey[list[str]]()
SET_UP = "the set-up"  # as an attempt: what ends the process before any implementation is named


def pytest_addoption(parser):
    parser.addoption("--small", action="store_true", help="tiny sizes: whether benchmarks run, not what they reach")
    parser.addoption("--full", action="store_true", help="also sweeps and the largest models, for a GPU")
    parser.addoption("--cpu-time", action="store_true", help="processor instead of wall-clock seconds: busy machines")
    parser.addoption(
        "--leave-out", action="append", default=[], metavar="NAME", help="an implementation not to measure; repeatable"
    )
    parser.addoption("--compile-only", action="store_true", help="of launch candidates: launch each once, time none")
    parser.addoption(
        "--record", metavar="FOLDER", help="keep each row there as soon as it is measured, beside those of earlier runs"
    )


def pytest_configure(config):
    config.option.benchmark_skip = False
    allocate_as_later()
    config.stash[NOTES] = []
    if names := config.getoption("leave_out"):
        use(dataclasses.replace(machine(), left_out=frozenset(names)))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(describe_machine())


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """A run that is cut short keeps the rows it has measured."""
    if (folder := item.config.getoption("record")) is not None:
        keep_rows(item.config, Path(folder))


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark keeps in its JSON file but not in its tables."""
    for note in config.stash[NOTES]:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def device():
    return torch.device(machine().device)


@pytest.fixture
def small(request):
    return request.config.getoption("small")


@pytest.fixture
def effort(request, small, device):
    option = request.config.getoption
    clock = time.process_time if option("cpu_time") else time.perf_counter
    if small:
        return Effort(rounds=1, seconds=0.0, clock=clock)
    # On a GPU 0.02 s are hundreds of rounds of a kernel, and rounds of whole models take seconds.
    seconds = 0.02 if device.type == "cuda" else float(option("benchmark_max_time"))
    return Effort(rounds=option("benchmark_min_rounds"), seconds=seconds, clock=clock)


@pytest.fixture
def row(request, benchmark, device, effort):
    """row(table, name, measurements, ours=, ...): one row of a Table, and what it says beside seconds. -> its Measurement

    name: the implementation's. ours: whether it is this library's. Further figures are kept as they are given.
    """

    def enter(table, name, measurements, *, ours, **figures):
        benchmark.group = f"{table.suite}, {table.case}"
        mine = measurements[name]
        about = {"suite": table.suite, "case": table.case, "implementation": name, "ours": ours}
        about |= {"yardstick": table.yardstick, "dtype": str(table.dtype).removeprefix("torch.")}
        about["sizes"] = dict(table.sizes)
        if mine.error is not None:
            request.config.stash.setdefault(FAILURES, {})[request.node.nodeid] = about | {"error": mine.error}
        if mine.missing is not None and not mine.missing.endswith(LEFT_OUT):
            request.config.stash.setdefault(GONE, set()).add(request.node.nodeid)
        CLOCK.enter(benchmark, mine)
        if measurements[table.yardstick].seconds:
            figures["time_over_yardstick"] = mine.ratio_to(measurements[table.yardstick])
        if table.flops or table.moved:
            reached = ceilings(device, table.dtype, effort.clock)
            about["ceilings"] = vars(reached)
            floor = reached.floor(table.flops, table.moved)
            figures |= {"floor_seconds": floor, "share_of_floor": floor / mine.median()}
        if table.flops:
            figures["teraflops"] = table.flops / mine.median() / 1e12
        if table.moved:
            figures["gigabytes_per_second"] = table.moved / mine.median() / 1e9
        for kind in ("saved_bytes", "peak_bytes"):
            if (value := getattr(mine, kind)) is not None:
                figures[kind] = value
        benchmark.extra_info.update(about | figures)
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        request.config.stash[NOTES].append(f"{table.suite}, {table.case}, {name}: {', '.join(shown)}")
        return mine

    return enter


@pytest.fixture(scope="session")
def measured_once():
    """measured_once(measure, *arguments): the measurements of a case, which all rows of its table share, as they do its failure."""
    done = {}

    def measured(measure, *arguments):
        key = (measure, *arguments)
        if key not in done:
            try:
                with attempts.case(_named(measure, arguments)):
                    if (reason := attempts.why_not(SET_UP)) is not None:
                        raise RuntimeError(reason)
                    with attempts.trying(SET_UP):
                        done[key] = measure(*arguments)
            except Exception as error:  # kept as words: the exception holds every tensor of the case
                done[key] = f"no row of this table: {attempts.in_a_line(error)}"
                raise
        if isinstance(done[key], str):
            pytest.fail(done[key], pytrace=False)
        return done[key]

    return measured


def _named(measure, arguments):
    """The case of a measurement in words that are the same in every process."""
    told = [getattr(one, "__name__", str(one)) for one in arguments if not isinstance(one, Effort)]
    return " ".join([measure.__name__, *told])
