"""What a run tells of itself while it trains, and when it stops by itself."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from layalign.train import stages, watching
from layalign.train.checkpoints import newest_valid
from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stage_log import read_log
from layalign.train.stages import train


@pytest.fixture
def task(settings):
    """Settings of the task stage alone, to be changed."""
    settings = copy.deepcopy(settings)
    del settings["stages"]["translation"]
    return settings


def run(settings, callbacks=(), **changes):
    settings = copy.deepcopy(settings)
    settings["stages"]["task"].update(changes)
    recipe = build(Recipe, settings)
    return recipe, train(recipe, callbacks)


def lines(recipe):
    return list(read_log(Path(recipe.output) / "task" / "log.jsonl"))


class PoisonWeights(TrainerCallback):
    """Puts NaN into the adapter after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.adapter.linear2.weight.data[0, 0] = math.nan


def test_logs_tell_speed_gates_and_the_time_left(task, capsys):
    recipe, trained = run(task, steps=5)
    logs = [line for line in lines(recipe) if "loss" in line]
    assert [line["step"] for line in logs] == [1, 2, 3, 4, 5]
    model = trained.model
    for line in logs:
        assert line["tokens_per_second"] > 0
        assert line["remaining_seconds"] >= 0
        assert line["gate_mean"] == pytest.approx((line["gate_layer_0"] + line["gate_layer_1"]) / 2)
    assert logs[-1]["remaining_seconds"] == 0 < logs[0]["remaining_seconds"]
    found = [logs[-1][f"gate_layer_{layer}"] for layer in (0, 1)]
    assert found == pytest.approx(model.gates().abs().flatten().tolist())
    # What differs from run to run is no part of the history.
    history = trained.history["task"]
    assert set(history[0]) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "gate_mean",
        "gate_layer_0",
        "gate_layer_1",
    }
    said = capsys.readouterr().err
    assert "task 5/5 loss" in said
    assert "tokens/s" in said
    assert "left 00:00" in said


def test_tokens_are_the_real_ones(task, monkeypatch):
    """Neither padding nor what an evaluation reads."""
    counted = []
    figures = stages.StageTrainer.log

    def log(self, logs, start_time=None):
        if "loss" in logs:
            counted.append(int(self.watch._tokens))
        return figures(self, logs, start_time)

    monkeypatch.setattr(stages.StageTrainer, "log", log)
    recipe, trained = run(
        task, steps=2, batch_size=10, eval_steps=1, eval_data={"records": task["stages"]["task"]["data"]["records"]}
    )
    processor = trained.processor
    records = recipe.stages["task"].data[0].records
    tokens = 0
    for record in records:
        batch = processor([record["source"]], prompt=[f"answer : {record['source']}"], target=[record["target"]])
        tokens += batch["encoder_attention_mask"].sum().item() + batch["attention_mask"].sum().item()
    assert counted == [tokens, tokens]


def test_the_time_left_is_not_that_of_the_last_step_alone(monkeypatch):
    """With a log a step too: of the first ten, all but the first count."""
    now = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    bare = SimpleNamespace(aligner=None, config=None, encoder=None)
    watch, left = watching.Watch("task", SimpleNamespace(eval_steps=None), bare), []
    watch.begin(0)
    for step, seconds in enumerate([5, 1, 1, 1, 10, 1], 1):
        now[0] += seconds
        figures = watch.figures(SimpleNamespace(global_step=step, max_steps=100), lambda tokens: tokens)
        left.append(figures["remaining_seconds"])
    assert left == pytest.approx([99 * 5, 98, 97, 96, 95 * 13 / 4, 94 * 14 / 5])


def test_questions_that_nobody_reads_are_no_tokens(task, monkeypatch):
    counted = []
    monkeypatch.setattr(
        watching.Watch,
        "count",
        lambda self, batch, count=watching.Watch.count: (
            count(self, batch) or counted.append((int(self._tokens), int(batch["attention_mask"].sum())))
        ),
    )
    run(task | {"encoder": None, "train_llm": True}, steps=1)
    assert counted and counted[0][0] == counted[0][1]


def test_the_held_out_loss_is_told_by_language(task):
    records = task["stages"]["task"]["data"]["records"]
    held_out = [record | {"lang": "sw" if index < 7 else "de"} for index, record in enumerate(records)] + [
        {"source": "moja", "target": "one"}
    ]
    changes = {"steps": 2, "batch_size": 4, "eval_steps": 2, "eval_batch_size": 20}
    _, trained = run(task, eval_data={"records": held_out}, **changes)
    (entry,) = [entry for entry in trained.history["task"] if "eval_loss" in entry]
    model, processor = trained.model, trained.processor
    expected = {}
    for language in ("de", "sw", ""):
        part = [record for record in held_out if record.get("lang", "") == language]
        sources = [record["source"] for record in part]
        batch = processor(
            sources, prompt=[f"answer : {source}" for source in sources], target=[record["target"] for record in part]
        )
        with torch.no_grad():
            labels = (batch["labels"] != -100).sum().item()
            expected[language or "unknown"] = (model(**batch).loss.item(), labels)
    for language, (loss, _) in expected.items():
        assert entry[f"eval_loss_{language}"] == pytest.approx(loss, rel=1e-5)
    mean = sum(loss * count for loss, count in expected.values()) / sum(count for _, count in expected.values())
    assert entry["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_a_stage_that_goes_to_nan_stops_and_keeps_the_last_good_checkpoint(task):
    with pytest.raises(ValueError, match=r"stages\.task: stopped at step 4 of 9: the loss is nan") as caught:
        run(task, [PoisonWeights(3)], steps=9, save_steps=2)
    checkpoint = newest_valid(Path(task["output"]) / "task")
    assert checkpoint.name == "checkpoint-2"
    assert f"init_from: {checkpoint}" in str(caught.value)
    assert "a lower learning_rate (now 0.01)" in str(caught.value)
    assert not (Path(task["output"]) / "model").exists()
    warnings = [line for line in read_log(Path(task["output"]) / "task" / "log.jsonl") if "warning" in line]
    assert [line["step"] for line in warnings] == [4]


def test_weights_with_nan_are_not_saved(task):
    """Saved before the next loss shows them, they would push out the last good checkpoint."""
    with pytest.raises(ValueError, match="there is nan or inf in the weights"):
        run(task, [PoisonWeights(4)], steps=9, save_steps=2, keep_checkpoints=1, log_steps=9)
    assert newest_valid(Path(task["output"]) / "task").name == "checkpoint-2"


def test_an_infinite_loss_before_any_checkpoint(task):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.adapter.linear2.weight.data.fill_(math.inf)

    with pytest.raises(ValueError, match="no checkpoint had been made yet"):
        run(task, [Poison()], steps=3)


def test_gates_that_stay_at_0_and_a_loss_that_does_not_fall_are_warned_of_once(task, capsys):
    recipe, _ = run(task, steps=130, learning_rate=0.0, batch_size=10)
    said = capsys.readouterr().err
    assert said.count("all gates are still 0 after 23 steps") == said.count("all gates are still 0") == 1
    assert said.count("the loss does not fall") == 1
    assert "now, at step 100 of 130" in said
    assert [line["step"] for line in lines(recipe) if "warning" in line] == [23, 100]


def test_a_stage_that_learns_is_not_warned_of(task, capsys):
    recipe, _ = run(task, steps=130, batch_size=10)
    assert "layalign: stages" not in capsys.readouterr().err
    assert not [line for line in lines(recipe) if "warning" in line]


@pytest.mark.parametrize("gate", ["head", "dynamic"])
def test_every_kind_of_gate_has_its_figures(task, gate):
    _, trained = run({**task, "model": {"gate": gate}}, steps=3)
    assert all(entry["gate_layer_1"] >= 0 for entry in trained.history["task"])
    assert trained.history["task"][-1]["gate_mean"] > 0


def test_without_an_aligner_there_are_no_gates(task):
    _, trained = run({**task, "model": {"aligner": None}}, steps=2)
    assert not [key for entry in trained.history["task"] for key in entry if "gate" in key]


def test_a_resumed_stage_goes_on_with_its_log(task):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, [Stop()], steps=7, save_steps=2)
    recipe, trained = run(task, steps=7, save_steps=2)
    found = lines(recipe)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 8))
    assert [line["step"] for line in found if "start" in line] == [0, 4]
    assert [line["loss"] for line in found if "loss" in line] == [entry["loss"] for entry in trained.history["task"]]
    start = next(line["start"] for line in found if "start" in line)
    assert start["processes"] == 1
    assert start["versions"]["torch"] == torch.__version__


def test_a_log_with_broken_lines_is_read(tmp_path):
    file = tmp_path / "log.jsonl"
    assert list(read_log(file)) == []
    good = json.dumps({"step": 1, "loss": 2.0})
    file.write_bytes(good.encode() + b'\n[1]\n"x"\n{"step": "2"}\n\xff\xfe\n{"loss": 3}\n{"step": 2, "lo')
    assert list(read_log(file)) == [{"step": 1, "loss": 2.0}]
