"""What a call of the fused attention costs on the host above an empty Triton launch; without a GPU, see `bench.host_cost`.

pytest bench/test_host_cost.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.host_cost import EMPTY, EMPTY_BACKWARD, above_least
from bench.measuring import CLOCK, Measurement, Table
from bench.recording import ROOT

WITHOUT_A_GOAL = ("forward, for gradients",)  # autograd's own function takes 5 of it
GOALS = {"decode": 10.0, "forward": 15.0, "backward": 30.0}  # microseconds above the least, with masks too
CALLS = (
    "decode",
    "decode, masks",
    "forward",
    "forward, masks",
    "forward, for gradients",
    "backward",
    "backward, masks",
)


def measured(small):
    """In a process of its own, which changes what Triton's driver is."""
    effort = ("--rounds=1", "--repetitions=3") if small else ()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host_cost", *effort]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("name", [EMPTY, EMPTY_BACKWARD, *CALLS])
def test_host_cost(row, measured_once, small, name):
    found = measured_once(measured, small)
    measurements = {call: Measurement(seconds=one["seconds"]) for call, one in found.items()}
    table = Table(suite="host cost", case="32 heads over 8", yardstick=EMPTY, dtype=torch.bfloat16, sizes={"D": 64})
    figures = {}
    if name in CALLS:
        figures["microseconds_above_least"] = above_least(found, name) * 1e6
        figures["microseconds_without_a_plan"] = above_least(found, name, "without_a_plan") * 1e6
        if name not in WITHOUT_A_GOAL:
            figures["goal_microseconds"] = GOALS[name.partition(",")[0]]
    row(table, name, measurements, ours=name in CALLS, **figures)
