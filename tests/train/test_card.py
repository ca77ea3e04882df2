"""What a trained model's card says of its stages, of what they left behind."""

import json

from layalign.train.card import HISTORY, LANGUAGES, stage_facts
from layalign.train.recipe import Recipe
from layalign.train.settings import build


def facts(bases, tmp_path, history=(), languages=(), **stage):
    final = tmp_path / "run" / "task" / "final"
    final.mkdir(parents=True, exist_ok=True)
    (final / HISTORY).write_text(json.dumps(list(history)))
    (final / LANGUAGES).write_text(json.dumps(list(languages)))
    values = {**bases, "output": str(tmp_path / "run")}
    values |= {"llm_input": {"task": False}, "data_root": str(tmp_path)}
    records = {"records": [{"source": "moja", "target": "one", "lang": "sw"}]}
    (found,) = stage_facts(build(Recipe, values | {"stages": {"task": {"data": records, "steps": 4} | stage}}))
    return found


def test_the_best_weights_are_called_that(bases, tmp_path):
    history = [{"step": 2, "eval_loss": 1.5}, {"step": 4, "loss": 0.5}, {"step": 4, "eval_loss": 2.5}]
    given = {"history": history, "hold_out": 1, "eval_steps": 2}
    settings = facts(bases, tmp_path, keep="best", **given).settings
    assert settings["weights"] == "the best, of step 2: held-out loss 1.5000"
    assert settings["held-out loss at the end"] == "2.5000"
    assert facts(bases, tmp_path, **given).settings["weights"] is None
    broken = given | {"history": [{"step": 1, "eval_loss": float("nan")}, *history]}
    assert facts(bases, tmp_path, keep="best", **broken).settings["weights"] == settings["weights"]


def test_a_folder_below_the_data_is_no_dataset_of_the_hub(bases, tmp_path):
    """And is called by its last name alone."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "corpus").mkdir()
    found = facts(bases, tmp_path, data={"format": "dataset", "path": "private/corpus"})
    assert found.datasets == [] and found.data == ["`corpus` (dataset), train"]
    found = facts(bases, tmp_path, data={"format": "dataset", "path": "some/corpus"})
    assert found.datasets == ["some/corpus"] and found.data == ["`some/corpus` (dataset), train"]
    found = facts(bases, tmp_path, data={"format": "dataset", "path": "some/{lang}", "languages": ["sw", "de"]})
    assert found.datasets == ["some/sw", "some/de"]


def test_languages_that_none_was_drawn_of_are_left_out(bases, tmp_path):
    found = facts(bases, tmp_path, languages=["de", "fr", "sw", "unknown"], mixing={"sw": 1, "de": 1, "fr": 0})
    assert found.languages == ["de", "sw"]
