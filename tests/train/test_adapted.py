"""LoRA, a trained LLM, quantised bases and an LLM alone in a recipe: what each stage trains, and resuming."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.systems import LLM
from layalign.train import stages
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.settings import build
from layalign.train.stages import train

LORA = {"lora": {"rank": 2, "dropout": 0.2}}
WAYS = {"lora": LORA, "llm": {"train_llm": True}}


def needs(*packages):
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def recipe(settings, **changes):
    """settings with keys of the recipe, and of stages as stages__NAME."""
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        if key.startswith("stages__"):
            settings["stages"][key.removeprefix("stages__")].update(value)
        else:
            settings[key] = value
    return build(Recipe, settings)


def alone(settings, **changes):
    """Of an LLM alone: no encoder, the task stage."""
    settings = {key: value for key, value in settings.items() if key != "encoder"}
    settings["stages"] = {"task": settings["stages"]["task"]}
    return recipe(settings, **changes)


def tensors(folder):
    """All that a folder holds of what is trained."""
    folder = Path(folder)
    found = load_file(folder / "model.safetensors")
    if (folder / "llm").is_dir():
        found |= {f"llm.{name}": value for name, value in load_file(folder / "llm" / "model.safetensors").items()}
    return found


def everything(output):
    """The bytes of all weights in a run's result."""
    folder = Path(output) / "model"
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.safetensors")}


class Seen(TrainerCallback):
    """Which parts the optimizer of each stage holds, and by which rate."""

    def __init__(self):
        self.groups = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        names = {id(own): name for name, own in model.named_parameters()}
        rates = {}
        for group in optimizer.param_groups:
            for own in group["params"]:
                name = names[id(own)]
                part = "gates" if "fusion_gate" in name else "lora" if ".lora_" in name else name.partition(".")[0]
                rates.setdefault(part, set()).add(group["initial_lr"])
        self.groups.append(rates)


@pytest.mark.parametrize("way", WAYS)
def test_the_task_stage_trains_it_the_translation_stage_does_not(settings, bases, way):
    needs("peft")
    seen = Seen()
    run = recipe(settings, **WAYS[way], stages__task={"llm_learning_rate": 1e-3})
    first = {name: own.clone() for name, own in stages.build(run)[0].state_dict().items()}
    model, processor, _ = train(run, callbacks=[seen])
    part = {"adapter": {0.01}, "aligner": {0.01}, "gates": {0.01}}
    assert seen.groups == [part, part | {way: {1e-3}}]
    output = Path(run.output)
    assert not (output / "translation" / "final" / "llm").exists()
    translated, done = tensors(output / "translation" / "final"), tensors(output / "task" / "final")
    beside = [name for name in done if ".lora_" in name or (name.startswith("llm.") and "fusion_gate" not in name)]
    assert beside and all(not done[name].equal(first[name]) for name in beside if "lora_A" not in name)
    assert all(translated.get(name, first[name]).equal(first[name]) for name in beside)
    assert all(own.requires_grad for _, own in model.trained_parameters())

    loaded = LayAlignForConditionalGeneration.from_pretrained(output / "model")
    processor = LayAlignProcessor.from_pretrained(output / "model")
    batch = processor(["moja mbili"], target=["one two"])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    # The translation stage's result is a model too, over the base as it was.
    LayAlignForConditionalGeneration.from_pretrained(output / "translation" / "final")


def test_a_tied_llm_keeps_its_best_weights_and_goes_on(settings, tmp_path):
    """Its output layer is its embeddings, which a state dict holds under both names."""
    llm = AutoModelForCausalLM.from_pretrained(settings["llm"])
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    shutil.copytree(settings["llm"], tmp_path / "tied")
    llm.save_pretrained(tmp_path / "tied")
    kept = {"hold_out": 2, "eval_steps": 2, "keep": "best", "save_steps": 2}
    settings |= {"llm": str(tmp_path / "tied")}

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **given):
            if state.global_step == 4 and "task" in args.output_dir:
                raise KeyboardInterrupt

    changes = {"train_llm": True, "stages__task": kept}
    whole = train(recipe(settings, **changes)).model
    run = recipe(settings, **changes, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Stop()])
    again = train(run).model
    assert again.llm.get_input_embeddings().weight is again.llm.get_output_embeddings().weight
    for (name, own), (_, other) in zip(whole.trained_parameters(), again.trained_parameters(), strict=True):
        assert own.equal(other), name


def test_stages_train_the_parts_they_name(settings):
    seen = Seen()
    run = recipe(
        settings,
        train_llm=True,
        stages__translation={"train": ["adapter", "llm"]},
        stages__task={"train": ["gates", "aligner"]},
    )
    train(run, callbacks=[seen])
    assert [set(groups) for groups in seen.groups] == [{"adapter", "llm"}, {"gates", "aligner"}]
    translated, done = (tensors(Path(run.output) / name / "final") for name in ("translation", "task"))
    changed = {name for name, value in done.items() if not value.equal(translated[name])}
    assert changed == {name for name in done if name.startswith("aligner.") or "fusion_gate" in name}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["qlora", "llm"])
def test_killed_at_any_moment_the_run_ends_bit_identical(recipe_file, program, tmp_path, way):
    """With dropout in LoRA, over a quantised LLM, or all of the LLM trained; the best weights kept."""
    needs(*(["peft", "bitsandbytes"] if way == "qlora" else []))
    settings = yaml.safe_load(recipe_file.read_text())
    settings |= {"qlora": {**LORA, "quantization": "4bit"}, **WAYS}[way]
    for stage in settings["stages"].values():
        stage |= {"steps": 4, "save_steps": 2, "hold_out": 2, "eval_steps": 2, "keep": "best"}
    recipe_file.write_text(yaml.safe_dump(settings))
    whole = program("killed_runs.py", recipe_file, tmp_path / "whole")
    kills = ["sync:9", "batch:6", "sync:15", "batch:3"]
    broken = program("killed_runs.py", recipe_file, tmp_path / "broken", *kills)
    assert broken["killed"] == kills
    assert broken["history"] == whole["history"]
    assert everything(tmp_path / "broken") == everything(tmp_path / "whole")


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["llm", "trained part"])
def test_a_damaged_checkpoint_is_passed_over(settings, tmp_path, caplog, damage):
    del settings["stages"]["translation"]
    stage = {"stages__task": {"steps": 6, "save_steps": 2}}
    whole = train(recipe(settings, train_llm=True, **stage))
    broken = recipe(settings, train_llm=True, output=str(tmp_path / "broken"), **stage)
    with pytest.raises(KeyboardInterrupt):
        train(broken, callbacks=[Stop()])
    newest = tmp_path / "broken" / "task" / "checkpoint-4"
    file = newest / "llm" / "model.safetensors" if damage == "llm" else newest / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    resumed = train(broken)
    assert f"checkpoint-4 ignored: {file.relative_to(newest)} is damaged" in caplog.text
    assert resumed.history == whole.history
    assert everything(broken.output) == everything(settings["output"])


def test_lora_is_fresh_or_taken_where_a_run_starts_from_weights(settings, tmp_path):
    needs("peft")
    plain = train(recipe(settings))
    start = {"init_from": settings["output"]}
    fresh = stages.build(recipe(settings, **LORA, **start, output=str(tmp_path / "second")))[0]
    for name, own in plain.model.trained_parameters():
        assert own.equal(fresh.state_dict()[name])
    second = train(recipe(settings, **LORA, **start, output=str(tmp_path / "second")))
    for only in (None, ["lora"]):
        third = {"init_from": {"path": str(tmp_path / "second"), "only": only}}
        model = stages.build(recipe(settings, **LORA, **third, output=str(tmp_path / "third")))[0]
        same = {name for name, own in second.model.trained_parameters() if own.equal(model.state_dict()[name])}
        names = {name for name, _ in model.trained_parameters()}
        assert same == (names if only is None else {name for name in names if ".lora_" in name})
    with pytest.raises(ValueError, match=r"init_from: .*unexpected \['llm.model.layers.0.self_attn.k_proj.lora_A"):
        stages.build(recipe(settings, init_from=str(tmp_path / "second"), output=str(tmp_path / "fourth")))
    with pytest.raises(ValueError, match="holds nothing of the lora that only asks for"):
        stages.build(recipe(settings, **LORA, init_from={"path": settings["output"], "only": "lora"}))


def test_a_trained_llm_to_start_from_is_pointed_at(settings, tmp_path, caplog):
    train(recipe(settings, train_llm=True))
    folder = Path(settings["output"]) / "model" / "llm"
    stages.build(recipe(settings, init_from=settings["output"]))
    assert f"was trained with the LLM in {folder}; give that as llm too" in caplog.text
    caplog.clear()
    stages.build(recipe(settings, init_from=settings["output"], llm=str(folder)))
    assert "give that as llm" not in caplog.text


@pytest.mark.parametrize("way", WAYS)
def test_an_llm_alone(settings, way):
    """The paper's rows of LLMs trained further on the task's data: no encoder, an LLM in the end that anything loads."""
    needs("peft")
    run = alone(settings, **WAYS[way], stages__task={"steps": 30})
    model, processor, history = train(run)
    losses = [entry["loss"] for entry in history["task"] if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = LayAlignForConditionalGeneration.from_pretrained(f"{run.output}/model")
    batch = processor(["moja mbili"], target=["one two"])
    with torch.no_grad():
        assert loaded.encoder is None and torch.equal(loaded(**batch).loss, model(**batch).loss)
    if way == "lora":
        loaded.merge_lora().save_pretrained(f"{run.output}/merged")
        llm = AutoModelForCausalLM.from_pretrained(f"{run.output}/merged/llm")
    else:
        llm = AutoModelForCausalLM.from_pretrained(f"{run.output}/model/llm")
        answerer = LLM(llm=f"{run.output}/model/llm").load("answer : {text}")
        assert len(answerer(["moja"])) == 1
    with torch.no_grad():
        torch.testing.assert_close(llm(batch["input_ids"]).logits, model.llm(batch["input_ids"]).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "encoder: required, a name or a folder; only an LLM alone, with train_llm or lora, is trained without"),
        ({"train_llm": True, "model": {"adapter": "mlp"}}, "encoder: required: adapter and aligner join it to the LLM"),
        ({"train_llm": True, "lora": {}}, "model: train_llm and lora"),
        (
            {"train_llm": True, "quantization": "4bit"},
            "model: train_llm and quantization: a quantised LLM is only ever",
        ),
        (
            {"train_llm": True, "llm_input": {"task": False}},
            "stages.task: without an encoder and with llm_input.task false",
        ),
        (
            {"train_llm": True, "stages__task": {"train": ["adapter"]}},
            "stages.task.train: this recipe trains no adapter; it has llm",
        ),
    ],
)
def test_wrong_settings_of_an_llm_alone(settings, changes, message):
    with pytest.raises(ValueError) as caught:
        alone(settings, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_llm": True, "model": {"adapter": None, "aligner": None}},
            "encoder: adapter and aligner are both none",
        ),
        (
            {"lora": {}, "stages__task": {"train": ["adapter"]}},
            "lora: no stage trains it (by default the task stage does)",
        ),
        ({"train_llm": True, "stages__task": {"train": ["gates"]}}, "train_llm: no stage trains it"),
        ({"lora": {}, "stages__translation": {"llm_learning_rate": 1e-5}}, "stages.translation.llm_learning_rate"),
    ],
)
def test_settings_that_do_not_go_together(settings, changes, message):
    with pytest.raises(ValueError) as caught:
        recipe(settings, **changes)
    assert message in str(caught.value)


def test_what_is_not_installed_is_named_with_the_recipe(settings, monkeypatch):
    from layalign import quantization

    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantization: 4bit needs bitsandbytes or torchao, which is not installed"):
        recipe(settings, quantization={"llm": "4bit"})


@pytest.mark.slow
def test_two_processes_train_lora_and_llm_together(recipe_file, together, tmp_path):
    """All that is trained is the same in both and learns what one process does; the LLM is saved once."""
    for way, changes in WAYS.items():
        settings = yaml.safe_load(recipe_file.read_text()) | changes
        settings["stages"]["task"] |= {"save_steps": 3}
        if way == "lora":
            needs("peft")
            settings["lora"] = {"rank": 2}
        for stage in settings["stages"].values():
            stage |= {"batch_size": 5, "global_batch_size": 10}
        file = tmp_path / f"{way}.yaml"
        file.write_text(yaml.safe_dump(settings))
        one, two = tmp_path / f"{way}-one", tmp_path / f"{way}-two"
        history = train(load_recipe(file, [f"output={one}"])).history["task"]
        (job,) = together(file, (2, [f"output={two}"], {}))
        assert job["statuses"] == [0, 0], job["errors"]
        found = json.loads((two / "task" / "final" / "history.json").read_text())
        assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in history], rel=1e-3)
        expected = tensors(one / "model")
        for name, value in tensors(two / "model").items():
            torch.testing.assert_close(value, expected[name], atol=5e-3, rtol=1e-2)
