import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from layalign.train.recipe import load_recipe
from layalign.train.stages import train


def torchrun(recipe, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "layalign"]
    return subprocess.Popen(
        [*command, "train", str(recipe), *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe_file, tmp_path):
    """The same optimizer steps over the same examples, half of each batch in either process, through the command line.

    Batches are whole: accelerate fills a short last one, with two processes, with records from the front.
    """
    overrides = ["stages.translation.save_steps=4", "stages.task.hold_out=2", "stages.task.eval_steps=3"]
    sizes = {"stages.translation.batch_size": 10, "stages.task.batch_size": 8, "stages.task.eval_batch_size": 2}
    alone = [*overrides, *(f"{key}={size}" for key, size in sizes.items())]
    # A process of its own as well: what earlier tests leave behind in this one once changed the first weights.
    subprocess.run([sys.executable, "-m", "layalign", "train", str(recipe_file), *alone], check=True)
    folder = Path(load_recipe(recipe_file, alone).output)
    whole = {
        name: json.loads((folder / name / "final" / "history.json").read_text()) for name in ("translation", "task")
    }
    output = tmp_path / "two"
    halves = [*(f"{key}={size // 2}" for key, size in sizes.items()), f"output={output}"]
    done = torchrun(recipe_file, *overrides, *halves)
    assert done.wait() == 0, done.stderr.read()[-3000:]
    for name, history in whole.items():
        found = json.loads((Path(output) / name / "final" / "history.json").read_text())
        for key in ("loss", "eval_loss"):
            expected = [entry[key] for entry in history if key in entry]
            assert [entry[key] for entry in found if key in entry] == pytest.approx(expected, rel=1e-3)
    assert (output / "model" / "manifest.json").is_file()
    assert (output / "translation" / "checkpoint-4" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_processes_on_the_cpu_find_each_other_and_save_at_the_same_step(recipe_file, tmp_path):
    """`device: auto`; SIGTERM to torchrun, and the interrupted run ends like an uninterrupted one."""
    settings = yaml.safe_load(recipe_file.read_text())
    del settings["device"]
    for stage in settings["stages"].values():
        stage |= {"global_batch_size": 8, "batch_size": 2, "steps": 40, "log_steps": 7}
    settings["stages"]["task"]["steps"] = 3
    recipe_file.write_text(yaml.safe_dump(settings))
    whole = torchrun(recipe_file, f"output={tmp_path / 'whole'}")
    assert whole.wait() == 0, whole.stderr.read()[-3000:]

    broken = torchrun(recipe_file, f"output={tmp_path / 'broken'}")
    for line in broken.stderr:
        if line.startswith("translation 7/40"):
            broken.send_signal(signal.SIGTERM)
            break
    errors = broken.stderr.read()
    assert broken.wait() != 0
    (saved,) = (tmp_path / "broken" / "translation").glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 7 <= step <= 40
    assert errors.count(f"stopped by SIGTERM; translation is saved at step {step} of 40") == 1
    assert len(json.loads((saved / "running.json").read_text())["loss_sums"]) == 2

    resumed = torchrun(recipe_file, f"output={tmp_path / 'broken'}")
    assert resumed.wait() == 0, resumed.stderr.read()[-3000:]
    for file in ("translation/final/history.json", "task/final/history.json", "model/model.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_a_batch_that_the_processes_do_not_divide_is_refused(recipe_file):
    done = torchrun(recipe_file, "stages.task.global_batch_size=4", "stages.task.batch_size=4")
    assert (
        "stages.task.global_batch_size: 4 examples do not divide into forward calls of 8 (2 processes x batch_size 4); 8 would"
        in (done.communicate()[1])
    )
    assert done.returncode != 0


@pytest.mark.slow
def test_one_of_two_processes_killed_at_any_moment_the_run_ends_bit_identical(recipe_file, tmp_path):
    settings = yaml.safe_load(recipe_file.read_text())
    for stage in settings["stages"].values():
        stage |= {"global_batch_size": 4, "batch_size": 2, "steps": 12, "save_steps": 2, "log_steps": 5}
    settings["stages"]["task"] |= {"hold_out": 2, "eval_steps": 5, "eval_batch_size": 1, "keep": "best"}
    recipe_file.write_text(yaml.safe_dump(settings))

    def run(output, *kills):
        command = [sys.executable, str(Path(__file__).with_name("killed_together.py")), str(recipe_file), str(output)]
        done = subprocess.run(
            [*command, *kills], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])["killed"]

    run(tmp_path / "whole")
    generator = random.Random(3)
    sure = ["batch:1@1", "batch:3@0", "sync:4@0", "batch:4@1", "sync:11@0", "sync:13@0", "batch:5@1", "sync:20@0"]
    times = [f"time:{generator.uniform(0.1, 1.5):.3f}@{generator.randrange(2)}" for _ in range(4)]
    killed = run(tmp_path / "broken", *sure, *times)
    assert killed[: len(sure)] == sure
    for file in ("translation/final/history.json", "task/final/history.json", "model/model.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(recipe_file, tmp_path):
    """With the same global batch the same examples make each step; epochs are whole batches here."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    settings = yaml.safe_load(recipe_file.read_text())
    del settings["stages"]["translation"]
    settings["stages"]["task"] |= {"hold_out": 2, "global_batch_size": 4, "batch_size": 2, "steps": 12, "save_steps": 5}
    settings["stages"]["task"]["log_steps"] = 3
    recipe_file.write_text(yaml.safe_dump(settings))
    whole = train(load_recipe(recipe_file, [f"output={tmp_path / 'whole'}"])).history["task"]
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file), callbacks=[Stop()])
    resumed = torchrun(recipe_file)
    assert resumed.wait() == 0, resumed.stderr.read()[-3000:]
    found = json.loads((Path(settings["output"]) / "task" / "final" / "history.json").read_text())
    assert [entry["step"] for entry in found] == [entry["step"] for entry in whole]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in whole], rel=1e-5)
