"""`layalign train --plan`: what it says of the data, against what training reads."""

import pytest

from layalign.train import stages
from layalign.train.loaders import order_of
from layalign.train.plan.plan import make_plan
from layalign.train.plan.text import plan_text
from layalign.train.recipe import Recipe
from layalign.train.settings import build


def test_tokens_are_those_that_training_reads(settings):
    recipe = build(Recipe, settings)
    plan = make_plan(recipe)
    _, processor = stages.build(recipe)
    for name in recipe.stages:
        data = stages.read_stage_data(name, recipe, processor).train
        assert plan["stages"][name]["tokens_an_epoch"] == {
            "encoder": len(data.questions.ids),
            "llm": len(data.texts.ids),
            "sampled": False,
        }


def test_many_records_are_sampled(settings, monkeypatch):
    """Records counted, tokens of some of them: here all records are alike, so that any sample tells the truth."""
    monkeypatch.setattr("layalign.train.plan.sample.SAMPLE", 5)
    record = {"source": "moja mbili", "target": "one two", "lang": "sw"}
    others = [record | {"lang": "de"}] * 100
    settings["stages"]["task"] |= {
        "data": {"records": [record] * 300 + others},
        "mixing": {"de": 1, "sw": 0},
        "hold_out": 0,
    }
    settings["stages"]["translation"]["data"] = {"records": [record] * 300}
    plan = make_plan(build(Recipe, settings))
    translation, task = plan["stages"]["translation"], plan["stages"]["task"]
    # </s> is read by the encoder, and </s> written by the LLM.
    assert translation["tokens_an_epoch"] == {"encoder": 900, "llm": 900, "sampled": True}
    assert (translation["examples"], task["examples"]) == (300, 100)
    assert "about 900 of the encoder" in plan_text(plan)


@pytest.mark.parametrize("weights", [{"temperature": 0}, {"sw": 1, "de": 0}, {"sw": 0, "de": 1}, {"sw": 1, "de": 8}])
def test_what_is_planned_of_mixed_languages_is_what_is_read(settings, monkeypatch, weights):
    """The tokens of an epoch, and its longest batch: long records of one language, behind many short ones of the other."""
    monkeypatch.setattr("layalign.train.plan.sample.SAMPLE", 40)
    short, long = (
        {"source": " ".join(["moja"] * n), "target": "one", "lang": lang} for n, lang in ((2, "sw"), (9, "de"))
    )
    settings["stages"]["task"] |= {"data": {"records": [short] * 90 + [long] * 10}, "mixing": weights, "hold_out": 0}
    recipe = build(Recipe, settings)
    plan = make_plan(recipe)["stages"]["task"]
    _, processor = stages.build(recipe)
    data = stages.read_stage_data("task", recipe, processor).train
    order = list(order_of(recipe.stages["task"], data, (0,)))
    assert plan["examples"] == int(data.mixture.counts.sum())
    assert plan["tokens_an_epoch"]["encoder"] == pytest.approx(data.questions.lengths()[order].sum(), rel=0.1)
    assert plan["tokens_an_epoch"]["sampled"] == (weights != {"sw": 0, "de": 1})
    assert plan["longest_batch"]["encoder"] == max(data.questions.lengths()[order])


def test_records_held_out_are_not_the_last_of_the_plan(settings):
    """Short ones first, sorted: the mean of those that are left is that of training."""
    records = [{"source": " ".join(["moja"] * (1 + n // 8)), "target": "one", "lang": "sw"} for n in range(64)]
    settings["stages"]["task"] |= {"data": {"records": records}, "hold_out": 40}
    recipe = build(Recipe, settings)
    data = stages.read_stage_data("task", recipe, stages.build(recipe)[1]).train
    assert make_plan(recipe)["stages"]["task"]["tokens_an_epoch"] == {
        "encoder": int(data.questions.lengths().sum()),
        "llm": int(data.texts.lengths().sum()),
        "sampled": False,
    }


@pytest.mark.parametrize("changes", [{}, {"length_grouped": True}, {"packing": True}])
def test_the_longest_batch_is_of_the_longest_records(settings, monkeypatch, changes):
    """Two of 300, which a sample of 20 does not hold; packed, one of them among others."""
    monkeypatch.setattr("layalign.train.plan.sample.SAMPLE", 20)
    records = [{"source": "moja", "target": "one", "lang": "sw"} for _ in range(300)]
    for place in (123, 256):
        records[place] = {"source": " ".join(["moja"] * 9), "target": " ".join(["one"] * 9), "lang": "sw"}
    settings["stages"]["task"] |= {"data": {"records": records}, "hold_out": 0, "batch_size": 2, **changes}
    planned = make_plan(build(Recipe, settings))["stages"]["task"]["longest_batch"]
    assert planned == {
        "rows": 2,
        "encoder": 6 if "packing" in changes else 10,  # with </s>
        "llm": 13 if "packing" in changes else 21,  # prompt and question, too
    }


def test_data_that_cannot_be_read_are_a_note(settings, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"source": "moja"\n')
    settings["stages"]["task"]["data"] = {"format": "jsonl", "path": str(broken)}
    settings["stages"]["translation"]["hold_out"] = 10
    plan = make_plan(build(Recipe, settings))
    assert any("broken.jsonl:1: not JSON" in note for note in plan["notes"])
    assert any("hold_out 10 of 10 records leave none" in note for note in plan["notes"])
    assert plan["stages"]["task"]["examples"] is None
    assert plan["stages"]["task"]["steps"] == 6
    assert plan_text(plan)
