"""SIGTERM and Ctrl-C, at any place: what has been reached is saved, and the run goes on as if there had been none."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def plain_recipe(recipe_file):
    """Several epochs a stage, logs and evaluations between steps, and no word about checkpoints."""
    settings = yaml.safe_load(recipe_file.read_text())
    for stage in settings["stages"].values():
        stage |= {"steps": 9, "batch_size": 2, "gradient_accumulation": 2, "log_steps": 4}
    settings["stages"]["task"] |= {"hold_out": 3, "eval_steps": 3, "eval_batch_size": 1, "keep": "best"}
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


def run(recipe, output, *signals):
    command = [sys.executable, str(Path(__file__).with_name("signalled_runs.py")), str(recipe), str(output), *signals]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def weights(output):
    return (Path(output) / "model" / "model.safetensors").read_bytes()


# Where the signal comes, and what is then saved: stages of 9 steps of two forward calls each (every third of the translation stage:
# one, its epochs have five); the task stage evaluates in three more after steps 3, 6 and 9.
PLACES = [
    ("TERM@batch:1", "translation is saved at step 1 of 9"),
    ("INT@batch:6", "translation is saved at step 5 of 9"),
    ("TERM@step:3", "translation is saved at step 8 of 9"),
    ("INT@batch:1", "translation is saved at step 9 of 9"),
    ("TERM@batch:8", "task is saved at step 3 of 9"),  # in an evaluation
    ("TERM@batch:1", "task is saved at step 3 of 9"),  # in the same, made up for
    ("INT@step:3", "task is saved at step 6 of 9"),  # before one
    ("TERM@batch:11", "task is saved at step 9 of 9"),  # in the last one
    ("INT@batch:2", "task is saved at step 9 of 9"),
]


def test_signalled_anywhere_the_run_ends_bit_identical(plain_recipe, tmp_path):
    whole = run(plain_recipe, tmp_path / "whole")
    broken = run(plain_recipe, tmp_path / "broken", *(place for place, _ in PLACES))
    for (place, saved), (status, line) in zip(PLACES, broken["ended"], strict=True):
        number, name = (143, "SIGTERM") if place.startswith("TERM") else (130, "Ctrl-C")
        assert (status, line) == (
            number,
            f"layalign: stopped by {name}; {saved}, and the same command goes on from there",
        ), place
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob(".*"))


def test_signalled_at_random_moments_the_run_ends_bit_identical(plain_recipe, tmp_path):
    whole = run(plain_recipe, tmp_path / "whole")
    generator = random.Random(2)
    times = [f"{generator.choice(['TERM', 'INT'])}@time:{generator.uniform(0, 1):.3f}" for _ in range(12)]
    broken = run(plain_recipe, tmp_path / "broken", *times)
    for place, (status, _) in zip(times, broken["ended"], strict=True):
        # 0: the run had come to its end before.
        assert status in (143 if place.startswith("TERM") else 130, 0)
    assert sum(status != 0 for status, _ in broken["ended"]) >= 3
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob(".*"))
