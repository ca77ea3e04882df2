"""Benchmarks in processes of their own, and files of results made up for what reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# pytest-benchmark measures nothing within a worker of pytest-xdist, which tests may run in; Triton is not to be interpreted.
KEPT_OUT = ("PYTEST_XDIST", "PYTEST_ADDOPTS", "TRITON_INTERPRET", "LAYALIGN_COMMIT", "MAKEFLAGS", "MAKELEVEL")
LENGTHS = (256, 512, 1024)
BLOCK = """
import sys
from importlib.machinery import PathFinder

class Lean(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Lean
"""


@pytest.fixture(scope="session")
def run_command():
    """run_command(command, *folders) -> the finished command, at the repository's root; folders: to import from."""

    def run(command, *folders):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_OUT)}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)

    return run


@pytest.fixture(scope="session")
def run_bench(run_command):
    """run_bench(*arguments, plugins=(folder, names)) -> the finished `pytest arguments` at the repository's root.

    With bench.conftest among the plugins, a suite of any folder is measured as those of bench/ are.
    """

    def run(*arguments, plugins=(None, ())):
        folder, names = plugins
        loaded = [word for name in names for word in ("-p", name)]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *loaded, *map(str, arguments)]
        return run_command(command, ROOT, *([folder] if folder else []))

    return run


@pytest.fixture
def without(tmp_path):
    """without(packages) -> a folder to import from, beside which they are absent."""

    def make(absent):
        folder = tmp_path / "lean"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(BLOCK.format(absent=tuple(absent)))
        return folder

    return make


@pytest.fixture
def layalign():
    """layalign(*arguments, cwd=) -> the finished command."""

    def run(*arguments, cwd=ROOT):
        command = [sys.executable, "-m", "layalign", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=environment)

    return run


@pytest.fixture
def crafted():
    """crafted(path, kind=, gpu=, ratio=, skip=()): writes results with known figures, `ratio` that of every row of ours."""
    return _write_results


def _write_results(path, kind="cpu-test", gpu=False, ratio=0.8, skip=()):
    rows = [row for row in _rows(ratio) if row["extra_info"]["suite"] not in skip]
    machine = {
        "kind": kind,
        "device": kind.replace("-", " "),
        "cpu": {"brand_raw": "Test processor"},
        "cores": 2,
        "torch_threads": 2,
        "python_version": "3.12.3",
        "versions": {"torch": "2.13.0", "triton": None},
    }
    if gpu:
        machine |= {"gpu_memory_bytes": 2**37, "gpu_driver": "580.1"}
    whole = {
        "machine_info": machine,
        "commit_info": {"id": "a" * 40, "dirty": False},
        "benchmarks": rows,
        "datetime": "2026-11-21T12:00:00+00:00",
        "version": "5.0",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def _rows(ratio):
    for length in LENGTHS:
        sizes = {"B": 8, "H": 32, "S": length, "T": 256}
        case = f"B8 H32 S{length} T256"
        figures = {"teraflops": 350.0, "gigabytes_per_second": 1700.0, "peak_bytes": 2000 * length}
        for name, ours, over, seconds in (("two calls", False, 1.0, 1e-4), ("triton", True, ratio, 1e-4 * ratio)):
            more = figures | {"time_over_yardstick": over, "share_of_floor": 0.5, "floor_seconds": 4e-5}
            yield _row("attention forward", case, name, "two calls", ours, seconds * length / 256, sizes, **more)
    for name, ours, over, peak in (
        ("bare", False, 1.0, 3e9),
        ("layalign", True, ratio, 4e9),
        ("published eager", False, 1.45, 9e9),
    ):
        step = {"time_over_yardstick": over, "peak_bytes": peak}
        yield _row("training step", "B4 text128", name, "bare", ours, 2.0 * over, {"B": 4}, **step)
        new = {"time_over_yardstick": over, "tokens_per_second": 120 / over}
        yield _row("generation", "B4 new64", name, "bare", ours, 2.1 * over, {"B": 4}, **new)


def _row(suite, case, name, yardstick, ours, seconds, sizes, **figures):
    info = {"suite": suite, "case": case, "implementation": name, "ours": ours, "yardstick": yardstick}
    info |= {"dtype": "bfloat16", "sizes": sizes, **figures}
    if "teraflops" in figures:
        info["ceilings"] = {"bytes_per_second": 4.3e12, "flops_per_second": 7.9e14}
    stats = {"median": seconds, "iqr": 0.01 * seconds, "min": seconds, "max": seconds, "rounds": 5, "mean": seconds}
    fullname = f"bench/test_{suite.replace(' ', '_')}.py::test_row[{case}-{name}]"
    return {
        "group": f"{suite}, {case}",
        "name": fullname.split("::")[1],
        "fullname": fullname,
        "stats": stats,
        "extra_info": info,
    }
