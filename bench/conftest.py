"""`pytest bench/` runs the benchmarks, which `pytest` alone leaves out; `--small` shows that they run, in seconds."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode puts no test folder on the path

NOTES = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--small", action="store_true", help="tiny sizes: whether benchmarks run, not what they reach")
    parser.addoption("--cpu-time", action="store_true", help="processor instead of wall-clock seconds: busy machines")


def pytest_configure(config):
    config.option.benchmark_skip = False
    config.stash[NOTES] = []


def pytest_terminal_summary(terminalreporter, config):
    """What pytest-benchmark keeps in its JSON file but not in its tables."""
    for note in config.stash[NOTES]:
        terminalreporter.write_line(note)


@pytest.fixture
def small(request):
    return request.config.getoption("small")


@pytest.fixture
def effort(request, small):
    """The last arguments of `measure`: so many rounds and seconds at least, and a CPU's clock."""
    option = request.config.getoption
    least = (1, 0.0) if small else (option("benchmark_min_rounds"), float(option("benchmark_max_time")))
    return *least, time.process_time if option("cpu_time") else time.perf_counter


@pytest.fixture
def note(request, benchmark):
    """note(**figures): kept with this row, and shown below the tables."""

    def keep(**figures):
        benchmark.extra_info.update(figures)
        shown = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        ]
        request.config.stash[NOTES].append(f"{request.node.name}: {', '.join(shown)}")

    return keep


@pytest.fixture(scope="session")
def measured_once():
    """measured_once(measure, *arguments): the measurements of a case, which all rows of its table share."""
    done = {}

    def measured(measure, *arguments):
        key = (measure, *arguments)
        if key not in done:
            done[key] = measure(*arguments)
        return done[key]

    return measured
