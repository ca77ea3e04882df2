"""One run a folder: a second one is refused, and nothing outlives the first."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from layalign.configuration import STAGES
from layalign.train import run_folder, stages
from layalign.train.recipe import load_recipe
from layalign.train.run_folder import LOCK, RunFolder, has_work
from layalign.train.stages import train

HOLD = """
import sys, time
from layalign.train.recipe import load_recipe
from layalign.train.run_folder import RunFolder
with RunFolder(load_recipe(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(recipe_file, forks):
    """Another process that holds the folder."""
    process = forks.start(["-c", HOLD, recipe_file], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "held\n"
    yield process
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_second_run_is_refused_by_name_and_the_lock_dies_with_its_process(recipe_file, holder):
    recipe = load_recipe(recipe_file)
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            train(recipe)
        assert str(caught.value).startswith(
            f"output: {recipe.output} is in use by another run (process {holder.pid} on "
        )
    other = load_recipe(recipe_file, [f"output={recipe.output}-2", "stages.translation.steps=1", "stages.task.steps=1"])
    assert set(train(other).history) == {"translation", "task"}
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(recipe):
        assert (Path(recipe.output) / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_the_command_refuses_a_folder_in_use(recipe_file, forks, holder):
    done = forks.run(["-m", "layalign", "train", recipe_file])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"is in use by another run (process {holder.pid} on " in done.stderr


def test_a_folder_is_free_again_however_a_run_ends(recipe_file):
    recipe = load_recipe(recipe_file)
    with pytest.raises(RuntimeError), RunFolder(recipe):
        raise RuntimeError
    for _ in range(2):
        with RunFolder(recipe), pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()} on "):
            RunFolder(recipe)
    recipe.llm = "/nowhere/llm"
    with pytest.raises(ValueError, match="llm '/nowhere/llm'"):
        train(recipe)
    with RunFolder(recipe):
        pass


def test_of_two_that_find_the_folder_free_the_later_one_looks_again(recipe_file, monkeypatch):
    """Between its look and its lock, a whole other run may have been there."""
    mine, other = load_recipe(recipe_file, ["seed=1"]), load_recipe(recipe_file)
    lock = run_folder._lock

    def late(output):
        monkeypatch.setattr(run_folder, "_lock", lock)
        train(other)
        return lock(output)

    monkeypatch.setattr(run_folder, "_lock", late)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        RunFolder(mine)
    with RunFolder(other):
        pass


def test_a_file_system_without_locks_is_told_of(recipe_file, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with RunFolder(load_recipe(recipe_file)):
        assert "cannot be locked (Operation not supported)" in caplog.text


def test_a_run_of_an_older_version_is_told_apart_from_a_file_of_something_else(recipe_file):
    recipe = load_recipe(recipe_file, ["stages.translation.steps=1", "stages.task.steps=1"])
    train(recipe)
    file = Path(recipe.output) / "recipe.json"
    content = file.read_text()
    file.write_text(content.replace(' "init_from": null,\n', ""))
    assert file.read_text() != content
    with pytest.raises(ValueError, match=r"init_from: '\(not set\)' there, None here"):
        train(recipe)


def test_bad_data_of_the_task_stage_is_met_before_the_translation_stage_is_trained(recipe_file, tmp_path):
    data = tmp_path / "task.jsonl"
    data.write_text((tmp_path / "data.jsonl").read_text() + "no JSON\n", encoding="utf-8")
    words = [f"stages.task.data.path={data}", "stages.translation.steps=1", "stages.task.steps=1"]
    recipe = load_recipe(recipe_file, words)
    with pytest.raises(ValueError, match=r"task.jsonl:\d+: "):
        train(recipe)
    assert not has_work(Path(recipe.output) / "translation")
    assert set(train(load_recipe(recipe_file, [*words, "stages.task.data.on_bad_line=skip"])).history) == {*STAGES}


def test_a_task_stage_that_has_saved_nothing_may_be_corrected(recipe_file, monkeypatch):
    """It did not fit into the memory, say. What it comes to then is what the corrected recipe gives from the beginning."""
    words = ["stages.translation.steps=2", "stages.task.steps=2"]
    real = stages.run_stage

    def without_room(name, *rest):
        if name == "task":
            raise RuntimeError("out of memory")
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "run_stage", without_room)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(load_recipe(recipe_file, words))
    final = Path(load_recipe(recipe_file).output) / "translation" / "final" / "manifest.json"
    trained = final.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"stages.translation.batch_size: \d+ there, 2 here"):
        train(load_recipe(recipe_file, [*words, "stages.translation.batch_size=2", "stages.task.batch_size=2"]))
    words.append("stages.task.batch_size=2")
    found = train(load_recipe(recipe_file, words))
    assert final.stat().st_mtime_ns == trained
    anew = load_recipe(recipe_file, [*words, f"output={final.parents[2]}-anew"])
    assert train(anew).history == found.history
    with pytest.raises(ValueError, match=r"stages.task.batch_size: 2 there, 1 here"):  # it is whole now
        train(load_recipe(recipe_file, [*words[:-1], "stages.task.batch_size=1"]))


def test_no_stage_is_put_before_one_that_has_work(recipe_file, monkeypatch):
    alone = ["stages.task.steps=2", "stages.translation.steps=1", "stages.task.save_steps=1"]
    recipe = load_recipe(recipe_file, alone)
    translation = recipe.stages.pop("translation")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_model", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train(recipe)
    recipe.stages = {"translation": translation, **recipe.stages}
    with pytest.raises(ValueError, match=r"stages.translation.batch_size: '\(not set\)' there"):
        train(recipe)
