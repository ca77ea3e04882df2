"""What is slower than recorded is refused, and what is wrong gets no figure to be compared."""

import json
import shlex
import sys
from textwrap import indent

import pytest

from bench.report.check import compare, recorded_for
from bench.report.results import read_results

# Breaks or slows this library's own attention on a CPU; the peers call PyTorch's.
WRONG = """
import layalign.kernels.adaptive_fusion_attention as operator
right = operator._BACKENDS["torch"]
operator._BACKENDS["torch"] = lambda *inputs, **options: 1.01 * right(*inputs, **options)
"""
SLOWED = """
import time
import layalign.kernels.adaptive_fusion_attention as operator
fast = operator._BACKENDS["torch"]
def slow(*inputs, **options):
    time.sleep(1)
    return fast(*inputs, **options)
operator._BACKENDS["torch"] = slow
"""
SUITE = ("bench/test_attention.py", "--small", "-k", "test_forward and cpu_gqa and not backward")
# One round of the small sizes takes some 0.1 ms and may be interrupted: 0.1 to 5 ms were seen on a busy machine.
GENEROUS = ("--tolerance", 200)


def attention_rows(path):
    rows = json.loads(path.read_text())["benchmarks"]
    return {row["extra_info"]["implementation"] for row in rows if row["extra_info"]["suite"] == "attention forward"}


@pytest.fixture(scope="module")
def measured(run_bench, tmp_path_factory):
    """A folder of results with the rows of SUITE."""
    folder = tmp_path_factory.mktemp("measured")
    done = run_bench(*SUITE, "--record", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_a_wrong_kernel_is_refused(run_bench, tmp_path):
    (tmp_path / "wrong_kernel.py").write_text(WRONG)
    done = run_bench(*SUITE, "--record", tmp_path, plugins=(tmp_path, ["wrong_kernel"]))
    assert done.returncode == 1 and "torch is wrong: relative error" in done.stdout, done.stdout + done.stderr
    (recorded,) = tmp_path.glob("*/benchmarks.json")
    assert "two calls" in attention_rows(recorded) and "torch" not in attention_rows(recorded)


@pytest.mark.slow
def test_a_slowed_kernel_is_refused(run_bench, layalign, measured, tmp_path):
    (recorded,) = measured.glob("*/benchmarks.json")
    assert "torch" in attention_rows(recorded)
    (tmp_path / "slowed_kernel.py").write_text(SLOWED)
    slowed, failing = tmp_path / "slowed.json", tmp_path / "slower.txt"
    done = run_bench(*SUITE, f"--benchmark-json={slowed}", plugins=(tmp_path, ["slowed_kernel"]))
    assert done.returncode == 0, done.stdout + done.stderr
    check = ("bench", "check", slowed, "--against", measured, *GENEROUS, "--failing", failing)
    refused = layalign(*check)
    assert refused.returncode == 1 and "slower" in refused.stdout, refused.stdout + refused.stderr
    assert failing.read_text() == "bench/test_attention.py::test_forward[cpu_gqa-torch]\n"
    done = run_bench(f"@{failing}", "--small", f"--benchmark-json={slowed}")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = layalign(*check)
    assert passed.returncode == 0 and "attention forward" in passed.stdout, passed.stdout + passed.stderr
    assert failing.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["once", "always"])
def test_make_bench_check(run_command, measured, tmp_path, slow):
    """A slower row is measured a second time before it fails."""
    once = "from pathlib import Path\nmarker = Path(__file__).with_suffix('.ran')\n"
    once += "if not marker.exists():\n    marker.touch()\n" + indent(SLOWED, "    ")
    (tmp_path / "slowness.py").write_text(once if slow == "once" else SLOWED)
    suite, *options = SUITE
    given = {
        "SYSTEM": "1",
        "PYTHON": sys.executable,
        "RESULTS": measured,
        "NOW": tmp_path / "now",
        "SUITES": suite,
        "BENCH": f"-p no:cacheprovider -p slowness {shlex.join(options)}",
        "TOLERANCE": GENEROUS[1],
    }
    command = ["make", "-s", "bench-check", *(f"{name}={value}" for name, value in given.items())]
    done = run_command(command, tmp_path)
    assert (done.returncode == 0) == (slow != "always"), done.stdout + done.stderr
    assert "measuring the slower rows again" in done.stdout, done.stdout + done.stderr


def test_the_tolerance(crafted, layalign, tmp_path):
    crafted(tmp_path / "recorded" / "cpu-test" / "benchmarks.json", ratio=0.8)
    for ratio, tolerance, status in ((0.87, 0.1, 0), (0.89, 0.1, 1), (0.89, 0.12, 0), (0.5, 0.0, 0)):
        now = crafted(tmp_path / "now.json", ratio=ratio)
        done = layalign("bench", "check", now, "--against", tmp_path / "recorded", "--tolerance", tolerance)
        assert done.returncode == status, done.stdout + done.stderr
        assert "| training step, B4 text128, layalign | 0.800 |" in done.stdout
        assert "published eager" not in done.stdout, "no row of ours"


@pytest.mark.parametrize("gpu", [False, True])
def test_what_python_takes_around_a_short_call_is_no_slowness(crafted, tmp_path, gpu):
    """The crafted attention rows take 0.1 to 0.4 ms: half as much again is within 50 us of the shortest alone."""
    recorded, now = (
        read_results(crafted(tmp_path / f"{n}.json", gpu=gpu, ratio=r)) for n, r in (("a", 0.8), ("b", 1.2))
    )
    slower = {one.case for one in compare(now, recorded)[0] if one.is_slower(0.1)}
    shortest = "B8 H32 S256 T256"
    assert (shortest in slower) == gpu and {"B8 H32 S512 T256", "B4 text128", "B4 new64"} <= slower


def test_rows_of_one_side_are_named(crafted, tmp_path):
    whole = read_results(crafted(tmp_path / "whole.json"))
    part = read_results(crafted(tmp_path / "part.json", skip=("generation",)))
    comparisons, only_recorded, only_now = compare(part, whole)
    assert only_recorded == ["generation, B4 new64, layalign"] and only_now == []
    assert {one.suite for one in comparisons} == {"attention forward", "training step"}
    assert compare(whole, part)[1:] == ([], only_recorded)
    nothing = read_results(crafted(tmp_path / "nothing.json", skip=("attention forward", "training step")))
    with pytest.raises(ValueError, match="share no row"):
        compare(nothing, part)


def test_a_kind_without_results_names_those_that_have(crafted, layalign, tmp_path):
    crafted(tmp_path / "nvidia-test" / "benchmarks.json", kind="nvidia-test", gpu=True)
    with pytest.raises(ValueError, match="no results of cpu-test; it has nvidia-test"):
        recorded_for("cpu-test", tmp_path)
    done = layalign("bench", "check", crafted(tmp_path / "now.json"), "--against", tmp_path)
    assert done.returncode == 2 and "it has nvidia-test" in done.stderr and "Traceback" not in done.stderr
