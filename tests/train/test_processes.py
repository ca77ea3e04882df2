import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layalign.train.recipe import load_recipe


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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "layalign", "train"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(recipe_file), *overrides, *halves],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, history in whole.items():
        found = json.loads((Path(output) / name / "final" / "history.json").read_text())
        for key in ("loss", "eval_loss"):
            expected = [entry[key] for entry in history if key in entry]
            assert [entry[key] for entry in found if key in entry] == pytest.approx(expected, rel=1e-3)
    assert (output / "model" / "manifest.json").is_file()
    assert (output / "translation" / "checkpoint-4" / "rng_state_1.pth").is_file()
