import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from layalign.train import stages
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


def weights(output):
    return (Path(output) / "model" / "model.safetensors").read_bytes()


BY_TOKENS = {"packing": True, "batch_tokens": 40, "global_batch_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_killed_at_any_moment_the_run_ends_bit_identical(long_recipe, program, tmp_path, packed):
    """One uninterrupted run against one killed in its writes, in its steps and, at last, at times that chance decides."""
    settings = yaml.safe_load(long_recipe.read_text())
    settings["stages"]["translation"]["steps"], settings["stages"]["task"]["steps"] = 8, 30
    if packed:
        for stage in settings["stages"].values():
            for key in ("batch_size", "gradient_accumulation", "length_grouped"):
                stage.pop(key, None)
            stage |= BY_TOKENS
    long_recipe.write_text(yaml.safe_dump(settings))
    whole = program("killed_runs.py", long_recipe, tmp_path / "whole")
    generator = random.Random(0)
    sure = [f"sync:{number}" for number in (1, 2, 3, 14, 15, 16, *(generator.randrange(1, 14) for _ in range(3)))]
    sure += [f"batch:{number}" for number in (1, 4, 7)]
    if packed:  # the writes are those of the padded run
        sure = sure[3:5] + sure[-3:]
    generator.shuffle(sure)
    times = [f"time:{generator.random() * whole['seconds']:.3f}" for _ in range(2)]
    broken = program("killed_runs.py", long_recipe, tmp_path / "broken", *sure, *times)
    assert broken["killed"][: len(sure)] == sure
    assert broken["history"] == whole["history"]
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob(".*"))


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


def test_stopped_after_its_last_step_a_stage_trains_no_further_one(long_recipe, tmp_path, monkeypatch):
    """transformers' Trainer, resumed from a checkpoint of the last step, would train another step before it looks."""
    whole = train(load_recipe(long_recipe))
    overrides = [f"output={tmp_path / 'stopped'}"]

    def stop(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "sealed_folder", stop)
        train(load_recipe(long_recipe, overrides))
    assert train(load_recipe(long_recipe, overrides))[2] == whole[2]
    assert weights(tmp_path / "stopped") == weights(load_recipe(long_recipe).output)


def test_checkpoints_hold_the_trained_part_only(long_recipe):
    recipe = load_recipe(long_recipe)
    model = train(recipe)[0]
    names = {name for name, _ in model.trained_parameters()}
    for file in ("task/checkpoint-12", "task/final", "model"):
        assert set(load_file(Path(recipe.output) / file / "model.safetensors")) == names
    kept = sorted(path.name for path in (Path(recipe.output) / "task").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-12"]


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


def test_a_run_that_has_moved_with_its_bases_and_data_goes_on(settings, tmp_path):
    """As to another machine, where none of the paths it began with is there; another base in the place of its own is refused."""

    def recipe(place, output):
        bases = {role: str(place / "bases" / role) for role in ("encoder", "llm")}
        given = settings | bases | {"output": str(place / output), "data_root": str(place)}
        (place / "recipe.yaml").write_text(yaml.safe_dump(given))
        return load_recipe(place / "recipe.yaml")

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(Path(settings["llm"]).parent, here / "bases")
    (here / "data.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in settings["stages"]["task"]["data"]["records"])
    )
    for stage in settings["stages"].values():
        stage |= {"data": {"format": "jsonl", "path": "data.jsonl"}, "save_steps": 2}
    whole = train(recipe(here, "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(here, "run"), callbacks=[Stop(5)])
    here.rename(there)
    for stage in ("translation", "task"):
        shutil.rmtree(there / "whole" / stage)
    torch.manual_seed(3)
    llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(there / "bases" / "llm"))
    shutil.copytree(there / "bases" / "llm", there / "own")
    llm.save_pretrained(there / "bases" / "llm")
    with pytest.raises(ValueError, match=r"llm '.*there/bases/llm' is not the one trained with"):
        train(recipe(there, "run"))
    shutil.rmtree(there / "bases" / "llm")
    (there / "own").rename(there / "bases" / "llm")
    assert train(recipe(there, "run")).history == whole.history
    assert weights(there / "run") == weights(there / "whole")
    with pytest.raises(ValueError, match=r"nothing was changed.*\n.*llm: '.*/bases/llm' there, 'nobody/llm' here"):
        train(load_recipe(there / "recipe.yaml", ["llm=nobody/llm"]))
