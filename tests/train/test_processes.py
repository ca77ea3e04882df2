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
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_processes_train_what_one_does(recipe_file, together, tmp_path, packed):
    """The same optimizer steps over the same examples, half of each batch in either process.

    Batches are whole: accelerate fills a short last one, with two processes, with records from the front.
    """
    overrides = ["stages.translation.save_steps=4", "stages.task.hold_out=2", "stages.task.eval_steps=3"]
    sizes = {"stages.translation.batch_size": 10, "stages.task.batch_size": 8, "stages.task.eval_batch_size": 2}
    if packed:
        overrides += ["stages.translation.packing=true", "stages.task.packing=true"]
    alone = [*overrides, *(f"{key}={size}" for key, size in sizes.items())]
    output = tmp_path / "two"
    halves = [*overrides, *(f"{key}={size // 2}" for key, size in sizes.items()), f"output={output}"]
    # A process of its own for the one as well: what earlier tests leave behind in this one once changed the first weights.
    for job in together(recipe_file, (1, alone, {}), (2, halves, {})):
        assert not any(job["statuses"]), job["errors"]
    folder = Path(load_recipe(recipe_file, alone).output)
    whole = {
        name: json.loads((folder / name / "final" / "history.json").read_text()) for name in ("translation", "task")
    }
    for name, history in whole.items():
        found = json.loads((Path(output) / name / "final" / "history.json").read_text())
        for key in ("loss", "eval_loss"):
            expected = [entry[key] for entry in history if key in entry]
            assert [entry[key] for entry in found if key in entry] == pytest.approx(expected, rel=1e-3)
    assert (output / "model" / "manifest.json").is_file()
    assert (output / "translation" / "checkpoint-4" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_processes_on_the_cpu_find_each_other_and_save_at_the_same_step(recipe_file, together, tmp_path):
    """`device: auto`; SIGTERM to torchrun, and the interrupted run ends like an uninterrupted one."""
    settings = yaml.safe_load(recipe_file.read_text())
    del settings["device"]
    for stage in settings["stages"].values():
        stage |= {"global_batch_size": 8, "batch_size": 2, "steps": 40, "log_steps": 7}
    settings["stages"]["task"]["steps"] = 3
    recipe_file.write_text(yaml.safe_dump(settings))
    (whole,) = together(recipe_file, (2, [f"output={tmp_path / 'whole'}"], {}))
    assert whole["statuses"] == [0, 0], whole["errors"]

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

    (resumed,) = together(recipe_file, (2, [f"output={tmp_path / 'broken'}"], {}))
    assert resumed["statuses"] == [0, 0], resumed["errors"]
    for file in ("translation/final/history.json", "task/final/history.json", "model/model.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_a_batch_that_the_processes_do_not_divide_is_refused(recipe_file, together):
    (job,) = together(recipe_file, (2, ["stages.task.global_batch_size=4", "stages.task.batch_size=4"], {}))
    assert job["statuses"] == [2, 2]
    said = "stages.task.global_batch_size: 4 examples do not divide into forward calls of 8 (2 processes x batch_size 4); 8 would"
    assert all(said in error for error in job["errors"])


@pytest.fixture
def all_kills(request):
    """Whether two processes are ended at every moment that is written down, and not at a few of them."""
    return request.config.getoption("thorough")


def assert_bit_identical(folder):
    """The broken run's results and the whole one's."""
    results = [*(folder / "whole").glob("*/final/history.json"), *(folder / "whole").rglob("model.safetensors")]
    assert len(results) > 2
    for file in (path.relative_to(folder / "whole") for path in results):
        assert (folder / "broken" / file).read_bytes() == (folder / "whole" / file).read_bytes(), file
    assert not list((folder / "broken").rglob(".*"))


WAYS = {"padded": ("ddp", False), "packed": ("ddp", True), "fsdp2": ("fsdp2", False), "fsdp2 packed": ("fsdp2", True)}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "packed"), WAYS.values(), ids=WAYS)
def test_one_of_two_processes_killed_at_any_moment_the_run_ends_bit_identical(
    recipe_file, program, all_kills, tmp_path, engine, packed
):
    settings = yaml.safe_load(recipe_file.read_text()) | {"parallel": engine}
    for stage in settings["stages"].values():
        stage |= {"global_batch_size": 4, "batch_size": 2, "steps": 12, "save_steps": 2, "log_steps": 5}
        if packed:
            del stage["batch_size"]
            stage |= {"packing": True, "batch_tokens": 30}
    settings["stages"]["task"] |= {"hold_out": 2, "eval_steps": 5, "eval_batch_size": 1, "keep": "best"}
    recipe_file.write_text(yaml.safe_dump(settings))
    program("killed_together.py", recipe_file, tmp_path / "whole")
    generator = random.Random(3)
    sure = ["batch:1@1", "batch:3@0", "sync:4@0", "batch:4@1", "sync:11@0", "sync:13@0", "batch:5@1", "sync:20@0"]
    times = [f"time:{generator.uniform(0.1, 1.5):.3f}@{generator.randrange(2)}" for _ in range(4)]
    if engine != "ddp":
        sure, times = ["batch:3@1", "sync:9@0", "save:2@1"], times[:1]
    elif packed:
        sure, times = sure[1:5], times[:1]
    if not all_kills:
        sure, times = (sure[1:] if engine != "ddp" else sure[1:3] if packed else sure[:3] + sure[5:6]), times[:1]
    killed = program("killed_together.py", recipe_file, tmp_path / "broken", *sure, *times)["killed"]
    assert killed[: len(sure)] == sure
    assert_bit_identical(tmp_path)


@pytest.mark.slow
def test_killed_at_every_write_of_a_checkpoint_of_two_processes_the_run_ends_bit_identical(
    recipe_file, program, all_kills, tmp_path
):
    """The processes save (optimizer, scheduler, random states), then the first one flushes every file, the manifest and the folders.

    The last kills fall into the second checkpoint, which the first one is then gone on from.
    """
    settings = yaml.safe_load(recipe_file.read_text())
    del settings["stages"]["translation"]
    settings["stages"]["task"] |= {"global_batch_size": 4, "batch_size": 2, "steps": 6, "save_steps": 2, "log_steps": 1}
    recipe_file.write_text(yaml.safe_dump(settings))
    program("killed_together.py", recipe_file, tmp_path / "whole")
    checkpoint = [f"sync:{number}@0" for number in (range(1, 17) if all_kills else (1, 5, 8, 12, 16))]
    checkpoint += [f"save:{number}@0" for number in ((1, 2, 3) if all_kills else (2,))]
    killed = program("killed_together.py", recipe_file, tmp_path / "broken", *checkpoint, "save:1@1")["killed"]
    assert killed == [*checkpoint, "save:1@1"]
    assert_bit_identical(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_run_goes_on_in_another_number_of_processes(recipe_file, together, tmp_path, packed):
    """With the same global batch the same examples make each step. Epochs are whole batches here where they are padded; packed ones end
    with a step of two of three examples."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    settings = yaml.safe_load(recipe_file.read_text())
    del settings["stages"]["translation"]
    settings["stages"]["task"] |= {"hold_out": 2, "global_batch_size": 4, "batch_size": 2, "steps": 12, "save_steps": 5}
    settings["stages"]["task"]["log_steps"] = 3
    if packed:
        del settings["stages"]["task"]["batch_size"]
        settings["stages"]["task"] |= {"packing": True, "batch_tokens": 30, "global_batch_size": 3, "eval_steps": 4}
    recipe_file.write_text(yaml.safe_dump(settings))
    whole = train(load_recipe(recipe_file, [f"output={tmp_path / 'whole'}"])).history["task"]
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file), callbacks=[Stop()])
    (resumed,) = together(recipe_file, (2, [], {}))
    assert resumed["statuses"] == [0, 0], resumed["errors"]
    found = json.loads((Path(settings["output"]) / "task" / "final" / "history.json").read_text())
    assert [entry["step"] for entry in found] == [entry["step"] for entry in whole]
    for key in ("loss", "eval_loss"):
        expected = [entry[key] for entry in whole if key in entry]
        assert [entry[key] for entry in found if key in entry] == pytest.approx(expected, rel=1e-5)
