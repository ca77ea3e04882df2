"""Checkpoints by the clock, the weights that are kept, the early end, and what a disk error leaves."""

import errno
import os
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from layalign.folders import damage
from layalign.train import flow, trainer
from layalign.train.checkpoints import newest_valid
from layalign.train.recipe import load_recipe
from layalign.train.stages import train


@pytest.fixture
def overfitting(recipe_file):
    """A task stage alone, whose held-out loss falls and then rises again."""
    settings = yaml.safe_load(recipe_file.read_text())
    del settings["stages"]["translation"]
    settings["stages"]["task"] |= {"hold_out": 4, "eval_steps": 2, "steps": 20, "learning_rate": 0.02, "batch_size": 3}
    settings["stages"]["task"]["log_steps"] = 3
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = {name: value.detach().clone() for name, value in model.trained_parameters()}


class Clock:
    """A clock that shows a minute more at every look."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 60
        return self.now


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def held_out(history):
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def checkpoints(folder):
    return sorted(int(path.name.partition("-")[2]) for path in Path(folder).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("when", "saved"),
    [
        # The clock is looked at when a stage begins, after each step but the last, and after each save.
        ([], [5, 10, 15]),
        (["stages.task.save_minutes=3"], [3, 6, 9, 12, 15, 18]),
        (["stages.task.save_minutes=0"], []),
        (["stages.task.save_steps=8"], [8, 16]),
        (["stages.task.save_steps=8", "stages.task.save_minutes=5"], [5, 8, 13, 16]),
        (["stages.task.save_steps=0"], []),
    ],
    ids=["default", "minutes", "never", "steps", "both", "no_steps"],
)
def test_a_checkpoint_by_the_clock_unless_told_otherwise(overfitting, monkeypatch, when, saved):
    monkeypatch.setattr(flow, "time", Clock())
    recipe = load_recipe(overfitting, ["stages.task.keep_checkpoints=9", *when])
    train(recipe)
    assert checkpoints(Path(recipe.output) / "task") == saved


def test_when_checkpoints_are_made_shows_in_nothing(overfitting, tmp_path):
    plain = train(load_recipe(overfitting))
    often = ["stages.task.save_steps=1", f"output={tmp_path / 'often'}"]
    assert train(load_recipe(overfitting, often)).history == plain.history
    assert weights(tmp_path / "often") == weights(load_recipe(overfitting).output)
    # Where checkpoints are made may change between a run and its continuation, therefore.
    broken = f"output={tmp_path / 'broken'}"
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(overfitting, [broken, "stages.task.save_steps=7"]), callbacks=[Stop(8)])
    assert checkpoints(tmp_path / "broken" / "task") == [7]
    assert train(load_recipe(overfitting, [broken, "stages.task.save_minutes=9"])).history == plain.history
    assert weights(tmp_path / "broken") == weights(load_recipe(overfitting).output)


@pytest.mark.slow
def test_the_best_weights_are_kept_and_found_again(overfitting, tmp_path):
    seen = Weights()
    recipe = load_recipe(overfitting, ["stages.task.keep=best"])
    model, _, history = train(recipe, callbacks=[seen])
    losses = held_out(history["task"])
    best = min(losses, key=losses.get)
    assert 2 < best < 20
    for name, value in model.trained_parameters():
        assert value.equal(seen.after[best][name]), name
    for name, value in load_file(Path(recipe.output) / "model" / "model.safetensors").items():
        assert value.equal(seen.after[best][name]), name
    # Broken off behind the best, and twice before: the best comes back from a checkpoint, or by being found again.
    for broken_at in ([best + 3], [2, best - 1, best]):
        output = tmp_path / f"broken-{len(broken_at)}"
        overrides = ["stages.task.keep=best", "stages.task.save_steps=1", f"output={output}"]
        for step in broken_at:
            with pytest.raises(KeyboardInterrupt):
                train(load_recipe(overfitting, overrides), callbacks=[Stop(step)])
        assert (output / "task" / f"checkpoint-{broken_at[-1]}" / "best.safetensors").exists()
        assert train(load_recipe(overfitting, overrides)).history == history
        assert weights(output) == weights(recipe.output)


def test_the_last_weights_are_kept_by_default(overfitting):
    seen = Weights()
    model, _, _ = train(load_recipe(overfitting), callbacks=[seen])
    assert all(value.equal(seen.after[20][name]) for name, value in model.trained_parameters())


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_stage_ends_when_evaluations_bring_nothing_better(overfitting, tmp_path, keep):
    whole = held_out(train(load_recipe(overfitting)).history["task"])
    best = min(whole, key=whole.get)
    overrides = ["stages.task.early_stopping=2", f"stages.task.keep={keep}"]
    seen, first = Weights(), f"output={tmp_path / 'first'}"
    model, _, history = train(load_recipe(overfitting, [*overrides, first]), callbacks=[seen])
    assert list(held_out(history["task"])) == list(range(2, best + 5, 2))
    assert max(seen.after) == best + 4 < 20
    assert [entry["step"] for entry in history["task"] if "loss" in entry][-1] == best + 4
    kept = best if keep == "best" else best + 4
    assert all(value.equal(seen.after[kept][name]) for name, value in model.trained_parameters())

    second = f"output={tmp_path / 'second'}"
    for step in (best - 1, best + 1, best + 3):
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(overfitting, [*overrides, second, "stages.task.save_steps=1"]), callbacks=[Stop(step)])
    # The step that ends the stage has no checkpoint: from one the stage would go on.
    again = load_recipe(
        overfitting, [*overrides, second, "stages.task.save_steps=1", "stages.task.keep_checkpoints=99"]
    )
    assert train(again).history == history
    assert max(checkpoints(tmp_path / "second" / "task")) == best + 3
    assert weights(tmp_path / "second") == weights(tmp_path / "first")


LIMITED = """
import resource, sys
from layalign.train.recipe import load_recipe
from layalign.train.stages import train
from transformers import TrainerCallback

class Fill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))

try:
    train(load_recipe(sys.argv[1], sys.argv[3:]), callbacks=[Fill()])
except ValueError as error:
    print(error)
"""
# Bytes that a file may have from the second checkpoint on: enough for none of a checkpoint's files, and for all but the
# optimizer's state.
SIZES = {"weights": 1000, "optimizer": 40_000}


@pytest.mark.slow
@pytest.mark.parametrize("limit", SIZES.values(), ids=SIZES)
def test_a_disk_that_refuses_a_checkpoint_leaves_the_one_before(overfitting, forks, tmp_path, limit):
    """For true, by the system: each library that writes meets the error in its own way."""
    output = tmp_path / "full"
    settings = ["stages.task.save_steps=2", f"output={output}"]
    done = forks.run(["-c", LIMITED, overfitting, limit, *settings])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"task: checkpoint-4 could not be written below {output / 'task'} (")
    assert "File too large" in done.stdout or "a write failed: " in done.stdout
    assert " MB free there); what was saved before is as it was." in done.stdout
    assert [path.name for path in (output / "task").iterdir() if "checkpoint" in path.name or path.name[0] == "."] == [
        "checkpoint-2"
    ]
    assert damage(output / "task" / "checkpoint-2") is None
    train(load_recipe(overfitting, settings))
    train(load_recipe(overfitting))
    assert weights(output) == weights(load_recipe(overfitting).output)


@pytest.mark.parametrize("where", ["fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["full", "quota", "broken"])
def test_a_full_disk_in_the_middle_of_a_checkpoint(overfitting, monkeypatch, where, code):
    recipe = load_recipe(overfitting, ["stages.task.save_steps=2"])
    function = getattr(os, where)

    def failing(path, *args, **kwargs):
        if (Path(recipe.output) / "task" / ".partial" / "checkpoint-4").exists():
            raise OSError(code, os.strerror(code))
        return function(path, *args, **kwargs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="task: checkpoint-4 could not be written") as caught,
    ):
        patch.setattr(os, where, failing)
        train(recipe)
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert newest_valid(Path(recipe.output) / "task").name == "checkpoint-2"
    assert not (Path(recipe.output) / "task" / ".partial").exists()
    assert set(train(recipe).history) == {"task"}


def test_an_error_that_is_not_the_disks_keeps_its_name(overfitting, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer, "seal", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(load_recipe(overfitting, ["stages.task.save_steps=2"]))


def test_without_bars_a_log_is_a_line(overfitting, capsys):
    history = train(load_recipe(overfitting)).history["task"]
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("task ")]
    assert [line.split()[1] for line in shown] == [f"{entry['step']}/20" for entry in history]
    assert shown[0].startswith(f"task 1/20 loss {history[0]['loss']:.4g} grad_norm ")
    assert any("eval_loss" in line for line in shown)
