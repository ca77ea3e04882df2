"""`pytest bench/ --small`, run once: every suite, and what its rows say."""

import json
import sys

import pytest
import torch

from bench.model_suite import PACKED
from bench.recording import ROOT

SYSTEMS = {"bare", "layalign", "published sdpa", "published eager"}
OURS_AND_THEIRS = {
    "attention forward": {"torch", "published eager", "published sdpa", "two calls"},
    "attention forward and backward": {"torch", "published eager", "published sdpa", "two calls"},
    "decode": {"torch", "published eager", "published sdpa", "two calls"},
    "layer_mix forward": {"torch", "copy", "published"},
    "layer_mix backward": {"torch", "copy", "published"},
    "stream_linear forward": {"torch", "plain product"},
    "stream_linear backward": {"torch", "plain product"},
    "aligner": {"torch", "published"},
    "aligner folded": {"unfolded", "folded", "folded before"},
    "training step": {"bare", "layalign", "published eager", "published sdpa"},
    "prefill": {"bare", "layalign", "published eager", "published sdpa"},
    "generation": {"bare", "layalign", "published eager", "published sdpa"},
}


@pytest.fixture(scope="module")
def small(run_bench, tmp_path_factory):
    """What the run said, and its rows."""
    output = tmp_path_factory.mktemp("small") / "figures.json"
    done = run_bench("bench/", "--small", f"--benchmark-json={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text(encoding="utf-8"))["benchmarks"]


def test_every_suite(small):
    """Every suite runs, what is missing says why, and each row says what it is compared with."""
    said, rows = small
    found = {}
    for row in rows:
        info = row["extra_info"]
        found.setdefault(info["suite"], set()).add(info["implementation"])
        assert info["case"] in row["group"] and row["stats"]["median"] > 0 and info["time_over_yardstick"] > 0
        assert info["implementation"] != info["yardstick"] or info["time_over_yardstick"] == 1
    assert found.keys() - {"host cost"} == OURS_AND_THEIRS.keys()
    for suite, names in OURS_AND_THEIRS.items():
        assert found[suite] >= names, suite
    aligner = [row["extra_info"] for row in rows if row["extra_info"]["suite"] == "aligner"]
    saved = {info["implementation"]: info["saved_bytes"] for info in aligner}
    assert saved["published"] > saved["torch"] == 0
    assert torch.cuda.is_available() or "triton needs a CUDA device" in said


def test_systems_of_a_model(small):
    said, measured = small
    rows = {}
    for info in (row["extra_info"] for row in measured):
        if info["suite"] not in ("training step", "prefill", "generation"):
            continue
        rows.setdefault((info["suite"], info["case"]), {})[info["implementation"]] = info
    assert {suite for suite, _ in rows} == {"training step", "prefill", "generation"}
    for (name, case), systems in rows.items():
        skewed = case.endswith("skewed")
        assert systems.keys() >= (SYSTEMS | set(PACKED) if skewed else SYSTEMS)
        assert systems["bare"]["time_over_yardstick"] == 1
        for info in systems.values():
            assert info["yardstick"] == "bare" and info["ours"] == info["implementation"].startswith("layalign")
            assert ("tokens_per_second" in info) == (name == "generation" or skewed)
            if name == "training step":
                assert info["peak_bytes"] > 0
                assert (info["peak_over_published"] == 1) == (info["implementation"] == "published eager")
    if not torch.cuda.is_available():
        assert "pays with CUDA graphs" in said and "liger-kernel" in said


def test_a_suite_that_needs_triton_is_skipped_without(run_command, without):
    """Not an error of collection, which would end `pytest bench/` before its first row."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "bench/test_host_cost.py", "-rs"]
    done = run_command(command, ROOT, without(["triton"]))
    assert done.returncode == 5 and "could not import 'triton'" in done.stdout, done.stdout + done.stderr
