import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from layalign.train.recipe import load_recipe
from layalign.train.stages import train


@pytest.fixture
def long_recipe(recipe_file):
    """Several epochs a stage, checkpoints inside and at the end of epochs, logs and evaluations between them."""
    settings = yaml.safe_load(recipe_file.read_text())
    for stage in settings["stages"].values():
        stage |= {"steps": 14, "batch_size": 2, "gradient_accumulation": 2, "save_steps": 2, "log_steps": 3}
    settings["stages"]["task"] |= {"hold_out": 3, "eval_steps": 5, "length_grouped": True}
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


def run(recipe, output, *kills):
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(recipe), str(output), *kills]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def weights(output):
    return (Path(output) / "model" / "model.safetensors").read_bytes()


def test_killed_at_any_moment_the_run_ends_bit_identical(long_recipe, tmp_path):
    """One uninterrupted run against runs killed inside every kind of write and at random times."""
    whole = run(long_recipe, tmp_path / "whole")
    generator = random.Random(0)
    syncs = [f"sync:{number}" for number in (1, 3, 4, 9, 14, 15, 16, 30)] + [
        f"sync:{generator.randrange(1, 60)}" for _ in range(6)
    ]
    times = [f"{generator.uniform(0.1, 0.6) * whole['seconds']:.3f}" for _ in range(6)]
    kills = syncs + times
    generator.shuffle(kills)
    broken = run(long_recipe, tmp_path / "broken", *kills)
    assert broken["killed"] >= 8
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    left = [path for path in (tmp_path / "broken").rglob(".*")]
    assert not left, left


class Stop(TrainerCallback):
    """Interrupts the translation stage after some steps: the log of every third step is then one of unequal parts."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["newest", "all"])
def test_damaged_checkpoints_are_passed_over(long_recipe, tmp_path, caplog, damage):
    whole = train(load_recipe(long_recipe))
    overrides = [f"output={tmp_path / 'damaged'}", "stages.translation.keep_checkpoints=3"]
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(long_recipe, overrides), callbacks=[Stop(11)])
    stage = tmp_path / "damaged" / "translation"
    assert sorted(path.name for path in stage.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    (stage / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    if damage == "all":
        (stage / "checkpoint-8" / "manifest.json").unlink()
        (stage / "checkpoint-6" / "model.safetensors").unlink()
    started = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            started.append(state.global_step)

    resumed = train(load_recipe(long_recipe, overrides), callbacks=[Look()])
    assert started == [8 if damage == "newest" else 0, 0]
    assert "checkpoint-10 ignored: optimizer.pt has 0 bytes" in caplog.text
    assert resumed[2] == whole[2]
    assert weights(tmp_path / "damaged") == weights(load_recipe(long_recipe).output)


def test_checkpoints_hold_the_trained_part_only(long_recipe):
    recipe = load_recipe(long_recipe)
    model = train(recipe)[0]
    names = {name for name, _ in model.trained_parameters()}
    for file in ("task/checkpoint-14", "task/final", "model"):
        assert set(load_file(Path(recipe.output) / file / "model.safetensors")) == names
    kept = sorted(path.name for path in (Path(recipe.output) / "task").glob("checkpoint-*"))
    assert kept == ["checkpoint-12", "checkpoint-14"]


def test_a_finished_stage_with_a_damaged_result_is_trained_again(long_recipe):
    recipe = load_recipe(long_recipe)
    whole = train(recipe)
    before = weights(recipe.output)
    final = Path(recipe.output) / "task" / "final"
    (final / "model.safetensors").write_bytes(b"damaged")
    (Path(recipe.output) / "model" / "config.json").unlink()
    assert train(recipe)[2] == whole[2]
    assert weights(recipe.output) == before
    assert (Path(recipe.output) / "model" / "config.json").exists()
