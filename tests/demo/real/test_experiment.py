"""The driver, the export and the shipped part, on the miniature bases."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layalign.train.demo import driver
from layalign.train.demo.real import __main__ as command
from layalign.train.demo.real import evaluation, experiment, shipped
from layalign.train.demo.real.data import prepare
from layalign.train.demo.real.experiment import make_recipe, run_experiment
from layalign.train.demo.real.export import ship
from layalign.train.demo.real.fetch import FetchError
from layalign.train.demo.real.plan import Settings
from layalign.train.demo.systems import SYSTEMS, runs_of

SMALL = {"steps": 4, "questions": 2, "benchmark_questions": 2, "sentences": 2}


@pytest.fixture(autouse=True)
def small(bases, monkeypatch):
    """Miniature bases, small batches and short answers."""
    for module in (experiment, shipped):
        monkeypatch.setattr(module, "encoder_folder", lambda cache: bases[0])
        monkeypatch.setattr(module, "llm_folder", lambda cache: bases[1])
    for name in ("ANSWER_TOKENS", "TRANSLATION_TOKENS"):
        monkeypatch.setattr(evaluation, name, 3)
    real = experiment.load_recipe

    def smaller(path, **options):
        batches = [f"stages.{stage}.batch_size=4" for stage in ("translation", "task")]
        return real(
            path, [*batches, "stages.task.save_steps=1", "stages.task.log_steps=1", "progress=false"], **options
        )

    monkeypatch.setattr(experiment, "load_recipe", smaller)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("mgsm", "tatoeba_pairs", "tatoeba_laser"):
        (folder / name).mkdir()
    for lang in ("en", "sw"):
        (folder / "mgsm" / f"mgsm_{lang}.tsv").write_text("ha b?\t3\nb ha a?\t4\nx?\t5\n", encoding="utf-8")
    pairs = "".join(f"Sentence {i}.\tSentensi {i}.\tby A\n" for i in range(9)) + "Go home.\tNenda nyumbani.\tby B\n"
    (folder / "tatoeba_pairs" / "swh-eng.txt").write_text(pairs, encoding="utf-8")
    for suffix, text in (("eng", "Go home!\nYes.\nNo.\n"), ("swh", "Nenda.\nNdiyo.\nHapana.\n")):
        (folder / "tatoeba_laser" / f"tatoeba.swh-eng.{suffix}").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Where the tests of this module find one finished experiment, made by the first that needs it."""
    return tmp_path_factory.mktemp("runs") / "experiment"


def run(output, systems, seeds, data=None, **changes):
    return run_experiment(output, systems, seeds, Settings(data=data, **SMALL | changes))


def make(finished, data, **changes):
    return run(finished, ["layalign", "langbridge", "llm"], [0, 1], data, **changes)


def test_data_is_counted_decontaminated_and_made_once(data, tmp_path):
    counts = {"translation": 20, "task": 12}
    report = prepare(tmp_path / "data", counts, data)
    assert report["records"] == {"translation": {"generated": 15, "real": 5}, "task": {"generated": 12, "real": 0}}
    assert report["removed"]["translation"]["real"]["tatoeba_laser"] == {"exact": 1, "overlap": 0}
    written = (tmp_path / "data" / "translation.jsonl").read_text(encoding="utf-8")
    assert len(written.splitlines()) == 20 and "Go home" not in written
    assert prepare(tmp_path / "data", {"translation": 1, "task": 1}, data) == report
    assert prepare(tmp_path / "none", counts)["records"]["translation"] == {"generated": 20, "real": 0}


def test_every_system_is_trained_and_measured(data, finished):
    results = make(finished, data)
    assert json.loads((finished / "results.json").read_text()) == results
    assert list(results["runs"]) == ["layalign-0", "layalign-1", "langbridge-0"]
    assert results["steps"] == {"translation": 1, "task": 3}
    for task in ("held_out", "new_wording", "mgsm"):
        assert list(results["accuracy"][task]) == ["llm", *results["runs"]]
    assert list(results["understood"]["held_out"]) == ["llm", *results["runs"]]
    assert results["systems"]["held_out"]["layalign"]["seeds"] == 2
    assert list(results["english"]) == ["llm", *results["runs"]]
    assert set(results["english"]["langbridge-0"]["sw"]) == {"same", "other", "found"}
    assert results["systems"]["held_out"]["langbridge"]["spread"] is None
    for run in results["runs"]:
        assert set(results["loss"]["loss_held_out"][run]) == {"true", "shuffled"}
        assert set(results["loss"]["loss_tatoeba"][run]["true"]) == {"sw"}
        log = [json.loads(line) for line in (finished / run / "log.jsonl").read_text().splitlines()]
        assert [(line["stage"], line["step"]) for line in log] == [
            ("translation", 1),
            *[("task", i) for i in (1, 2, 3)],
        ]
        assert min(line["seconds"] for line in log) > 0
    assert results["runs"]["langbridge-0"]["trained_parameters"] < results["runs"]["layalign-0"]["trained_parameters"]
    for name in (
        "table.md",
        "plots/accuracy_held_out.png",
        "plots/loss.png",
        "plots/gates.png",
        "plots/english.png",
        "plots/components.png",
    ):
        assert (finished / name).stat().st_size > 0


def test_finished_work_is_not_done_again(data, finished, monkeypatch):
    first = make(finished, data)
    monkeypatch.setattr(driver, "train", lambda *arguments: pytest.fail("trained"))
    monkeypatch.setattr(evaluation, "evaluate_problems", lambda *arguments: pytest.fail("asked"))
    assert make(finished, data) == first
    with pytest.raises(ValueError, match=r"steps 4 there, 6 here; choose another folder"):
        make(finished, data, steps=6)


@pytest.mark.parametrize("damaged", ["changed", "removed"])
def test_a_damaged_piece_of_a_finished_run_is_made_again(data, finished, tmp_path, damaged):
    """And no other piece, nor the model."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    folder = copy / "layalign-0"
    kept = [*folder.glob("evaluation/*.json"), *folder.glob("model/*.safetensors")]
    before = {file: file.read_bytes() for file in kept}
    piece = kept[0]
    times = {file: file.stat().st_mtime_ns for file in folder.glob("evaluation/*.json") if file != piece}
    if damaged == "changed":
        piece.write_bytes(piece.read_bytes().replace(b'"value"', b'"walue"'))
    else:
        piece.unlink()
    make(copy, data)
    assert {file: file.read_bytes() for file in kept} == before
    assert times and {file: file.stat().st_mtime_ns for file in times} == times


def test_interrupted_training_ends_with_the_same_weights(data, tmp_path, monkeypatch):
    run(tmp_path / "whole", ["layalign"], [0], data, precision="fp32")
    log = driver.StepLog.on_log

    def stop(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if Path(args.output_dir).name == "task" and state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(driver.StepLog, "on_log", stop)
        run(tmp_path / "again", ["layalign"], [0], data, precision="fp32")
    assert not (tmp_path / "again" / "layalign-0" / "done.json").exists()
    run(tmp_path / "again", ["layalign"], [0], data, precision="fp32")
    weights = [tmp_path / name / "layalign-0" / "model" / "model.safetensors" for name in ("whole", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_system_without_translation_stage_spends_its_steps_on_the_task(data, tmp_path):
    results = run(tmp_path / "experiment", ["layalign_task_only"], [3])
    assert results["runs"]["layalign_task_only-3"]["steps"] == {"task": 4}
    assert results["loss"]["loss_tatoeba"] == {} and "mgsm" not in results["accuracy"]


def test_the_translation_stage_alone_takes_all_steps_and_as_many_real_pairs_as_asked(data, tmp_path):
    results = run(tmp_path / "experiment", ["layalign_translation"], [0], data, real_share=0.5)
    assert results["runs"]["layalign_translation-0"]["steps"] == {"translation": 4}
    # Half of 16; nine pairs are there and not LASER's.
    assert results["data"]["records"]["translation"] == {"generated": 8, "real": 8}
    assert set(results["loss"]["loss_tatoeba"]["layalign_translation-0"]["true"]) == {"sw"}


def test_minutes_become_the_same_steps_for_every_system(tmp_path):
    output = tmp_path / "experiment"
    results = run(output, ["mindmerger"], [0], steps=None, minutes=0.002)
    planned = json.loads((output / "plan.json").read_text())["value"]["steps"]
    assert results["runs"]["mindmerger-0"]["steps"] == results["steps"] == planned
    assert min(planned.values()) >= 1


def test_shipped_part_answers_as_the_run_did(data, finished, tmp_path, capsys):
    results = make(finished, data)
    folder = ship(finished, tmp_path / "shipped")
    assert shipped.damage(folder) is None and shipped.damage(tmp_path / "report") is None
    model, _ = shipped.load_shipped(folder)
    scores = {
        run: sum(found[lang] for lang in found if lang != "en")
        for run, found in results["accuracy"]["held_out"].items()
    }
    best = max(("layalign-0", "layalign-1"), key=scores.get)
    kept = load_file(finished / best / "model" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in model.trained_state_dict().items())
    answers = shipped.answer_shipped(["ha two", "b a"], folder)
    assert len(answers) == 2 and "ha two\n    -> " in capsys.readouterr().out
    assert len(shipped.answer_shipped(None, folder)) == 10 + len(shipped.SENTENCES)
    told = capsys.readouterr().out
    assert told.count("(right: ") == 10 and all(sentence in told for sentence in shipped.SENTENCES)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "It answers one-step word problems" in card and "among them: Tatoeba (CC BY 2.0 FR).\n" in card
    for file in (*folder.iterdir(), *(tmp_path / "report").iterdir()):
        assert str(finished.parent).encode() not in file.read_bytes() and str(data).encode() not in file.read_bytes()


def test_ship_and_load_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        ship(tmp_path, tmp_path / "shipped")
    with pytest.raises(ValueError, match=r"no trained part in .*: not there"):
        shipped.load_shipped(tmp_path / "shipped")
    assert shipped.damage(tmp_path / "shipped") is not None


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.name)
def test_every_system_has_the_same_recipe_but_for_its_settings(system):
    recipe = make_recipe(system, 5, {"translation": 3, "task": 7}, ("e", "l"), "out", "data", "fp32")
    assert sum(stage.steps for stage in recipe.stages.values()) == 10 and recipe.seed == 5
    assert tuple(recipe.stages) == system.stages
    assert recipe.model == {"adapter": "mlp", "aligner": "linear", "gate": "scalar"} | system.settings
    for stage in recipe.stages.values():
        assert (stage.learning_rate, stage.precision, stage.schedule) == (2e-3, "fp32", "cosine")


def test_runs_of():
    runs = [(system.name, seed) for system, seed in runs_of(["langbridge", "mindmerger"], [4, 0])]
    assert runs == [("langbridge", 4), ("mindmerger", 4), ("mindmerger", 0)]
    for systems, seeds, message in (
        (["laylign"], [0], "systems: no laylign"),
        ([], [0], "systems: got"),
        (["layalign"], [0, 0], "seeds: got"),
        (["layalign"], [-1], "seeds: got"),
    ):
        with pytest.raises(ValueError, match=message):
            runs_of(systems, seeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 4, "minutes": 1}, "give minutes or steps"),
        ({"steps": 1}, "steps: got 1"),
        ({"steps": 2.5}, r"steps: got 2\.5"),
        ({"minutes": -1}, "minutes: got -1"),
        ({"minutes": float("nan")}, "minutes: got nan"),
        ({"questions": 1}, "questions: got 1"),
        ({"real_share": 1.5}, r"real_share: got 1\.5"),
        ({"data": Path("nowhere/at/all")}, "nowhere/at/all is not a folder"),
        ({"data": Path(__file__).parent}, "holds none of tatoeba_pairs, tatoeba_laser, mgsm, msvamp, gsm8k"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(tmp_path / "experiment", settings=Settings(**arguments))
    assert not (tmp_path / "experiment").exists()


def test_data_is_checked_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "encoder_folder", lambda cache: pytest.fail("fetched"))
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm" / "mgsm_en.tsv").write_text("question without answer\n")
    with pytest.raises(ValueError, match=r"mgsm_en\.tsv:1"):
        run_experiment(tmp_path / "experiment", settings=Settings(data=tmp_path, **SMALL))


def test_failed_fetch_leaves_no_run(tmp_path, monkeypatch):
    def fail(cache):
        raise FetchError("no network")

    monkeypatch.setattr(experiment, "llm_folder", fail)
    with pytest.raises(ValueError, match="no network"):
        run_experiment(tmp_path / "experiment", settings=Settings(**SMALL))
    assert not (tmp_path / "experiment").exists()


@pytest.mark.parametrize("content", [None, "{", '["plan"]'])
def test_folder_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "mine.txt").write_text("keep")
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="choose another folder"):
        run_experiment(tmp_path, settings=Settings(**SMALL))
    assert [path.name for path in tmp_path.iterdir() if path.name != "plan.json"] == ["mine.txt"]


def test_a_process_may_ask_the_llm_alone(tmp_path):
    """The others add the systems they train, into the same report."""
    output = tmp_path / "experiment"
    results = run(output, ["llm"], [0, 1, 2])
    assert list(results["accuracy"]["held_out"]) == ["llm"] and results["runs"] == {}
    results = run(output, ["mindmerger"], [1])
    assert list(results["accuracy"]["held_out"]) == ["llm", "mindmerger-1"]


def test_command_line(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(command, "run_experiment", lambda *arguments: given.extend(arguments))
    command.main(["--systems", "layalign", "--seeds", "1", "2", "--minutes", "40", "--data", "d"])
    output, systems, seeds, settings, cache = given
    assert (output, systems, seeds, cache) == (Path("runs/experiment"), ["layalign"], [1, 2], None)
    assert settings == Settings(minutes=40, steps=None, data=Path("d"))
    with pytest.raises(SystemExit):
        command.main(["--ship", "--output", str(tmp_path)])
    assert "holds no results.json" in capsys.readouterr().err
