"""The second experiment with the real pair, on the miniature bases."""

import copy
import json
import re
import shutil

import pytest

from layalign.folders import damage
from layalign.train.demo import driver
from layalign.train.demo.driver import Run
from layalign.train.demo.real import evaluation, experiment, further, further_data, pairs
from layalign.train.demo.real.decontaminate import benchmark_texts
from layalign.train.demo.real.export import ship, ship_translations
from layalign.train.demo.real.further import Further, FurtherSettings, run_further
from layalign.train.demo.report import best_run, joined
from layalign.train.demo.systems import SYSTEMS

SMALL = {"translation_steps": 3, "task_steps": 3, "questions": 2, "benchmark_questions": 2, "sentences": 2}
PEOPLE = [
    # Two steps, which are taken; a fraction, a third step, a number too large, a result that is not the answer, no step.
    ("Tom has 3 hats. He buys 2, and then as many as he has.", "3+2=<<3+2=5>>5 and\n5*2=<<5*2=10>>10\n#### 10"),
    ("Half of 5?", "<<5/2=2.5>>\n#### 2.5"),
    ("Three steps?", "<<1+1=2>><<2+1=3>><<3+1=4>>\n#### 4"),
    ("Many?", "<<150+150=300>>\n#### 300"),
    ("A week of 7 days and 2?", "<<7+2=9>>\n#### 8"),
    # A sum that is kept for evaluation, and one that is worked by one.
    ("Eleven and 4?", "<<11+4=15>>\n#### 15"),
    ("Three and 14?", "<<3+14=17>>\n#### 17"),
    ("None?", "\n#### 8"),
]


@pytest.fixture(autouse=True)
def small(bases, monkeypatch):
    """Miniature bases, small batches, short answers, and a program's interface of one message."""
    monkeypatch.setattr(further, "encoder_folder", lambda cache: bases[0])
    monkeypatch.setattr(further, "llm_folder", lambda cache: bases[1])
    for name, value in (("ANSWER_TOKENS", 3), ("TRANSLATION_TOKENS", 3), ("LONGER", {})):
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setitem(further_data.MIXTURES["wide"], "people", 0.1)  # one of twelve records
    message = {"source": "Kufungua faili hili", "target": "Open this file", "lang": "sw"}
    monkeypatch.setattr(pairs, "interface_pairs", lambda cache: [message])
    real = experiment.load_recipe

    def smaller(path, **options):
        batches = [f"stages.{stage}.batch_size=4" for stage in ("translation", "task")]
        return real(path, [*batches, "progress=false"], **options)

    monkeypatch.setattr(experiment, "load_recipe", smaller)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "msvamp", "tatoeba_pairs", "tatoeba_laser"):
        (folder / name).mkdir()
    rows = [{"question": question, "answer": answer} for question, answer in PEOPLE]
    (folder / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"Sentence {i}.\tSentensi {i}.\n" for i in range(9)) + "Go home.\tNenda nyumbani.\n"
    (folder / "tatoeba_pairs" / "swh-eng.txt").write_text(f"{lines}{'long ' * 20}.\tndefu.\n", encoding="utf-8")
    for suffix, text in (("eng", "Go home!\nYes.\nNo.\n"), ("swh", "Nenda.\nNdiyo.\nHapana.\n")):
        (folder / "tatoeba_laser" / f"tatoeba.swh-eng.{suffix}").write_text(text, encoding="utf-8")
    equations = ["- number0 number1", "+ + 1 2 number0", "/ number1 number0", "number0", "* 2 number0"]
    for name in ("Bengali", "Chinese", "English", "French", "German", "Japanese", "Russian", "Spanish", "Swahili"):
        rows = [{"m_query": f"{name} {i}?", "equation": text, "response": "2.0"} for i, text in enumerate(equations)]
        (folder / "msvamp" / f"test_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "msvamp" / "test_Thai.json").write_text((folder / "msvamp" / "test_Swahili.json").read_text())
    return folder


def test_what_people_wrote_becomes_records(data):
    people = further_data.peoples_problems(data)
    assert [row["target"] for row in people] == ["3 + 2 = 5, 5 * 2 = 10"]
    rows, removed = pairs.sentence_pairs(data, benchmark_texts(data))
    targets = [row["target"] for row in rows]
    assert targets.count("Open this file") == 1 and "Sentence 8." in targets
    assert not any("long" in target for target in targets)
    assert removed["tatoeba_laser"] == {"exact": 1, "overlap": 0}
    english = [row for row in rows if row["lang"] == "en"]
    assert {row["source"] for row in english} == {"Tom has 3 hats.", "He buys 2, and then as many as he has."} | {
        question for question, _ in PEOPLE if len(question.split()) > 2 and "hats" not in question
    }
    assert all(row["source"] == row["target"] for row in english)


def test_questions_of_one_operation_are_found_by_their_solutions(data):
    found = further_data.one_operation(data, 50)
    assert {row["index"] for row in found} == {0, 2, 4} and len({row["lang"] for row in found}) == 10
    assert {row["index"] for row in further_data.one_operation(data, 2)} == {0, 2}
    assert {row["task"] for row in found} == {"msvamp_one"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where the tests of this module find one finished experiment, made by the first that needs it."""
    return tmp_path_factory.mktemp("runs") / "further"


def make(finished, data):
    return run_further(FurtherSettings(data=data, **SMALL), finished, ["layalign", "llm"], [0, 1])


def test_stages_follow_each_other_and_finished_work_stands(data, finished, tmp_path, monkeypatch):
    trained = []
    train = driver.train
    monkeypatch.setattr(driver, "train", lambda recipe, calls: trained.append(recipe) or train(recipe, calls))
    results = make(finished, data)
    assert list(results["runs"]) == ["layalign-0", "layalign-1", "layalign_translation-0"]
    for task in ("held_out", "new_wording", "hundred", "two_steps", "msvamp_one"):
        assert list(results["accuracy"][task]) == ["llm", "layalign-0", "layalign-1"]
    assert list(results["loss"]["loss_tatoeba"]) == ["layalign_translation-0"]
    assert list(results["loss"]["loss_tatoeba_task"]) == ["layalign-0", "layalign-1"]
    start = str(finished / "layalign_translation-0" / "model")
    assert [(recipe.seed, recipe.init_from and recipe.init_from.path) for recipe in trained] == [
        (0, None),
        (0, start),
        (1, start),
    ]
    task = [json.loads(line) for line in (finished / "data" / "task.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(task) == 12 and sum(row["target"] == "3 + 2 = 5, 5 * 2 = 10" for row in task) == 1
    card = (ship(finished, tmp_path / "shipped", "told") / "README.md").read_text(encoding="utf-8")
    assert damage(tmp_path / "told") is None and "`train/demo/real/told/`" in card
    begun = {done.get("begun_with") for run, done in results["runs"].items() if "translation" not in run}
    assert "begun_with" not in results["runs"]["layalign_translation-0"] and len(begun) == 1
    assert (
        f"3 task steps of batch 4 after 3 translation steps that all seeds begin with (the part {begun.pop()})" in card
    )
    assert "problems of one and two steps" in card and "python -m layalign.train.demo.real.further`" in card
    assert all(f"{name} ({licence})" in card for name, licence in results["data"]["sources"].items())
    assert {"Tatoeba", "kolibri", "GSM8K, training split"} < set(results["data"]["sources"])
    (folder,) = ship_translations(finished, tmp_path / "parts")
    assert folder.name == "translation"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert damage(folder) is None and "3 steps of batch 4" in card and "| layalign_translation-0 | shuffled | " in card
    assert str(finished.parent).encode() not in (folder / "config.json").read_bytes()
    monkeypatch.setattr(driver, "train", lambda *arguments: pytest.fail("trained"))
    assert make(finished, data) == results
    with pytest.raises(ValueError, match="task_steps 3 there, 5 here"):
        run_further(FurtherSettings(data=data, **SMALL | {"task_steps": 5}), finished)


def test_reports_of_two_machines_become_one(data, finished, tmp_path):
    """Runs that were shipped before stay in the report, and the part is the best one's of all."""
    results = make(finished, data)
    first, second = parts = [copy.deepcopy(results) for _ in range(2)]
    for part, gone in zip(parts, (("layalign-1",), ("llm", "layalign-0", "layalign_translation-0")), strict=True):
        tables = [*part["accuracy"].values(), *part["understood"].values(), *part["loss"].values()]
        for table in (*tables, *(part[name] for name in ("english", "chrf", "chrf_task", "runs"))):
            for run in gone:
                table.pop(run, None)
    assert joined(second, first) == joined(first, second) == results
    assert joined(second, first | {"arguments": {}}) is None
    other = copy.deepcopy(first)
    other["runs"]["layalign-0"]["begun_with"] = "another part"
    assert joined(second, other) is None
    assert list(joined(second, first)["accuracy"]["held_out"]) == ["llm", "layalign-0", "layalign-1"]
    for place, part in enumerate(parts):
        output = tmp_path / f"machine-{place}"
        shutil.copytree(finished, output)
        (output / "results.json").write_text(json.dumps(part))
        ship(output, tmp_path / "shipped", "told")
    assert json.loads((tmp_path / "told" / "results.json").read_text()) == results
    weights = [
        folder / "model.safetensors"
        for folder in (tmp_path / "shipped", finished / best_run(results, "layalign") / "model")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    table = (tmp_path / "told" / "README.md").read_text(encoding="utf-8")
    assert "| LayAlign, 2 seeds |" in table and damage(tmp_path / "told") is None
    with open(tmp_path / "told" / "results.json", "a", encoding="utf-8") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"told: results\.json .*; runs of other machines are there alone"):
        ship(output, tmp_path / "shipped", "told")


def test_a_trained_translation_stage_is_begun_with(data, finished, tmp_path, capsys):
    make(finished, data)
    sizes = (f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items())
    common = ["--data", str(data), "--systems", "layalign", *sizes]
    (part,) = ship_translations(finished, tmp_path)
    further.main([*common, "--output", str(tmp_path / "second"), "--starts", f"layalign={part}"])
    assert not (tmp_path / "second" / "layalign_translation-0").exists()
    weights = [folder / "layalign-0" / "model" / "model.safetensors" for folder in (finished, tmp_path / "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(SystemExit):
        further.main([*common, "--output", str(tmp_path / "third"), "--starts", "langbridge=there"])
    assert "starts: no langbridge here; there are layalign, mindmerger, llm" in capsys.readouterr().err


def test_a_last_task_stage_has_more_of_the_least_problems(data, tmp_path):
    """One step, no number above 20; and its records are as many, its learning rate its own."""

    def least(mixture):
        further_data.prepare_further(tmp_path / mixture, 200, data, mixture=mixture)
        lines = (tmp_path / mixture / "task.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 200
        equations = [re.findall(r"\d+", json.loads(line)["target"]) for line in lines]
        return sum(3 <= len(numbers) <= 5 and max(map(int, numbers)) <= 20 for numbers in equations)

    assert least("last") >= least("wide") + 20
    settings = further.FurtherSettings(data=data, mixture="last", learning_rate=1e-4)
    arguments = settings.arguments()
    assert (arguments["mixture"], arguments["learning_rate"]) == ("last", 1e-4)
    assert not {"mixture", "learning_rate"} & further.FurtherSettings(data=data).arguments().keys()
    plan = settings.plan()
    assert plan["steps"] == {"translation": 0, "task": 3000}
    assert plan["command"].endswith(".further --mixture last --learning-rate 0.0001")
    planned = Further(tmp_path, plan, ("one", "other"), {}, {}, [], None, starts={"layalign": tmp_path})
    assert planned.recipe(Run(SYSTEMS["layalign"], 0, tmp_path / "run")).stages["task"].learning_rate == 1e-4
    with pytest.raises(ValueError, match=r"starts: .* give one for mindmerger$"):
        run_further(settings, tmp_path / "run", ["layalign", "mindmerger", "llm"], starts={"layalign": tmp_path})
    for name, wrong in (("mixture", "narrow"), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: got {wrong!r}, takes"):
            further.FurtherSettings(data=data, **{name: wrong}).arguments()


@pytest.mark.parametrize(("name", "stage"), [("mindmerger_translation", "translation"), ("mindmerger", "task")])
def test_both_systems_have_one_recipe(name, stage, bases, tmp_path):
    """On equal terms: the same stage, steps and lengths, and each its own translation stage to begin with."""
    steps = {"translation": 6, "task": 3}
    starts = {"layalign": tmp_path / "ours", "mindmerger": tmp_path / "theirs"}
    planned = Further(
        tmp_path, {"arguments": {}, "steps": steps}, tuple(map(str, bases)), {}, {}, [], None, starts=starts
    )
    theirs, ours = (
        planned.recipe(Run(SYSTEMS[system], 0, tmp_path / system))
        for system in (name, name.replace("mindmerger", "layalign"))
    )
    assert theirs.stages == ours.stages and list(ours.stages) == [stage] and ours.stages[stage].steps == steps[stage]
    assert theirs.model == ours.model | {"aligner": None}
    begun = [recipe.init_from and recipe.init_from.path for recipe in (ours, theirs)]
    assert begun == ([None, None] if stage == "translation" else [str(start) for start in starts.values()])
