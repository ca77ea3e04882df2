"""From measured rows to a file, and from files to tables, plots and the README."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.recording import gpu_figures
from bench.report.report import report
from bench.report.results import read_results
from bench.report.tables import described

ROOT = Path(__file__).parents[2]
MARKED = "# Title ü\n<!-- bench:begin -->\noutdated\n<!-- bench:end -->\nafter\n"
# The third row is of a process that is killed, or of an implementation that became wrong.
TOY = """
import os, signal
import pytest
import torch
from bench.measuring import CLOCK, LEFT_OUT, Missing, Table, measure

def double(x):
    return [x + x]

def wrong(x):
    return [x + 2.1 * x]

def measure_doubling(effort):
    x = torch.arange(1.0, 9.0)
    works = {"plain": lambda: double(x), "ours": lambda: double(x)}
    works["late"] = (lambda: wrong(x)) if os.environ.get("TOY") == "wrong" else lambda: double(x)
    missing = {"missing": "late is not installed", "left out": f"late {LEFT_OUT}"}.get(os.environ.get("TOY"))
    works |= {"late": Missing(missing)} if missing else {}
    return measure(works, lambda: [2 * x.double()], "plain", torch.device("cpu"), effort)

@pytest.mark.parametrize("name", ["plain", "ours", "late"])
@pytest.mark.benchmark(timer=CLOCK)
def test_doubling(measured_once, effort, row, name):
    if name == "late" and os.environ.get("TOY") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    table = Table(suite="toy", case="8 numbers", yardstick="plain", dtype=torch.float32, sizes={"S": 8})
    row(table, name, measured_once(measure_doubling, effort), ours=name != "plain")
"""


@pytest.fixture
def toy(run_bench, tmp_path, monkeypatch):
    """toy(state, *arguments) -> finished run of the toy suite that records into tmp_path / "results"."""
    (tmp_path / "test_toy.py").write_text(TOY)

    def run(state, *arguments):
        monkeypatch.setenv("TOY", state)
        record = ("--record", tmp_path / "results", "--benchmark-max-time=0.01")
        return run_bench(
            tmp_path / "test_toy.py", f"--rootdir={tmp_path}", *record, *arguments, plugins=(None, ["bench.conftest"])
        )

    return run


def recorded(folder):
    (path,) = (folder / "results").glob("*/benchmarks.json")
    return path, {row["extra_info"]["implementation"]: row for row in json.loads(path.read_text())["benchmarks"]}


@pytest.mark.slow
def test_a_cut_run_keeps_its_rows_and_later_ones_join(toy, tmp_path):
    done = toy("killed")
    assert done.returncode == -9, done.stdout + done.stderr
    path, rows = recorded(tmp_path)
    assert list(rows) == ["plain", "ours"]
    done = toy("", "-k", "late")
    assert done.returncode == 0, done.stdout + done.stderr
    _, joined = recorded(tmp_path)
    assert list(joined) == ["plain", "ours", "late"]
    assert joined["ours"] == rows["ours"], "not measured again"
    stats, info = joined["late"]["stats"], joined["late"]["extra_info"]
    assert {"median", "iqr", "min", "max", "rounds"} <= set(stats) and "data" not in stats
    assert info["datetime"] > rows["ours"]["extra_info"]["datetime"] and info["versions"]["torch"] and info["commit"]
    assert [line.implementation for line in read_results(path).rows] == list(joined)

    before = path.read_bytes()
    done = toy("", "--small")
    assert done.returncode == 4 and "do not mix" in done.stdout + done.stderr
    assert path.read_bytes() == before

    done = toy("wrong")
    assert done.returncode == 1 and "late is wrong" in done.stdout
    assert list(recorded(tmp_path)[1]) == ["plain", "ours"], "an old figure stands for no wrong implementation"


@pytest.mark.slow
def test_rows_of_another_machine_do_not_stand_beside_new_ones(toy, tmp_path):
    """Of an implementation that is gone, and of another processor with as many cores."""
    toy("")
    path, rows = recorded(tmp_path)
    assert toy("left out").returncode == 0 and list(recorded(tmp_path)[1]) == list(rows), "another run has it"
    assert toy("missing").returncode == 0 and list(recorded(tmp_path)[1]) == ["plain", "ours"]
    content = json.loads(path.read_text())
    content["machine_info"]["cpu"]["brand_raw"] = "Another processor"
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    done = toy("")
    assert done.returncode == 4 and "rows of the processor Another processor, and this is" in done.stdout + done.stderr
    assert path.read_bytes() == before


def test_all_versions_of_rows_are_told(crafted, tmp_path):
    path = crafted(tmp_path / "benchmarks.json")
    content = json.loads(path.read_text())
    content["benchmarks"][0]["extra_info"]["versions"] = {"torch": "2.11.0", "triton": "3.6.0"}
    path.write_text(json.dumps(content))
    assert "2 threads; torch 2.11.0, 2.13.0; triton 3.6.0; Python" in described(read_results(path))


def test_the_clocks_are_those_of_the_gpu_that_is_measured(tmp_path, monkeypatch):
    """Of two, the second alone is visible: nvidia-smi counts both."""
    asked = tmp_path / "asked"
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\necho "$1" > {asked}\necho "580.1, 1980, 1980, 2619, 700"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="2b9c-11"))
    assert gpu_figures()["gpu_clock_mhz"] == "1980" and asked.read_text() == "--id=GPU-2b9c-11\n"


@pytest.mark.slow
def test_a_file_that_is_no_record_is_left_alone(toy, tmp_path):
    toy("", "-k", "plain")
    path, _ = recorded(tmp_path)
    for content in ('{"benchmarks": [{"name"', '{"benchmarks": [{}]}'):
        path.write_text(content)
        done = toy("", "-k", "plain")
        assert done.returncode == 4 and str(path) in done.stdout + done.stderr
        assert path.read_text() == content


@pytest.mark.slow
def test_pytest_benchmark_reads_the_file(toy, run_bench, tmp_path):
    toy("")
    path, _ = recorded(tmp_path)
    done = toy("", f"--benchmark-compare={path}", "--benchmark-compare-fail=median:100000%")
    assert done.returncode == 0 and "Comparing against benchmarks from" in done.stdout + done.stderr, done.stdout


def test_report(crafted, layalign, tmp_path):
    """Two machines: every figure in its table, plots, and a README that says what no GPU has run."""
    results, readme = tmp_path / "bench" / "results", tmp_path / "README.md"
    crafted(results / "cpu-test" / "benchmarks.json", ratio=1.1)
    crafted(results / "nvidia-test" / "benchmarks.json", kind="nvidia-test", gpu=True, skip=("generation",))
    readme.write_text(MARKED, encoding="utf-8")
    done = layalign("bench", "report", "--readme", readme, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = (results / "nvidia-test" / "results.md").read_text()
    assert "## attention forward\n\n### B8 H32 S256 T256" in tables
    assert "| **triton** | 80.0 us | 1.0% | 5 | 0.80 | 350 | 1,700 | 50% | 512 kB |" in tables
    assert "driver 580.1; torch 2.13.0" in tables and "2026-11-21, commit aaaaaaaaaaaa" in tables
    for kind, plots in (
        ("cpu-test", {"speedup", "roofline", "memory", "tokens"}),
        ("nvidia-test", {"speedup", "roofline", "memory"}),
    ):
        written = {path.stem: path.read_bytes() for path in (results / kind).glob("*.png")}
        assert set(written) == plots
        assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in written.values())
    text = readme.read_text(encoding="utf-8")
    assert (
        text.startswith("# Title ü\n<!-- bench:begin -->")
        and text.endswith("<!-- bench:end -->\nafter\n")
        and "outdated" not in text
    )
    assert text.index("### On nvidia test") < text.index("### On cpu test")
    assert (
        "| B4 text128 | 2.00 s | 1.10 x | 1.45 x |" in text and "| B4 text128 | 3.00 GB | 4.00 GB | 9.00 GB |" in text
    )
    assert "**No GPU figures yet:** generation, prefill, attention forward and backward, decode" in text
    layalign("bench", "report", "--readme", readme, cwd=tmp_path)
    assert readme.read_text(encoding="utf-8") == text, "writing it again changes nothing"


def test_bad_files_are_named(crafted, layalign, tmp_path):
    good, broken, foreign = (tmp_path / f"{name}.json" for name in ("good", "broken", "foreign"))
    crafted(good)
    broken.write_text("{")
    foreign.write_text(
        '{"benchmarks": [{"fullname": "x", "stats": {"median": 1}, "extra_info": {}}], "machine_info": {}}'
    )
    for path, message in (
        (broken, "cannot be read"),
        (foreign, "not results of"),
        (tmp_path / "absent.json", "no such file"),
    ):
        done = layalign("bench", "report", good, path, "--output", tmp_path / "out")
        assert done.returncode == 2 and str(path) in done.stderr and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="one file a kind"):
        report([good, good], tmp_path / "out")
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="bench:begin"):
        report([good], tmp_path / "out", tmp_path / "README.md")
    done = layalign("bench", "report", cwd=tmp_path)
    assert done.returncode == 2 and "there is none" in done.stderr


def test_a_wheel_says_where_the_benchmarks_are(tmp_path):
    """There the package stands alone; in a checkout the command is `python -m bench`."""
    shutil.copytree(
        ROOT / "layalign", tmp_path / "layalign", ignore=shutil.ignore_patterns("bases", "kernels", "train")
    )
    for words, status in (("report",), 2), (("check", "x.json"), 2), ((), 2), (("--help",), 0):
        command = [sys.executable, "-m", "layalign", "bench", *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
        assert done.returncode == status, done.stderr
        assert "`pytest bench/`" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("layalign", "bench"), ("bench",)])
def test_commands(run_command, command):
    for words in (("--help",), ("report", "--help"), ("check", "--help")):
        done = run_command([sys.executable, "-m", *command, *words], ROOT)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_make_targets():
    """Without an installation of our own, and each part alone."""
    for target, expected in {
        "bench": "pytest bench/ --full --record somewhere",
        "bench-check": "-m bench check --against somewhere --tolerance 0.10 runs/bench/now.json",
        "gpu": "-m bench.first_light --results somewhere --from A --to C --a-seconds 540",
    }.items():
        # Without the variables of the make that may be running this test.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "-n", target, "SYSTEM=1", "BENCH=--full", "RESULTS=somewhere"]
        plan = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
        assert expected in plan and "pip install" not in plan
