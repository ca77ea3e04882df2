"""`layalign report`: one page of a run, whatever state the run is in."""

import copy
import itertools
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import TrainerCallback
from typer.testing import CliRunner

from layalign.cli import app
from layalign.train.recipe import Recipe
from layalign.train.report.charts import Series, heat_map, line_chart
from layalign.train.report.data import read_run
from layalign.train.report.page import page
from layalign.train.run_folder import RunFolder
from layalign.train.settings import build
from layalign.train.stages import train

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
# What a browser would fetch or run.
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}


class Page(HTMLParser):
    """Tags, and what is wrong with them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.wrong, self.texts, self._open = [], [], [], []
        self.feed(text)
        self.close()
        if self._open:
            self.wrong.append(f"not closed: {self._open}")

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self._open.append(tag)
        for name, value in attrs:
            if name in ADDRESSES or name.startswith("on") or "url(" in (value or ""):
                self.wrong.append((tag, name, value))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"closed: {tag}")

    def handle_data(self, data):
        self.texts.append(data)


def looked_at(run):
    """The page of a run's folder, checked to be whole and to need nothing else."""
    text = page(read_run(run))
    found = Page(text)
    assert found.wrong == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(found.tags)
    assert (
        "@import" not in text and "url(" not in text and "http" not in text.lower().replace("https://json-schema", "")
    )
    return text, found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bases):
    """A run of both stages, two languages held out, and the folder it is in."""
    numbers = ["moja", "mbili", "tatu", "nne", "tano", "sita", "saba", "nane"]
    records = [
        {"source": word, "target": "one plus two", "lang": "sw" if index % 2 else "de"}
        for index, word in enumerate(numbers)
    ]
    stage = {
        "data": {"records": records},
        "hold_out": 4,
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 0.01,
        "log_steps": 1,
        "eval_steps": 4,
    }
    settings = {**bases, "output": str(tmp_path_factory.mktemp("finished") / "run"), "progress": False, "device": "cpu"}
    settings["stages"] = {"translation": stage, "task": {**stage, "prompt": "answer : {source}"}}
    recipe = build(Recipe, settings)
    train(recipe)
    return recipe


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished.output, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_finished_run(finished):
    text, found = looked_at(finished.output)
    assert found.tags.count("svg") == 2 * 7
    shown = " ".join(found.texts)
    for word in (
        "ended",
        "Loss",
        "Held-out loss by language",
        "Gates by layer of the LLM",
        "Learning rate",
        "Gradient norm",
        "Speed",
    ):
        assert word in shown
    assert "8 of 8" in shown
    assert "sw" in shown and "de" in shown
    assert "transformers" in shown
    assert "learning_rate: 0.01" in shown
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    for svg in text.split("<svg")[1:]:
        drawing = ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
        assert drawing.get("aria-label")


def test_the_command_writes_it_with_answers(run):
    result = CliRunner().invoke(app, ["report", str(run), "--samples", "2"])
    assert result.exit_code == 0, result.output
    assert f"report: {run / 'report.html'}" in result.output
    samples = json.loads((run / "samples.json").read_text())
    assert [sample["held_out"] for sample in samples] == [True] * 4
    assert {sample["lang"] for sample in samples[:2]} == {"sw", "de"}
    assert samples[0]["target"] == "one plus two"
    assert all(isinstance(sample["answer"], str) for sample in samples[:2])
    shown = " ".join(Page((run / "report.html").read_text()).texts)
    assert samples[1]["source"] in shown
    assert samples[1]["answer"] in shown
    # The answers stay for reports to come.
    other = run / "elsewhere" / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "-o", str(other)]).exit_code == 0
    assert other.read_text() == (run / "report.html").read_text()


def test_a_run_under_way_and_one_that_was_interrupted(finished, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                seen.append(looked_at(args.output_dir.removesuffix("/translation"))[1])
                raise KeyboardInterrupt

    seen = []
    recipe = copy.deepcopy(finished)
    recipe.output = str(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, [Stop()])
    shown = " ".join(seen[0].texts)
    assert "under way" in shown
    assert "4 of 8" in shown
    assert "not begun" in shown
    shown = " ".join(looked_at(recipe.output)[1].texts)
    assert "interrupted" in shown
    assert "under way" not in shown


def test_a_run_of_one_stage_and_one_that_has_only_begun(finished, tmp_path):
    recipe = copy.deepcopy(finished)
    recipe.output = str(tmp_path / "begun")
    del recipe.stages["translation"]
    with RunFolder(recipe):
        shown = " ".join(looked_at(recipe.output)[1].texts)
    assert "under way" in shown
    assert "not begun" in shown
    assert "Translation" not in shown


def test_runs_without_logs_of_their_own_show_their_history(run):
    for name in ("translation", "task"):
        (run / name / "log.jsonl").unlink()
    _, found = looked_at(run)
    assert found.tags.count("svg") == 2 * 6  # all but the speed, which no history holds
    assert "8 of 8" in " ".join(found.texts)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("recipe.json", "{", "recipe.json cannot be read"),
        ("recipe.json", "[]", "recipe.json holds list"),
        ("recipe.json", '{"stages": 3}', None),
        ("recipe.json", '{"stages": {"task": [], "translation": {"steps": "x"}}, "encoder": {}}', None),
        ("task/data.json", "\x00", "data.json cannot be read"),
        ("task/data.json", '{"records": "many", "more": [1, {"a": null}]}', None),
        ("task/final/history.json", "[]", "task/final: history.json has 2 bytes"),
        ("task/final/manifest.json", "", "task/final: manifest.json is unreadable"),
        ("model/model.safetensors", "x", "model: model.safetensors has 1 bytes"),
        ("samples.json", "{}", "samples.json holds dict"),
        ("samples.json", '[3, {"source": null, "answer": 4}]', None),
        (
            "task/log.jsonl",
            '{"step": 1, "loss": "x", "time": "now"}\n{"step": 2, "loss": NaN, "gate_layer_0": null}\n',
            None,
        ),
        (
            "task/log.jsonl",
            '{"step": 3, "loss": Infinity, "eval_loss": NaN}\n{"step": 4, "start": {"versions": 3}}\n',
            None,
        ),
        ("task/log.jsonl", "", None),
        ("run.lock", "", None),
    ],
)
def test_damaged_parts_are_named_and_the_rest_is_shown(run, file, content, said):
    (run / file).write_text(content)
    _, found = looked_at(run)
    shown = " ".join(found.texts)
    assert "Translation" in shown
    if said:
        assert said in shown


def test_hostile_text_is_text(run):
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["encoder"], recipe["stages"]["task"]["prompt"] = HOSTILE, HOSTILE
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "samples.json").write_text(
        json.dumps([{"lang": HOSTILE, "source": HOSTILE, "target": HOSTILE, "answer": HOSTILE, "held_out": True}])
    )
    (run / "task" / "data.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    lines = [
        {"step": 0, "start": {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}},
        {
            "step": 1,
            "loss": 1.0,
            "eval_loss": 1.0,
            f"eval_loss_{HOSTILE}": 1.0,
            "eval_loss_b": 2.0,
            f"gate_layer_{HOSTILE}": 1.0,
        },
        {"step": 1, "warning": HOSTILE},
        {"step": 2, "loss": 1.0, HOSTILE: 3},
    ]
    (run / "task" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    renamed = run.with_name("<b onclick=x>")
    run.rename(renamed)
    text, found = looked_at(renamed)
    assert "<img" not in text
    assert sum(HOSTILE in data for data in found.texts) >= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["file"], "file is a file, takes the folder of a training run"),
        (["empty"], "empty holds no training run (no recipe.json)"),
        (["copy", "-o", "empty"], "--output: empty is a folder"),
        (["copy", "-o", "file/page.html"], "--output: file/page.html cannot be written"),
        (["copy", "--samples", "1"], "has no trained model yet"),
    ],
)
def test_reports_that_cannot_be_made(run, words, message, monkeypatch):
    shutil.rmtree(run / "model")
    monkeypatch.chdir(run.parent)
    Path("file").write_text("x")
    Path("empty").mkdir()
    result = CliRunner().invoke(app, ["report", *words])
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception)


@pytest.mark.parametrize("content", ["{", "[{}]", "[3]", "{}", None])
def test_samples_that_cannot_be_answered(run, content):
    file = run / "samples.json"
    file.unlink() if content is None else file.write_text(content)
    result = CliRunner().invoke(app, ["report", str(run), "--samples", "1"])
    assert isinstance(result.exception, ValueError)
    assert "--samples:" in str(result.exception)


def test_charts_of_odd_values():
    nan, inf = math.nan, math.inf
    assert line_chart("a", "b", []) == ""
    assert line_chart("a", "b", [Series("x", [(1, nan), (2, inf)])]) == ""
    for points in (
        [(1, 5.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, -3.0), (2, nan), (3, 1e300)],
        [(step, step % 7 - 3) for step in range(999)],
    ):
        chart = line_chart("a", "b", [Series("x", points, smooth=True), Series("y", [], 2)], log_scale=True)
        assert "nan" not in chart and "inf" not in chart.replace("infinity", "")
        ElementTree.fromstring(chart)
    names = [Series(str(index), [(0, 1.0), (1, 1.0)], index + 1) for index in range(16)]
    labels = line_chart("a", "b", names).split('class="end')[1:]
    places = [float(label.split(' y="')[1].split('"')[0]) for label in labels]
    assert all(after - before >= 12.9 for before, after in itertools.pairwise(places))
    assert heat_map("a", "b", ["0"], [], [[]]) == ""
    ElementTree.fromstring(heat_map("a", "b", ["0", "1"], [1, 2], [[0.0, nan], [0.0, 0.0]]))
