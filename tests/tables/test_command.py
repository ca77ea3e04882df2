"""`layalign table`: what it lists, plans, writes and refuses, and that it goes on after it was killed."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from layalign.cli import app
from layalign.folders import damage
from layalign.train.recipe import load_recipe
from layalign.train.stages import train
from layalign.train.tables import make
from layalign.train.tables.runs import Sources, entries
from layalign.train.tables.table import load_table
from layalign.train.tables.text import table_text


def printed(*words):
    result = CliRunner().invoke(app, ["table", *map(str, words)])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    return result.output


def test_sixteen_tables_are_listed():
    lines = printed("--list").splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, 17))
    assert lines[3] == " 4  Ablations (section 4.3; 7 rows; mgsm; over math)"
    assert "over math, math_english" in lines[8]


WRONG = [
    ([], "table: got no number; `layalign table --list` names them"),
    (["99"], "table: got 99, takes 1 to 16"),
    (["4", "--json"], "--json goes with --plan"),
    (["9", "-r", "mine.yaml"], "rows of this table are over math and math_english; takes math=mine.yaml and the like"),
    (["4", "-r", "xnli=mine.yaml"], "--recipe: got 'xnli=mine.yaml'; rows of this table are over math"),
    (["4", "--plan", "-r", "absent.yaml"], "absent.yaml: no such recipe file"),
    (["4", "--plan", "--row", "w/o Gate"], "rows: table 4 has no 'w/o Gate'; it has w/o Adapter, w/o LLM Input,"),
    (["4", "--plan", "--base", "google/mt5-xl"], "--base: got 'google/mt5-xl', takes NAME=VALUE"),
    (["4", "--plan", "--base", "mine=folder"], "--base: got 'mine' for table 4; its rows name none"),
    (
        ["5", "--plan", "--base", "mine=folder"],
        "for table 5; its rows name ai-forever/mGPT, facebook/nllb-200-3.3B, face",
    ),
    (
        ["4", "--plan", "-r", "a.yaml", "-r", "b.yaml"],
        "--recipe: got 'a.yaml' and 'b.yaml' for math, takes one of them",
    ),
    (["4", "--plan", "--write-recipes"], "--write-recipes goes with training, not with --plan"),
    (["4", "--plan", "seeds=1"], "seeds: unknown setting; did you mean 'seed'?"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ValueError) as caught:
        printed(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "mgsm=absent.jsonl"], "absent.jsonl: no such file"),
        (["--task", "mgms={problems}"], "--task: got 'mgms'; rows of table 7 are asked mgsm"),
        (["--task", "msvamp={problems}"], "--task: got 'msvamp'; rows of table 7 are asked mgsm"),
        (["--task", "mgsm={problems}", "--languages", "xx"], "languages: xx not in"),
        (["--task", "mgsm={problems}", "--dtype", "int4"], "dtype: got 'int4'"),
        (["--task", "mgsm={problems}", "--device", "gpu"], "device: got 'gpu'"),
        (["--data", "absent"], "absent"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_trained(words, message, sources, recipes, asking):
    words = [word.format(problems=asking.tasks["mgsm"]) for word in words]
    with pytest.raises(ValueError, match=message):
        printed(7, "-r", recipes["math"], "-o", sources.output, *words)
    assert not sources.output.exists()


def test_a_row_is_known_by_what_its_files_hold(recipes, asking, tmp_path, monkeypatch):
    """Not by where they lie: data and problems that moved change nothing, others are trained on and asked anew."""
    trained, here = [], make.train
    monkeypatch.setattr(make, "train", lambda recipe, calls: trained.append(recipe.output) or here(recipe, calls))
    values = yaml.safe_load(Path(recipes["math"]).read_text())
    data, problems = tmp_path / "data", tmp_path / "problems.jsonl"
    data.mkdir()
    records = values["stages"]["task"]["data"]["records"]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (data / "train.jsonl").write_text(lines)
    problems.write_text(Path(asking.tasks["mgsm"]).read_text())
    for stage in values["stages"].values():
        stage["data"] = {"format": "jsonl", "path": "train.jsonl"}

    def table(data, problems):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"data_root": str(data)}))
        words = (7, "-r", tmp_path / "recipe.yaml", "-o", tmp_path / "tables", "--task", f"mgsm={problems}")
        printed(*words, "--row", "LayAlign", "--max-new-tokens", 2, "--device", "cpu")
        return len(trained), len(list((tmp_path / "tables" / "evaluations").iterdir()))

    assert table(data, problems) == (2, 1)
    data = data.rename(tmp_path / "moved")
    problems = problems.rename(data / "problems.jsonl")
    assert table(data, problems) == (2, 1)
    problems.write_text(problems.read_text().replace("4 pens", "9 pens"))
    assert table(data, problems) == (2, 2)
    (data / "train.jsonl").write_text(lines * 2)
    assert table(data, problems) == (4, 3)
    for folder in (tmp_path / "tables" / "trained").glob("translation-*"):
        shutil.rmtree(folder)
    assert table(data, problems) == (4, 3)


def test_what_a_rows_settings_do_not_fit_is_named(recipes):
    text = printed(4, "--plan", "-r", recipes["langbridge_english"], "--row", "w/o Task Stage")
    said = f"its settings do not fit {recipes['langbridge_english']}: stages: the row is of the translation stage"
    assert f"w/o Task Stage, MGSM: as published only; {said}, which the recipe has not" in text


def test_a_folder_of_something_else_is_left_alone(recipes, asking, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no tables of the paper"):
        make.make_table(load_table(7), Sources(output=tmp_path, recipes=recipes), asking, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_processes_are_told_what_to_do(recipes, asking, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--write-recipes writes its trainings"):
        make.make_table(load_table(7), Sources(output=tmp_path, recipes=recipes), asking, progress=False)


def test_the_plan_counts_each_training_once_and_none_that_is_done(sources, recipes):
    words = (7, "--plan", "--json", "-r", recipes["math"], "-o", sources.output)
    plan = json.loads(printed(*words))
    assert [line["run"].partition("-")[0] for line in plan["trainings"]] == ["translation", "task"] * 2
    assert plan["seconds"] == pytest.approx(sum(line["plan"]["seconds"] for line in plan["trainings"]))
    assert not sources.output.exists()
    (entry,) = entries(load_table(7), sources, ["LayAlign"])
    make.make(entry.training.after)
    left = json.loads(printed(*words))
    assert [line["whole"] for line in left["trainings"]] == [False, False, True, False]
    assert left["seconds"] < plan["seconds"]
    text = printed(7, "--plan", "-r", recipes["math"], "-o", sources.output)
    assert f"  {entry.training.after.key}: done" in text
    assert "1 steps of 2" in text and "to be trained: about" in text


def test_a_plan_without_bases_says_so(recipes, tmp_path):
    words = (5, "--plan", "-r", recipes["math"], "--base", f"facebook/xglm-1.7B={tmp_path / 'absent'}", "--row", "XGLM")
    text = printed(*words, "-o", tmp_path / "tables")
    assert "XGLM, MGSM: as published only;" in text
    assert "nothing is left to train" in text


def test_written_recipes_are_what_is_trained(sources, recipes):
    """Trained by themselves, as torchrun does it, they are what the command finds done."""
    lines = printed(8, "--write-recipes", "-r", recipes["math"], "-o", sources.output, "--row", "LayAlign").splitlines()
    files = [line.split()[-1] for line in lines]
    assert all(line.startswith("torchrun ") for line in lines)
    (entry,) = entries(load_table(8), sources, ["LayAlign"])
    assert [yaml.safe_load(Path(file).read_text())["output"] for file in files] == [
        str(training.folder) for training in entry.training.in_order()
    ]
    for file in files:
        train(load_recipe(file))
    assert all(damage(training.folder / "model") is None for training in entry.training.in_order())
    before = (entry.training.folder / "model" / "manifest.json").read_bytes()
    make.make(entry.training)
    assert (entry.training.folder / "model" / "manifest.json").read_bytes() == before


def test_a_killed_command_goes_on(forks, recipes, asking, tmp_path):
    """Killed when the first row has been asked: what was whole then stays as it was, and the rest is made."""
    output = tmp_path / "tables"
    words = [
        "-m",
        "layalign",
        "table",
        "8",
        "-r",
        recipes["math"],
        "-o",
        output,
        "--task",
        f"mgsm={asking.tasks['mgsm']}",
    ]
    words += ["--max-new-tokens", "2", "--device", "cpu"]
    fork = forks.start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while not list(output.glob("evaluations/*/results.json")):
        assert time.monotonic() < ends
        time.sleep(0.02)
    fork.send_signal(signal.SIGKILL)
    fork.wait()
    assert len(list(output.glob("evaluations/*/results.json"))) == 1
    trained = [folder for folder in output.glob("trained/*") if damage(folder / "model") is None]
    whole = [file for folder in trained for file in folder.rglob("*") if file.suffix == ".safetensors"]
    whole += output.glob("evaluations/*/records.jsonl")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in whole}
    assert len(trained) >= 2
    done = forks.run(words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    assert len(list(output.glob("trained/*/model/manifest.json"))) == 4
    assert "| LayAlign (Dgate) | paper | 58.8 |" in done.stdout
    result = json.loads((output / "table_08.json").read_text())
    assert table_text(result) == (output / "table_08.md").read_text()
    assert all(row["measured"] is not None for row in result["parts"][0]["rows"])
