"""A miniature of the demo: everything it writes, and what it refuses to touch."""

import json
import shutil
from pathlib import Path

import pytest

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train.demo import driver
from layalign.train.demo.problems import TINY
from layalign.train.demo.tiny.run import TRAINED, run_demo
from layalign.train.stages import train

BUDGET = {"translation_steps": 3, "task_steps": 3, "batch_size": 4, "questions": 2}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, run_demo(output, 5, progress=False, **BUDGET)


def test_results_have_the_documented_form(miniature):
    output, results = miniature
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    assert list(results["accuracy"]) == ["llm", "langbridge", "mindmerger", "layalign"]
    for scores in results["accuracy"].values():
        assert list(scores) == list(TINY.languages)
        assert all(0 <= score <= 100 for score in scores.values())
    parts = [value for name, value in results["seconds"].items() if name != "total"]
    assert len(parts) == 7 and results["seconds"]["total"] == pytest.approx(sum(parts), abs=0.1)
    assert results["seed"] == 5
    assert "generated" in results["data"]


def test_plots_are_images(miniature):
    plots = sorted((miniature[0] / "plots").iterdir())
    assert [path.name for path in plots] == ["accuracy.png", "gates.png", "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in plots)


def test_the_saved_model_answers_as_the_run_did(miniature):
    output, results = miniature
    model = LayAlignForConditionalGeneration.from_pretrained(output / "model").eval()
    processor = LayAlignProcessor.from_pretrained(output / "model")
    sample = results["samples"]["layalign"]["sw"]
    ids = model.generate(**processor([sample["question"]]), max_new_tokens=32, do_sample=False)
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == sample["answer"]


def test_the_systems_are_the_papers(miniature):
    configs = {
        name: json.loads((miniature[0] / "training" / name / "model" / "config.json").read_text()) for name in TRAINED
    }
    told = {name: (c["adapter"], c["aligner"], c["llm_input"]["task"]) for name, c in configs.items()}
    assert told == {
        "langbridge": ("linear", None, False),
        "mindmerger": ("mlp", None, True),
        "layalign": ("mlp", "linear", True),
    }


def test_an_earlier_demo_is_replaced_with_the_same_result_and_other_files_stay(miniature, tmp_path, capsys):
    output = tmp_path / "demo"
    output.mkdir()
    (output / "demo.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    (output / "results.json").write_text("old")
    results = run_demo(output, 5, **BUDGET)
    assert (output / "notes.txt").read_text() == "mine"
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    for name in ("history", "accuracy", "samples"):
        assert results[name] == miniature[1][name]
    shown = capsys.readouterr().out
    assert "generated" in shown and "held out" in shown and "layalign generate" in shown
    assert sorted(path.name for path in output.iterdir()) == [
        *("demo.json", "model", "notes.txt", "plots", "results.json", "training")
    ]


def test_a_finished_demo_is_shown_again_and_one_with_another_seed_keeps_it_until_its_own_is_there(
    miniature, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "demo"
    shutil.copytree(miniature[0], output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver, "train", killed)
        assert run_demo(output, 5, **BUDGET) == miniature[1]
        shown = capsys.readouterr().out
        assert "layalign generate" in shown and "It had been made before" in shown
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, 6, progress=False, **BUDGET)
    kept = [path for path in before if path.relative_to(output).parts[0] in ("results.json", "model", "plots")]
    assert len(kept) > 5 and all(path.read_bytes() == before[path] for path in kept)
    new = run_demo(output, 6, progress=False, **BUDGET)
    assert new["seed"] == 6 and json.loads((output / "results.json").read_text(encoding="utf-8")) == new
    assert (output / "model" / "model.safetensors").read_bytes() != before[output / "model" / "model.safetensors"]


def test_a_demo_that_was_stopped_goes_on(miniature, tmp_path, monkeypatch):
    """After the second system; what the first two trained is as it was, and the results are those of an uninterrupted demo."""
    trained = []

    def stopping(recipe, callbacks):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(Path(recipe.output).name)
        return train(recipe, callbacks)

    monkeypatch.setattr(driver, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", 5, progress=False, **BUDGET)
    monkeypatch.setattr(
        driver, "train", lambda recipe, callbacks: trained.append(Path(recipe.output).name) or train(recipe, callbacks)
    )
    results = run_demo(tmp_path / "demo", 5, progress=False, **BUDGET)
    assert trained == list(TRAINED)
    assert all(results[name] == miniature[1][name] for name in ("history", "accuracy", "samples"))


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* holds something that is no demo"):
        run_demo(tmp_path, progress=False, **BUDGET)
    assert (tmp_path / "model" / "weights").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_as_output_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* is a file"):
        run_demo(path, progress=False, **BUDGET)
    assert path.read_text() == "mine"
