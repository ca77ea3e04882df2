"""What a run leaves behind: nothing is lost while it is written, what is not needed any more may stay, and prose is anyone's."""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from layalign.folders import damage
from layalign.train import checkpoints, stages
from layalign.train.data.collate import Collator
from layalign.train.engine_trainer import EngineTrainer
from layalign.train.initial import initial_file
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.settings import build
from layalign.train.stages import train

OVERRIDES = ["stages.translation.steps=4", "stages.task.steps=4"]


def test_a_signal_while_a_result_is_written_loses_no_step(recipe_file, monkeypatch, capsys):
    """Of an LLM that is trained that takes minutes, and there is no checkpoint of the last steps."""
    recipe, seal = load_recipe(recipe_file, OVERRIDES), checkpoints.seal

    def told(folder):
        if Path(folder).name == ".final.partial":
            os.kill(os.getpid(), signal.SIGTERM)
        seal(folder)

    monkeypatch.setattr(checkpoints, "seal", told)
    with pytest.raises(SystemExit) as left:
        train(recipe)
    assert left.value.code == 143
    assert damage(Path(recipe.output) / "translation" / "final") is None
    assert "translation has ended, and the same command goes on with what follows" in capsys.readouterr().err


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(recipe_file, monkeypatch, caplog):
    """Such as one of which another host holds a file open (NFS)."""
    remove = shutil.rmtree

    def refusing(path, ignore_errors=False, **options):
        if Path(path).name == ".checkpoint-2.old" and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        remove(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refusing)
    stage = [f"stages.translation.{said}" for said in ("save_steps=2", "keep_checkpoints=1", "steps=6")]
    trained = train(load_recipe(recipe_file, [*OVERRIDES, *stage]))
    assert set(trained.history) == {"translation", "task"}
    assert "checkpoint-2, which is not needed any more, could not be removed" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of mapped files to look at")
def test_no_file_of_a_checkpoint_stays_mapped(recipe_file):
    """On NFS and Windows a mapped file could not be removed with its checkpoint."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if "best.safe" in line)

    mapped: list[str] = []
    stage = (
        "steps=8",
        "hold_out=3",
        "eval_steps=2",
        "keep=best",
        "save_steps=4",
        "learning_rate=1.0",
        "schedule=constant",
    )
    recipe = load_recipe(recipe_file, [*OVERRIDES, *(f"stages.translation.{said}" for said in stage)])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, [Stop()])
    assert (Path(recipe.output) / "translation" / "checkpoint-4" / "best.safetensors").exists()
    train(recipe, [Look()])
    assert not mapped


def test_an_edited_card_is_kept_and_damage_is_said(recipe_file, monkeypatch, caplog):
    recipe = load_recipe(recipe_file, OVERRIDES)
    train(recipe)
    calls, collate = [], Collator.__call__
    monkeypatch.setattr(Collator, "__call__", lambda self, rows: calls.append(1) or collate(self, rows))
    card = Path(recipe.output) / "model" / "README.md"
    for place in (card, Path(recipe.output) / "translation" / "final" / "README.md"):
        place.write_text("mine\n", encoding="utf-8")
    train(recipe)
    assert card.read_text(encoding="utf-8") == "mine\n" and not calls and not caplog.text
    (Path(recipe.output) / "task" / "final" / "model.safetensors").write_bytes(b"damaged")
    train(recipe)
    assert calls
    assert "final is not as it was written, and is made again: model.safetensors" in caplog.text


def test_the_first_process_says_which_checkpoint_is_gone_on_from(recipe_file, monkeypatch):
    """A disk that one host cannot read would send it alone back to an older one, or into a stage that has ended."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    asked, begun = [], []
    recipe = load_recipe(recipe_file, [*OVERRIDES, "stages.translation.save_steps=2"])
    with pytest.raises(KeyboardInterrupt):
        train(recipe, [Stop()])
    gather = stages.gather_object

    def from_the_first(own):
        if not isinstance(own[0], (Path, bool)):
            return gather(own)
        asked.append(own[0])
        return [None, *own]

    monkeypatch.setattr(stages, "gather_object", from_the_first)
    monkeypatch.setattr(stages.StageTrainer, "run", lambda self, checkpoint: begun.append(checkpoint))
    train(recipe)
    assert asked == [False, False, Path(recipe.output) / "translation" / "checkpoint-2"] and begun == [None, None]


def test_best_weights_are_a_copy(settings):
    """ZeRO-2 shards no weights: on the CPU the best ones were those that go on being trained."""
    model, _ = stages.build(build(Recipe, settings))
    trainer = SimpleNamespace(model=model, sharded=True, keeps_whole=True)
    kept = EngineTrainer.whole_weights(trainer)
    own = {value.data_ptr() for value in model.trained_state_dict().values()}
    assert kept and own.isdisjoint(value.data_ptr() for value in kept.values())
    trainer.keeps_whole = False
    assert EngineTrainer.whole_weights(trainer) == {}


def test_an_edited_card_damages_nothing(recipe_file):
    """Neither for who starts from the model nor for tables and reports."""
    recipe = load_recipe(recipe_file, OVERRIDES)
    train(recipe)
    (Path(recipe.output) / "model" / "README.md").write_text("mine\n", encoding="utf-8")
    assert damage(Path(recipe.output) / "model") is None
    assert initial_file(str(Path(recipe.output) / "model")).name == "model.safetensors"
