"""The results folder: the rows of many runs of one kind of machine in one file, in pytest-benchmark's format.

FOLDER/<kind>/benchmarks.json is what `python -m bench report` and `python -m bench check` read.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import layalign
from bench.machine import machine
from bench.report.results import kind_of, read_file
from layalign.kernels.files import write_text

ROOT = Path(__file__).parents[1]
FAILURES = pytest.StashKey[dict[str, dict]]()  # {name of a test: what the row fixture says of one without a figure}
GONE = pytest.StashKey[set[str]]()  # tests of implementations that this machine lacks
KEPT = pytest.StashKey[tuple[int, ...]]()  # how many rows, failures and lacks the file already has
MACHINE = pytest.StashKey[tuple[dict, dict]]()  # machine and commit, asked once a run
CLOCKS = pytest.StashKey[dict[str, dict]]()  # {group: the GPU's clocks just after its measurement}
PACKAGES = ("torch", "triton", "transformers", "pytest-benchmark")
UNKEPT = ("processor", "release", "python_build", "python_compiler")  # of pytest-benchmark's machine_info
GPU_FIGURES = {
    "gpu_driver": "driver_version",
    "gpu_clock_mhz": "clocks.sm",
    "gpu_clock_most_mhz": "clocks.max.sm",
    "gpu_memory_clock_mhz": "clocks.mem",
    "gpu_power_limit_watts": "power.limit",
}


def describe_machine() -> dict[str, Any]:
    """What pytest-benchmark's machine_info lacks: kind (the name of the results folder), versions, cores, threads, GPU."""
    on_gpu = machine().device == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name() if on_gpu else machine().name or f"cpu {platform.machine()} {cores} cores"
    kind = kind_of(name)
    found = {
        "kind": kind,
        "node": kind,  # in place of the host's name, which says nothing to others
        "device": name,
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES} | {"layalign": layalign.__version__},
    }
    if on_gpu:
        device = torch.cuda.get_device_properties(0)
        found |= {"cuda": torch.version.cuda, "gpu_memory_bytes": device.total_memory}
        found |= {"gpu_multiprocessors": device.multi_processor_count, **gpu_figures()}
    return found


def gpu_figures() -> dict[str, str]:
    """Driver, present clocks and limits of the GPU that is measured; {} where nvidia-smi is absent or does not know it."""
    # By its UUID: nvidia-smi's numbers leave CUDA_VISIBLE_DEVICES out of account.
    which = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["nvidia-smi", which, f"--query-gpu={','.join(GPU_FIGURES.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_FIGURES, (value.strip() for value in answer.split(",")), strict=True))


def keep_rows(config: pytest.Config, folder: Path) -> None:
    """Merge the rows measured so far in this run into folder/<kind>/benchmarks.json.

    A row replaces the one of the same name; a row that failed without a figure takes the old one's away, and stands with the reason
    under "failures"; an old row of what the machine lacks by now goes too. Each keeps its own date, commit, versions and GPU clocks in
    extra_info. A file that cannot be merged with ends the run untouched.
    """
    session = config._benchmarksession
    measured = [bench for bench in session.benchmarks if not bench.has_error]
    failed, gone = _failed_tests(config), config.stash.get(GONE, set())
    seen = len(measured), len(failed), len(gone)
    if config.stash.get(KEPT, None) == seen:
        return
    machine, commit = _machine_and_commit(config)
    path = folder / machine["kind"] / "benchmarks.json"
    small = config.getoption("small")
    try:
        before = read_file(path) if path.exists() else {"benchmarks": []}
    except ValueError as error:
        pytest.exit(f"--record: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    rows = {row["fullname"]: row for row in before["benchmarks"]}
    if rows and (other := _other(before, machine, small)) is not None:
        mixed = f"--record: {path} has rows {other}: they do not mix, take another folder"
        pytest.exit(mixed, returncode=pytest.ExitCode.USAGE_ERROR)
    whole = config.hook.pytest_benchmark_generate_json(
        config=config, benchmarks=measured, include_data=False, machine_info=machine, commit_info=commit
    )
    for name in (*failed, *gone):
        rows.pop(name, None)
    for row in whole["benchmarks"]:
        row["options"].pop("timer", None)  # its text holds an address in memory
        provenance = {"commit": commit["id"], "dirty": commit["dirty"], "versions": machine["versions"], "small": small}
        row["extra_info"] = row["extra_info"] | provenance | _moment(config, row, whole["datetime"])
        rows[row["fullname"]] = row
    whole["benchmarks"] = list(rows.values())
    whole["failures"] = _failures(before, rows, failed, config.stash.get(FAILURES, {}), commit["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(whole, indent=1, default=str) + "\n")
    config.stash[KEPT] = seen


def _other(before, machine, small):
    """What the rows of a file are of, where it is not what this run's are."""
    if any(row["extra_info"].get("small", False) != small for row in before["benchmarks"]):
        return f"{'without' if small else 'of'} --small"
    theirs, ours = (of.get("cpu", {}).get("brand_raw") for of in (before["machine_info"], machine))
    # A folder is of as many cores of an architecture, whose makers differ; a GPU has its own.
    if "gpu_memory_bytes" not in machine and theirs and ours and theirs != ours:
        return f"of the processor {theirs}, and this is {ours}"
    return None


def _failed_tests(config):
    """{name: its last line} of the tests that have failed so far, as pytest's terminal output counts them."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = [*reporter.stats.get("failed", []), *reporter.stats.get("error", [])] if reporter else []
    return {report.nodeid: (report.longreprtext.strip().splitlines() or [""])[-1] for report in reports}


def _failures(before, rows, failed, told, commit):
    """One dict for each row that has no figure: fullname, commit, error, and what is known of the row."""
    found = {failure["fullname"]: failure for failure in before.get("failures", [])}
    for name, line in failed.items():
        found[name] = {"fullname": name, "commit": commit, "error": line[:500], **told.get(name, {})}
    return [failure for name, failure in found.items() if name not in rows]


def _machine_and_commit(config):
    if MACHINE not in config.stash:
        commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
        config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
        if (given := os.environ.get("LAYALIGN_COMMIT")) is not None:  # for a copy of the tree without its history
            commit |= {"id": given, "dirty": False}
        elif commit["dirty"]:
            commit["dirty"] = _changed_but_for("bench/results")
        commit = {key: commit.get(key) for key in ("id", "time", "dirty")}
        machine = config._benchmarksession.get_machine_info()
        machine["cpu"] = {"brand_raw": machine["cpu"].get("brand_raw")}  # without 100 lines of flags
        config.stash[MACHINE] = ({key: value for key, value in machine.items() if key not in UNKEPT}, commit)
    return config.stash[MACHINE]


def _changed_but_for(folder):
    """Whether tracked files of the repository outside `folder` differ from the commit: results are written while others are measured."""
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{folder}"]
    return bool(subprocess.run(status, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def _moment(config, row, now):
    """When a row was first kept, and the clocks after its group was measured."""
    moments = config.stash.setdefault(CLOCKS, {})
    if row["fullname"] not in moments:
        clocks = _clocks_once(row["group"]) if machine().device == "cuda" else {}
        moments[row["fullname"]] = {"datetime": now, **clocks}
    return moments[row["fullname"]]


@cache
def _clocks_once(group):
    """All rows of a group are measured together, and asking takes longer than a row's share of that."""
    return {key: value for key, value in gpu_figures().items() if "clock" in key}


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
