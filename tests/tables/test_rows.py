"""Every row of every table: it builds, trains a step and is evaluated; rows share what they have in common."""

import gc
import json
import time
from collections import Counter

import pytest
import torch
import yaml
from safetensors.torch import load_file

from layalign.folders import damage
from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stages import train
from layalign.train.tables import make, runs
from layalign.train.tables.rows import merged, row_values, third
from layalign.train.tables.runs import entries, training_of
from layalign.train.tables.table import COUNTED, WORDS, load_table, table_numbers
from tests.tables.conftest import recipe_values


@pytest.fixture
def quick(monkeypatch):
    """Without plots, and without a look through all that the tests' process has imported at the end of each training."""
    for plot in ("layalign.evaluation.report.plot_accuracy", "layalign.train.tables.figure.save_figure"):
        monkeypatch.setattr(plot, lambda *arguments, **options: None)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_every_row_is_trained_a_step_and_evaluated(sources, asking, quick, monkeypatch):
    """In one folder, so that what tables share is made once."""
    trained = []
    whole = make.train
    monkeypatch.setattr(make, "train", lambda recipe, callbacks: trained.append(recipe) or whole(recipe, callbacks))
    started = time.process_time()
    tables = {number: load_table(number) for number in table_numbers()}
    results = {number: make.make_table(table, sources, asking, progress=False) for number, table in tables.items()}
    seconds = time.process_time() - started
    print(f"{len(trained)} trainings, {seconds:.0f} processor seconds")
    # The translation stages apart from the others, and nothing twice.
    assert len({recipe.output for recipe in trained}) == len(trained)
    assert all(len(recipe.stages) == 1 for recipe in trained)
    for number, result in results.items():
        # Table 1 says in words what rows are made of, and has no accuracy.
        assert (sources.output / f"table_{number:02}.csv").is_file() == (number != 1)
        for part, shown in zip(tables[number].parts, result["parts"], strict=True):
            assert [row["name"] for row in shown["rows"]] == [row.name for row in tables[number].rows]
            for row in shown["rows"]:
                assert row["why"] is None, row
                assert number == 1 or (row["trained_millions"] > 0) == ("folder" in row)
                for column, value in zip(part.columns, row["measured"], strict=True):
                    if column in WORDS:
                        assert value
                    elif column in COUNTED:
                        assert value >= 0
                    elif column in ("avg", "sw", "en"):
                        assert 0 <= value <= 100, (number, row["name"], column)
                    else:  # a language of which there was a question, or not
                        assert value is None or column in row["questions"] or column in ("lrl", "hrl")
    shown = {number: {row["name"]: row for row in result["parts"][0]["rows"]} for number, result in results.items()}
    layalign = {number: rows["LayAlign"]["folder"] for number, rows in shown.items() if "LayAlign" in rows}
    assert len({layalign[number] for number in (2, 4, 7, 8, 9, 10, 11, 15)}) == 1
    assert layalign[3] == layalign[12] and layalign[6] == layalign[16]
    assert shown[5]["mT5-xl"]["folder"] == layalign[2] == shown[14]["mT5-xl"]["folder"]
    assert shown[4]["w/o Layer-Wise Aligner"]["folder"] == shown[2]["MindMerger"]["folder"]
    assert shown[7]["LayAlign-LR"]["folder"] == shown[11]["Last Hidden States"]["folder"]
    again = len(trained)
    assert make.make_table(tables[15], sources, asking, progress=False) == results[15]
    assert len(trained) == again


def test_rows_share_their_translation_stage(sources):
    found = {entry.row.name: entry.training for entry in entries(load_table(4), sources)}
    stage = found["w/o Task Stage"].key
    assert found["LayAlign"].after.key == found["w/o LLM Input"].after.key == stage
    assert found["w/o Translation Stage"].after is None
    assert found["MetaMath"] is None
    others = {found[name].after.key for name in ("w/o Adapter", "w/o Layer-Wise Aligner")}
    assert len(others | {stage}) == 3
    english = {entry.row.name: entry.training for entry in entries(load_table(6), sources)}
    assert english["LayAlign"].after.key == stage != english["LangBridge"].after.key


def test_a_shared_stage_gives_what_one_run_of_both_stages_gives(sources, tmp_path):
    (entry,) = entries(load_table(4), sources, ["LayAlign"])
    for training in entry.training.in_order():
        make.make(training)
    values = row_values(entry.row, entry.part, sources) | {"output": str(tmp_path / "both")}
    train(build(Recipe, values))
    both = load_file(tmp_path / "both" / "model" / "model.safetensors")
    shared = load_file(entry.training.folder / "model" / "model.safetensors")
    assert both.keys() == shared.keys()
    for name, value in both.items():
        assert torch.equal(value, shared[name]), name


def test_what_is_whole_is_not_made_again(sources, asking, quick, monkeypatch):
    """Stopped while the second row trains; the first one's files are as they were, and the figures those of an uninterrupted call."""
    table, rows = load_table(7), ["LayAlign-LR", "LayAlign"]
    seen = []

    def stopping(recipe, callbacks):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(recipe.output)
        return train(recipe, callbacks)

    monkeypatch.setattr(make, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        make.make_table(table, sources, asking, rows, progress=False)
    first = [*(sources.output / "trained").rglob("*.safetensors"), *(sources.output / "evaluations").rglob("*.json*")]
    times = {file: file.stat().st_mtime_ns for file in first if file.name != "results.json"}
    assert len(seen) == 2 and any(file.name == "records.jsonl" for file in times)
    monkeypatch.setattr(make, "train", lambda recipe, callbacks: seen.append(recipe.output) or train(recipe, callbacks))
    result = make.make_table(table, sources, asking, rows, progress=False)
    assert len(seen) == len(set(seen)) == 4
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert json.loads((sources.output / "table_07.json").read_text()) == json.loads(json.dumps(result))
    text = (sources.output / "table_07.md").read_text()
    assert Counter(line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| "))["here"] == 2
    said = "3 questions of problems.jsonl in place of mgsm, the official scorer; over math.yaml, at most 1 a language."
    assert f"here: {said}" in text


def test_a_damaged_training_is_made_again(sources, asking, quick):
    table = load_table(8)
    make.make_table(table, sources, asking, ["LayAlign"], progress=False)
    (entry,) = entries(table, sources, ["LayAlign"])
    model = entry.training.folder / "model"
    (model / "config.json").write_text("{}")
    assert damage(model) is not None
    make.make_table(table, sources, asking, ["LayAlign"], progress=False)
    assert damage(model) is None


def test_what_cannot_be_had_is_shown_as_published(sources, asking, tmp_path):
    absent = {**sources.bases, "Mathoctopus/Parallel_xRFT_7B": str(tmp_path / "absent")}
    sources = make.Sources(output=sources.output, recipes=sources.recipes, bases=absent)
    result = make.make_table(load_table(2), sources, asking, ["MathOctopus"], progress=False)
    rows = {row["name"]: row for row in result["parts"][0]["rows"]}
    assert rows["MathOctopus"]["measured"] is None
    assert "--base Mathoctopus/Parallel_xRFT_7B=FOLDER says where it is" in rows["MathOctopus"]["why"]
    assert rows["MathOctopus"]["published"][0] == 40.0
    assert rows["LayAlign"]["why"] == "not asked for"
    assert "- MathOctopus: as published only;" in (sources.output / "table_02.md").read_text()


def test_a_recipe_that_nobody_gave_and_that_is_not_here_is_said(sources, monkeypatch):
    """LangBridge-EN's is the paper's then, whose bases and data are on the hub; nothing is asked for there here."""
    here = runs.read_config

    def without_hub(path, role, **rest):
        if path.startswith(("DKYoon/", "meta-math/")):
            raise ValueError(
                f"{role} {path!r} is neither a folder with a config.json nor a model that can be fetched: no network"
            )
        return here(path, role, **rest)

    monkeypatch.setattr(runs, "read_config", without_hub)
    own = make.Sources(output=sources.output, recipes={"math": sources.recipes["math"]}, bases=sources.bases)
    found = {entry.row.name: entry.missing for entry in entries(load_table(2), own)}
    said = found.pop("LangBridge-EN")
    assert said.startswith(
        "the recipe langbridge_english is the paper's: encoder 'DKYoon/mt5-xl-lm-adapt' is neither a folder"
    )
    assert said.endswith("--recipe langbridge_english=RECIPE gives another")
    assert set(found.values()) == {None}


def test_what_is_read_beside_the_encoder(sources):
    """The recipe's prompt, where it has none the published one; nothing where the row's LLM reads nothing."""
    asked = {entry.row.name: entry.prompt for entry in entries(load_table(4), sources)}
    recipes_own = "{text} Answer:"
    assert {name for name, prompt in asked.items() if prompt == recipes_own} == {"w/o Task Stage", "MetaMath"}
    assert set(asked.values()) == {recipes_own, "default"}
    found = {(entry.part.name, entry.row.name): entry.recipe for entry in entries(load_table(9), sources)}
    for (part, row), recipe in found.items():
        translation, task = recipe.stages["translation"], recipe.stages["task"]
        told = row == "LayAlign + LLM Input at Trans"
        assert (translation.prompt is not None) == recipe.llm_input["translation"] == told
        assert recipe.llm_input["task"] == (row != "LayAlign - LLM Input at Task")
        if told:
            assert (
                "Translate the following sentences from {language} to English.\n### Input:\n{source}"
                in translation.prompt
            )
        if recipe.llm_input["task"]:
            english = part == "English Task Data"
            assert task.prompt.startswith("Below is an instruction" if english else "{source} Answer:")
    alone = {entry.row.name: entry for entry in entries(load_table(2), sources)}
    assert alone["MetaMath-Mul"].prompt == alone["Translate"].prompt == recipes_own


OTHERS = {"adapter_width": 8, "aligner_width": 8, "encoder_layers": [0, 1]}
PARTS = ["adapter", "aligner", "gates"]


@pytest.mark.parametrize(
    ("number", "row", "settings", "parts"),
    [
        (4, "LayAlign", OTHERS, PARTS),
        (4, "w/o Adapter", {"aligner_width": 8, "encoder_layers": [0, 1], "adapter": None}, PARTS[1:]),
        (4, "w/o Layer-Wise Aligner", {"adapter_width": 8, "aligner": None}, PARTS[:1]),
        (7, "LayAlign-LR", {"adapter_width": 8, "aligner_width": 8, "encoder_states": "last"}, PARTS),
        (2, "MetaMath-Mul", {"adapter": None, "aligner": None}, None),
        (10, "MindMerger+", {"adapter_width": 384, "aligner": None}, PARTS[:1]),
    ],
)
def test_a_recipes_own_settings_stay_where_a_row_has_a_place_for_them(number, row, settings, parts, bases, tmp_path):
    """What the recipe says of a part that the row has not would be refused."""
    values = merged(recipe_values("math"), {"model": OTHERS, "train_encoder": True})
    for stage in values["stages"].values():
        stage["train"] = PARTS
    values["stages"]["task"] |= {"train": [*PARTS, "encoder"], "encoder_learning_rate": 1e-4}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    own = make.Sources(output=tmp_path, recipes=dict.fromkeys(load_table(number).recipes, str(file)), bases=bases)
    (entry, *_) = entries(load_table(number), own, [row])
    assert entry.recipe.model == settings
    encoder = [] if entry.recipe.encoder is None else ["encoder"]
    trained = {"translation": parts, "task": parts and [*parts, *encoder]}
    assert {name: stage.train for name, stage in entry.recipe.stages.items()} == {
        name: trained[name] for name in entry.recipe.stages
    }
    assert entry.missing is None


def test_thirds_of_the_states():
    assert [third(which, "layalign:tiny_encoder") for which in ("first third", "middle third", "last third")] == [
        [0],
        [1, 2],
        [3],
    ]


def test_settings_are_merged():
    values = {"model": {"gate": "head", "aligner": "mlp"}, "seed": 1}
    assert merged(values, {"model": {"aligner": None}, "encoder": None}) == {
        "model": {"gate": "head", "aligner": None},
        "seed": 1,
        "encoder": None,
    }
    assert values == {"model": {"gate": "head", "aligner": "mlp"}, "seed": 1}


def test_lora_and_the_llm_are_trained_where_the_recipe_says(tmp_path):
    """Of the translation stage they are no part by default, so that rows with and without share it; where they are, they are kept."""
    plain = recipe_values("math")
    before = training_of(plain, tmp_path).after.key
    with_lora = {**plain, "lora": {"rank": 2}}
    assert training_of(with_lora, tmp_path).after.key == before
    assert training_of({**plain, "train_llm": True}, tmp_path).after.key == before
    both = merged(with_lora, {"stages": {"translation": {"train": ["adapter", "lora"]}}})
    assert training_of(both, tmp_path).after.recipe.lora == training_of(both, tmp_path).recipe.lora
    whole = merged({**plain, "train_llm": True}, {"stages": {"translation": {"train": ["adapter", "llm"]}}})
    assert training_of(whole, tmp_path).after is None
    assert list(training_of(whole, tmp_path).recipe.stages) == ["translation", "task"]


def test_what_changes_no_number_makes_no_new_run(tmp_path):
    plain = recipe_values("math")
    key = training_of(plain, tmp_path).key
    assert training_of({**plain, "progress": True, "parallel": "none"}, tmp_path / "elsewhere").key == key
    assert training_of({**plain, "seed": 1}, tmp_path).key != key
    assert training_of({**plain, "data_root": "other"}, tmp_path).key == key


def made_over(values, tmp_path, number, *names):
    """{row: its entry} over a recipe."""
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    own = make.Sources(output=tmp_path / "tables", recipes=dict.fromkeys(load_table(number).recipes, str(file)))
    return {entry.row.name: entry for entry in entries(load_table(number), own, list(names) or None)}


def test_a_row_begins_with_nothing_that_is_not_its_own(tmp_path):
    """A recipe that starts from a translation stage's part: without that stage the row were LayAlign's own run, and others have no use
    for the part."""
    values = recipe_values("math")
    del values["stages"]["translation"]
    found = made_over({**values, "init_from": "warm"}, tmp_path, 4)
    assert found["LayAlign"].training.recipe.init_from.path == "warm"
    assert found["w/o LLM Input"].training.recipe.init_from.path == "warm"
    assert found["w/o Translation Stage"].training.recipe.init_from is None
    assert found["w/o Translation Stage"].training.key != found["LayAlign"].training.key
    for name in ("w/o Adapter", "w/o Layer-Wise Aligner"):
        assert "init_from: what the recipe begins with is trained under other settings" in found[name].missing


@pytest.mark.parametrize("beside", [{"lora": {"rank": 2}}, {"train_encoder": "embeddings"}, {"train_llm": True}])
def test_the_translation_stage_alone_is_that_of_the_whole_row(beside, tmp_path):
    """What that stage does not train is no part of it."""
    found = made_over(recipe_values("math") | beside, tmp_path, 4, "LayAlign", "w/o Task Stage")
    assert found["w/o Task Stage"].missing is None
    assert found["w/o Task Stage"].training.key == found["LayAlign"].training.after.key


def test_an_llm_that_is_trained_as_a_whole_has_no_lora(tmp_path, bases):
    found = made_over(recipe_values("math") | {"lora": {"rank": 2}}, tmp_path, 2, "MetaMath-Mul")
    assert found["MetaMath-Mul"].missing is None and found["MetaMath-Mul"].recipe.lora is None


def test_one_row_that_cannot_be_made_stops_no_other(sources, asking, quick, monkeypatch, capsys):
    def failing(recipe, callbacks):
        if recipe.model.get("encoder_states") == "last":
            raise ValueError("the loss is nan\nand so on")
        return train(recipe, callbacks)

    monkeypatch.setattr(make, "train", failing)
    with pytest.raises(ValueError, match="the loss is nan"):
        make.make_table(load_table(7), sources, asking, progress=False)
    rows = {row["name"]: row for row in json.loads((sources.output / "table_07.json").read_text())["parts"][0]["rows"]}
    assert rows["LayAlign-LR"]["measured"] is None
    assert rows["LayAlign-LR"]["why"] == "it could not be made: the loss is nan"
    assert rows["LayAlign"]["measured"] is not None
    assert "table 7: LayAlign-LR, MGSM: the loss is nan" in capsys.readouterr().err


def test_a_base_is_looked_for_once(sources, monkeypatch):
    """Without a network each look takes half a minute, and a row is looked at again after every other one."""
    looked = []
    monkeypatch.setattr(runs, "read_config", lambda place, role: looked.append(place))
    for _ in range(3):
        list(entries(load_table(2), sources))
    assert looked and len(looked) == len(set(looked))
