"""`pytest bench/` at tiny sizes, and that only what is right gets a figure."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measuring():
    spec = importlib.util.spec_from_file_location("measuring", ROOT / "bench" / "measuring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run(tmp_path):
    output = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/",
        "--small",
        f"--benchmark-json={output}",
        "-p",
        "no:cacheprovider",
    ]
    # pytest-benchmark measures nothing within a worker of pytest-xdist, which this test may run in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(output.read_text(encoding="utf-8"))["benchmarks"]}
    for case in ("cpu_gqa", "cpu_mha"):
        published, ours = (rows[f"test_training[{case}-{name}]"] for name in ("published", "torch"))
        assert published["group"] == ours["group"] and ours["stats"]["median"] > 0
        assert published["extra_info"]["time_over_published"] == 1 and ours["extra_info"]["time_over_published"] > 0
        assert published["extra_info"]["saved_bytes"] > 0 and ours["extra_info"]["saved_bytes"] == 0
    if not torch.cuda.is_available():
        assert "Triton needs a CUDA device" in done.stdout and "needs a CUDA device" in done.stdout


def test_what_is_wrong_gets_no_figure(measuring):
    exact = torch.arange(1.0, 9.0, dtype=torch.float64)

    def work(error):
        return [exact.float() + error * torch.tensor([0.0] * 7 + [1.0])]

    errors = {"plain": 1e-6, "right": 1.5e-6, "wrong": 1e-4, "nothing": torch.nan}
    works = {name: partial(work, error) for name, error in errors.items()} | {"copy": lambda: None}
    clock = iter(range(1000)).__next__
    found = measuring.measure(works, lambda: [exact], "plain", torch.device("cpu"), 3, 0.0, clock)
    timed = {name for name, measurement in found.items() if measurement.error is None}
    assert timed == {"plain", "right", "copy"}
    assert all(found[name].seconds == ([1] * 3 if name in timed else []) for name in works)
    assert "wrong is wrong: relative error" in found["wrong"].error


def test_ratios_are_those_of_rounds(measuring):
    """A machine that is slow in one round is slow for all."""
    ours, theirs = measuring.Measurement([1, 10, 2]), measuring.Measurement([2, 20, 4])
    assert ours.ratio_to(theirs) == 0.5 and ours.median() == 2


def test_saved_bytes_are_allocations_that_were_not_given(measuring):
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4)

    def function():
        y = (x @ weight).exp()  # keeps the weight, which was given, and y
        return y[:2] * y[:2]  # keeps a view of y twice

    assert measuring.saved_bytes(function, [x, weight]) == 8 * 4 * 4
