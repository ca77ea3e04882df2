"""Tables of the paper over the real pair, on the miniature bases."""

import copy
import json

import pytest
import yaml

from layalign.folders import damage
from layalign.train.demo import driver
from layalign.train.demo.real import fitting, tables
from layalign.train.demo.real.ship_tables import ship_tables
from layalign.train.tables import make


@pytest.fixture(autouse=True)
def small(bases, monkeypatch):
    """Miniature bases and short answers."""
    monkeypatch.setattr(tables, "encoder_folder", lambda cache: bases[0])
    monkeypatch.setattr(tables, "llm_folder", lambda cache: bases[1])
    monkeypatch.setattr(tables, "ANSWER_TOKENS", 3)
    monkeypatch.setattr(tables, "READ_TOKENS", 64)
    real = tables.read_recipe

    def quiet(path, overrides):
        return real(path, ["progress=false"])

    monkeypatch.setattr(tables, "read_recipe", quiet)


def test_rows_are_trained_with_each_seed_and_adapters_fitted_once(tmp_path, monkeypatch):
    """Whoever starts from a translation stage keeps what that stage made of the adapter."""
    trained, fitted = [], []
    train, fit = make.train, fitting.fit_adapter
    monkeypatch.setattr(make, "train", lambda recipe, calls: trained.append(recipe) or train(recipe, calls))
    monkeypatch.setattr(fitting, "fit_adapter", lambda *given: fitted.append(1) or fit(*given))
    output = tmp_path / "tables"
    asked = {"output": output, "tables": [7], "steps": 10, "questions": 1, "batch_size": 4}
    (table,) = tables.real_tables(**asked, seeds=[0, 1])
    assert [(recipe.seed, list(recipe.stages)) for recipe in trained] == [
        (seed, stages) for seed in (0, 1) for stages in (["translation"], ["task"]) * 2
    ]
    assert len(fitted) == 4  # two rows, two seeds
    assert all(recipe.stages["task"].steps == 8 for recipe in trained if "task" in recipe.stages)
    assert all(recipe.llm_input == {"translation": False, "task": True} for recipe in trained)
    for row in table["parts"][0]["rows"]:
        assert list(row["seeds"]) == ["0", "1"] and row["why"] is None
        assert len(row["measured"]) == 13 and set(row["questions"].values()) == {1}
    made = [recipe.output for recipe in trained]
    tables.real_tables(**asked, seeds=[0, 1])
    assert [recipe.output for recipe in trained] == made
    assert "here, 2 seeds" in (output / "tables" / "table_07.md").read_text(encoding="utf-8")
    seeds_of_two_machines_are_one_table(output, table, tmp_path)


def seeds_of_two_machines_are_one_table(output, table, tmp_path):
    """In the report, which is replaced where the budget was another."""
    measured = output / "tables" / "table_07.json"
    for seed in ("0", "1"):
        part = copy.deepcopy(table)
        for row in part["parts"][0]["rows"]:
            row["seeds"] = {seed: row["seeds"][seed]}
        measured.write_text(json.dumps(part))
        report = ship_tables(output, tmp_path / "report")
    assert damage(report) is None
    told = json.loads((report / "table_07.json").read_text())
    for row, whole in zip(told["parts"][0]["rows"], table["parts"][0]["rows"], strict=True):
        assert (
            row["measured"] == whole["measured"]
            and row["spread"] == whole["spread"]
            and list(row["seeds"]) == ["0", "1"]
        )
    page = (report / "README.md").read_text(encoding="utf-8")
    assert "here, 2 seeds" in page and "10 steps of batch 4 a row" in page
    assert "--steps 10 --questions 1 --batch-size 4 --learning-rate 0.002\n" in page
    assert not [file for file in report.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    with pytest.raises(ValueError, match=r"no plan\.json of the real pair's tables"):
        ship_tables(tmp_path / "nowhere", report)
    arguments = driver.kept(output / "plan.json")["arguments"]
    driver.keep(output / "plan.json", {"arguments": arguments | {"steps": 99}})
    (report / "README.md").write_text("a word corrected\n", encoding="utf-8")
    driver.keep(output / "plan.json", {"arguments": arguments})
    told = json.loads((ship_tables(output, report) / "table_07.json").read_text())
    assert list(told["parts"][0]["rows"][0]["seeds"]) == ["0", "1"]
    for name in ("table_07.json", "arguments.json"):
        whole = (report / name).read_bytes()
        (report / name).write_bytes(whole + b" ")
        with pytest.raises(ValueError, match=f"report: {name} .*; seeds of other machines are there alone"):
            ship_tables(output, report)
        (report / name).write_bytes(whole)
    driver.keep(output / "plan.json", {"arguments": arguments | {"steps": 99}})
    told = json.loads((ship_tables(output, report) / "table_07.json").read_text())
    assert list(told["parts"][0]["rows"][0]["seeds"]) == ["1"]


def test_what_the_rows_are_settings_over(tmp_path, bases):
    arguments = {"steps": 10, "questions": 2, "data": None, "batch_size": 4, "learning_rate": 1e-3}
    recipe, problems = tables._prepared(tmp_path, arguments, tuple(map(str, bases)))
    values = yaml.safe_load(recipe.read_text())
    assert values["llm_input"] == {"translation": False, "task": True}
    assert {name: stage["steps"] for name, stage in values["stages"].items()} == {"translation": 2, "task": 8}
    assert {(stage["batch_size"], stage["learning_rate"]) for stage in values["stages"].values()} == {(4, 1e-3)}
    assert values["stages"]["task"]["prompt"] == "Question: {source}\nAnswer:"
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20 and len({row["lang"] for row in rows}) == 10
    assert len((tmp_path / "data" / "task.jsonl").read_text(encoding="utf-8").splitlines()) == 8 * 4


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as ended:
            tables.main(["--output", str(tmp_path / "out"), *map(str, words)])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "steps: got 1, takes a whole number of at least 2" in refused("--steps", 1)
    assert "questions: got 0" in refused("--questions", 0)
    assert "batch_size: got 0" in refused("--batch-size", 0)
    assert "learning_rate: got 0.0, takes" in refused("--learning-rate", 0)
    assert "17" in refused("--tables", 17)
    assert "nothere is not a folder" in refused("--data", tmp_path / "nothere")
    assert "seeds" in refused("--seeds", 1, 1)
    assert "table 3 is not over MGSM alone" in refused("--tables", 4, 3)
    assert not (tmp_path / "out").exists()


def test_a_folder_has_one_budget(tmp_path):
    tables.real_tables(tmp_path / "out", tables=[], steps=10, batch_size=4)
    with pytest.raises(ValueError, match="steps 10 there, 11 here"):
        tables.real_tables(tmp_path / "out", tables=[], steps=11, batch_size=4)
