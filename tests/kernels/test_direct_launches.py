"""Launches without Triton's binder, on a driver without a GPU: what compiled kernels are handed, and when Triton's own path stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    """What idle_launches.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, Path(__file__).with_name("idle_launches.py"), "150"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_random_calls_launch_what_triton_would(found):
    """The same compiled kernels, so the same specialisation, on the same grids with the same arguments."""
    compared = found["compare"]
    assert compared["differ"] == []
    assert compared["calls"] > 100 and compared["direct"] > 0.8 * compared["launches"]


def test_profilers_see_every_launch(found):
    assert found["hooks"] == {"before": 1, "during": 0, "after": 1}
    assert found["pre_run_hook"] == {"during": 0, "after": 1}


def test_what_triton_hands_over_otherwise_stays_with_triton(found):
    assert found["unlike"] == {"during": 0, "after": 1}


def test_threads(found):
    """They make, rehearse and run plans at once; a rehearsal leaves the launcher as it was."""
    left = "IdleGPU.compile.<locals>.start"
    assert found["threads"] == {"runs": 800, "differ": [], "direct": True, "kept": True, "left": left}


def test_a_refused_launch_is_made_by_triton(found):
    """Once warned of; nothing is launched twice or not at all."""
    assert found["refused"] == {"launches": [1, 1, 1, 1], "direct": [0, 0, 0, 0], "warnings": 1}
