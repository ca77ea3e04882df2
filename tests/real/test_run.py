import json
import time
from pathlib import Path

import pytest
import torch

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train.real import material, problems, run
from layalign.train.real.callbacks import TimeBudget
from layalign.train.real.fetch import FetchError

LANGUAGES = ("en", "sw", "te")


@pytest.fixture(autouse=True)
def small(bases, monkeypatch):
    """Miniature bases and short answers."""
    monkeypatch.setattr(run, "encoder_folder", lambda cache: bases[0])
    monkeypatch.setattr(run, "llm_folder", lambda cache: bases[1])
    monkeypatch.setattr(run, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(material, "GENERATED", 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "mgsm").mkdir()
    (folder / "pairs").mkdir()
    for lang in LANGUAGES:
        lines = [f"{lang} question {'ab'[i % 2] * (i + 1)}?\t{i}" for i in range(6)]
        (folder / "mgsm" / f"mgsm_{lang}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "pairs" / "swh-eng.txt").write_text("Go.\tNenda.\tby A\nCome.\tNjoo.\tby B\n", encoding="utf-8")
    return folder


def test_run_writes_what_it_returns_and_resumes(data, tmp_path, monkeypatch):
    output = tmp_path / "real"
    results = run.run_real(output, steps=5, limit=2, data=data)
    assert json.loads((output / "results.json").read_text()) == results
    assert results["steps"] == results["planned_steps"] == {"translation": 2, "task": 3}
    assert results["records"]["translation"] == {"generated": 64, "real": 2}
    for asked, languages in ((results, LANGUAGES), (results["generated"], problems.LANGUAGES)):
        for scorer in ("accuracy", "strict"):
            assert set(asked[scorer]) == {"llm", "layalign"}
            assert set(asked[scorer]["llm"]) == set(asked[scorer]["layalign"]) == set(languages)
    assert set(results["retrieval_at_1"]) == {"sw", "te"}
    assert set(results["loss"]) == {"translation: mgsm", "translation: generated", "task: generated"}
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * 2 * (len(LANGUAGES) + len(problems.LANGUAGES))
    for name in ("table.md", "plots/accuracy_mgsm.png", "plots/accuracy_generated.png", "plots/losses.png"):
        assert (output / name).stat().st_size > 0
    model = LayAlignForConditionalGeneration.from_pretrained(output / "model")
    batch = LayAlignProcessor.from_pretrained(output / "model")(["ha two"])
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 1

    weights = (output / "model" / "model.safetensors").read_bytes()
    again = run.run_real(output, steps=5, limit=1, data=data)
    assert again["loss"] == results["loss"] and again["questions_per_language"] == 1
    assert (output / "model" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match=r"steps 5 there, 6 here; choose another folder"):
        run.run_real(output, steps=6, data=data)
    assert (output / "model" / "model.safetensors").read_bytes() == weights


def test_budget_in_minutes_becomes_steps(data, tmp_path):
    results = run.run_real(tmp_path / "real", minutes=0.05, limit=1, data=data)
    for stage, steps in results["steps"].items():
        assert 1 <= steps <= results["planned_steps"][stage]


def test_time_budget_stops_a_stage_that_is_too_slow():
    class Arguments:
        output_dir = "runs/real/task"

    class Control:
        should_training_stop = should_log = False

    control, budget = Control(), TimeBudget({"task": 0.05})
    budget.on_train_begin(Arguments, None, control)
    budget.on_step_end(Arguments, None, control)
    assert not control.should_training_stop
    time.sleep(0.06)
    budget.on_step_end(Arguments, None, control)
    assert control.should_training_stop and control.should_log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minutes": 1, "steps": 4}, "give minutes or steps, not both"),
        ({"minutes": 0}, "minutes: got 0"),
        ({"minutes": float("nan")}, "minutes: got nan"),
        ({"steps": 1}, "steps: got 1"),
        ({"steps": 2.5}, r"steps: got 2\.5"),
        ({"limit": 0}, "limit: got 0"),
        ({"data": "nowhere/at/all"}, r"nowhere/at/all is not a folder.*--data takes a folder"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run.run_real(tmp_path / "real", **arguments)
    assert not (tmp_path / "real").exists()


def test_data_is_checked_before_anything_is_fetched(data, tmp_path, monkeypatch):
    def fetched(cache):
        pytest.fail("fetched")

    monkeypatch.setattr(run, "encoder_folder", fetched)
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm" / "mgsm_sw.tsv").write_text("swali\t1\n")
    with pytest.raises(ValueError, match="without its English file"):
        run.run_real(tmp_path / "real", data=tmp_path)
    (tmp_path / "mgsm" / "mgsm_en.tsv").write_text("question without answer\n")
    with pytest.raises(ValueError, match=r"mgsm_en\.tsv:1"):
        run.run_real(tmp_path / "real", data=tmp_path)


def test_failed_fetch_leaves_no_run(data, tmp_path, monkeypatch):
    def fail(cache):
        raise FetchError("no network")

    monkeypatch.setattr(run, "llm_folder", fail)
    with pytest.raises(ValueError, match="no network"):
        run.run_real(tmp_path / "real", data=data)
    assert not (tmp_path / "real").exists()


@pytest.mark.parametrize("content", [None, "{", '["plan"]'])
def test_folder_of_something_else_is_left_alone(data, tmp_path, content):
    (tmp_path / "mine.txt").write_text("keep")
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="choose another folder"):
        run.run_real(tmp_path, data=data)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_real_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(material, "REAL_PER_LANGUAGE", 2)
    (tmp_path / "tatoeba_pairs").mkdir()
    file = tmp_path / "tatoeba_pairs" / "tha-eng.txt"
    file.write_text("One.\tก\nTwo.\tข\nThree.\tค\nFour.\tง\n", encoding="utf-8")
    assert material.real_pairs(tmp_path) == [
        {"source": "ก", "target": "One.", "lang": "th"},
        {"source": "ค", "target": "Three.", "lang": "th"},
    ]
    assert material.real_pairs(None) == []
    file.rename(tmp_path / "tatoeba_pairs" / "xyz-eng.txt")
    with pytest.raises(ValueError, match=r"xyz-eng\.txt: no language known for 'xyz'"):
        material.real_pairs(tmp_path)


def test_output_may_be_a_text_and_bases_stay_out_of_the_model(data, tmp_path):
    run.run_real(str(tmp_path / "real"), steps=2, limit=1, data=str(data), seed=3)
    saved = sum(path.stat().st_size for path in Path(tmp_path / "real" / "model").glob("*.safetensors"))
    model = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "real" / "model")
    assert saved < 4 * model.num_trained_parameters + 20_000
    assert torch.isfinite(model.gates()).all()
