"""What the machine and its environment have no say in: how many examples a step takes, and in which precision."""

import copy
import logging

import pytest
import torch

from layalign.train import stages, trainer
from layalign.train.data.collate import Collator
from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stages import train


@pytest.fixture
def made(monkeypatch):
    """The trainers that runs make."""
    found = []

    class Kept(trainer.StageTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(stages, "StageTrainer", Kept)
    return found


def run(settings, name, **stage):
    settings = copy.deepcopy(settings) | {"output": f"{settings['output']}-{name}"}
    del settings["stages"]["translation"]
    settings["stages"]["task"].update(stage)
    return train(build(Recipe, settings)).history["task"]


def test_one_process_uses_one_gpu_however_many_are_visible(settings, made, monkeypatch, caplog):
    """The Trainer would wrap the model in DataParallel, and each step take as many examples more as there are GPUs."""
    sizes = []
    collate = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda self, rows: sizes.append(len(rows)) or collate(self, rows))
    steps = {"steps": 3, "batch_size": 2, "global_batch_size": 4}
    one = run(settings, "one", **steps)
    before, sizes[:] = list(sizes), []
    monkeypatch.setattr(trainer, "on_cpu", lambda recipe: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.WARNING):
        two = run(settings, "two", **steps)
    assert (made[-1].args.n_gpu, made[-1].args.train_batch_size) == (1, 2)
    assert sizes == before and set(sizes) == {2}
    assert [entry["loss"] for entry in two] == [entry["loss"] for entry in one]
    assert "2 GPUs are visible and one is used; torchrun --nproc-per-node 2" in caplog.text


def test_the_recipe_alone_says_the_precision(settings, made, monkeypatch):
    """`accelerate launch` sets these whatever it was told, from its own saved defaults."""
    plain = run(settings, "plain", precision="fp32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    told = run(settings, "told", precision="fp32")
    assert made[-1].accelerator.mixed_precision == "no"
    assert str(made[-1].accelerator.state.dynamo_plugin.backend.value) == "NO"
    assert [entry["loss"] for entry in told] == [entry["loss"] for entry in plain]
