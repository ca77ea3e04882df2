"""Starting from weights: ours or the published file, whole or a part, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from layalign import LayAlignForConditionalGeneration
from layalign.loading import load_llm
from layalign.train import stages
from layalign.train.initial import PARTS
from layalign.train.recipe import InitFrom, load_recipe
from layalign.train.stages import train

MARKS = {"adapter": "adapter.", "aligner": "aligner.", "gates": "fusion_gate"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "first"


@pytest.fixture
def trained(recipe_file, kept, tmp_path):
    """The output of a finished run whose gates are open, a copy of one that the first test makes, and its trained part."""
    if not kept.exists():
        train(load_recipe(recipe_file, [f"output={kept}", "stages.task.steps=2", "stages.task.save_steps=1"]))
    shutil.copytree(kept, tmp_path / "first")
    weights = load_file(tmp_path / "first" / "model" / "model.safetensors")
    assert all(value.any() for value in weights.values())
    return tmp_path / "first", weights


@pytest.fixture
def published(trained, tmp_path):
    LayAlignForConditionalGeneration.from_pretrained(trained[0] / "model").save_published(
        tmp_path / "pytorch_model.bin"
    )
    return tmp_path / "pytorch_model.bin"


def begun(recipe):
    """The weights that a recipe begins with."""
    return {name: value.detach() for name, value in stages.build(recipe)[0].trained_parameters()}


@pytest.mark.parametrize("place", ["", "model", "task", "task/final", "task/checkpoint-1", "model/model.safetensors"])
def test_what_we_write_can_be_started_from(recipe_file, trained, place):
    found = begun(load_recipe(recipe_file, [f"init_from={trained[0] / place}"]))
    expected = trained[1]
    if place == "task/checkpoint-1":
        expected = load_file(trained[0] / place / "model.safetensors")
    assert all(value.equal(expected[name]) for name, value in found.items())


def test_the_published_file_can_be_started_from(recipe_file, trained, published):
    for path in (published, published.parent):
        found = begun(load_recipe(recipe_file, [f"init_from={path}"]))
        assert all(value.equal(trained[1][name]) for name, value in found.items())


@pytest.mark.parametrize("source", ["ours", "published"])
@pytest.mark.parametrize("only", [["adapter"], ["aligner"], ["gates"], ["gates", "adapter"], "adapter"])
def test_a_part_is_taken_and_the_others_are_fresh(recipe_file, trained, published, source, only):
    path = trained[0] if source == "ours" else published
    fresh = begun(load_recipe(recipe_file))
    found = begun(load_recipe(recipe_file, [f"init_from={json.dumps({'path': str(path), 'only': only})}"]))
    assert {*MARKS, "lora"} == set(PARTS)
    for name, value in found.items():
        taken = any(MARKS[part] in name for part in ([only] if isinstance(only, str) else only))
        assert value.equal((trained[1] if taken else fresh)[name]), name
        assert not trained[1][name].equal(fresh[name])


def test_an_ablation_need_not_repeat_the_translation_stage(recipe_file, tmp_path):
    both = train(load_recipe(recipe_file))
    settings = yaml.safe_load(recipe_file.read_text())
    settings |= {"init_from": str(Path(settings["output"]) / "translation"), "output": str(tmp_path / "task_alone")}
    del settings["stages"]["translation"]
    recipe_file.write_text(yaml.safe_dump(settings))
    alone = train(load_recipe(recipe_file))
    assert alone.history["task"] == both.history["task"]
    for name, value in alone.model.trained_parameters():
        assert value.equal(dict(both.model.trained_parameters())[name])


def test_an_adapter_fits_a_model_without_an_aligner(recipe_file, trained, published):
    for path in (trained[0], published):
        overrides = ["model.aligner=null", f"init_from.path={path}", "init_from.only=[adapter]"]
        found = begun(load_recipe(recipe_file, overrides))
        assert found and all(value.equal(trained[1][name]) for name, value in found.items())


def test_what_was_loaded_belongs_to_the_run(recipe_file, trained, tmp_path):
    shutil.copytree(trained[0] / "model", tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    recipe = load_recipe(recipe_file, [f"init_from={trained[0]}"])
    history = train(recipe).history
    # The same weights elsewhere are the same start; others, or a part of them, are another.
    assert train(load_recipe(recipe_file, [f"init_from={tmp_path / 'copy'}"])).history == history
    for overrides, message in (
        ([], r"init_from.only: 'adapter, aligner, gates' there, '\(not set\)' here"),
        (
            [f"init_from.path={trained[0]}", "init_from.only=[adapter]"],
            r"init_from.only: 'adapter, aligner, gates' there, 'adapter' here",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_recipe(recipe_file, overrides))
    weights = load_file(file)
    weights["adapter.boundary"][0] += 1
    save_file(weights, file)
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"init_from.sha256"):
        train(load_recipe(recipe_file, [f"init_from={tmp_path / 'copy'}"]))


def cut(folder):
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def no_safetensors(folder):
    (folder / "model" / "manifest.json").unlink()
    (folder / "model" / "model.safetensors").write_bytes(b"weights")


def cut_without_manifest(folder):
    cut(folder)
    (folder / "model" / "manifest.json").unlink()


def flip(folder):
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change(**changes):
    """Save a trained part with tensors changed; None: left out."""

    def write(folder):
        file = folder / "model" / "model.safetensors"
        weights = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in weights.items() if value is not None}, file)
        (folder / "model" / "manifest.json").unlink()

    write.__name__ = "_".join(changes)
    return write


def without(part):
    def write(folder):
        file = folder / "model" / "model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if MARKS[part] not in name}, file)
        (folder / "model" / "manifest.json").unlink()

    write.__name__ = f"without_{part}"
    return write


ALL, ADAPTER = None, ["adapter"]
DAMAGED = [
    (cut, ALL, r"model is damaged: model.safetensors has \d+ bytes instead of"),
    (flip, ALL, r"model is damaged: model.safetensors is damaged \(its hash"),
    (no_safetensors, ALL, r"model.safetensors is damaged or no safetensors file"),
    (cut_without_manifest, ALL, r"model.safetensors is damaged or no safetensors file"),
    (change(adapter__boundary=None), ALL, r"does not fit this model: missing \['adapter.boundary'\]"),
    (change(adapter__boundary=None), ADAPTER, r"missing \['adapter.boundary'\]"),
    (change(adapter__linear3=torch.ones(2)), ALL, r"unexpected \['adapter.linear3'\]"),
    (change(adapter__boundary=torch.ones(5)), ALL, r"adapter.boundary has shape \(5,\), the model needs \(32,\)"),
    (change(aligner__mix__bias=torch.ones(2)), ALL, r"aligner.mix.bias has shape \(2,\), the model needs"),
    (without("aligner"), ALL, r"missing \['aligner.mix.bias', 'aligner.mix.weight'"),
    (without("aligner"), ["aligner"], r"holds nothing of the aligner that only asks for"),
    (without("gates"), ["adapter", "gates"], r"holds nothing of the gates that only asks for"),
    (without("adapter"), ADAPTER, r"holds nothing of the adapter that only asks for"),
]


@pytest.mark.parametrize(
    ("harm", "only", "message"), DAMAGED, ids=[f"{harm.__name__}-{only}" for harm, only, _ in DAMAGED]
)
def test_a_damaged_or_other_trained_part_is_refused(recipe_file, trained, harm, only, message):
    harm(trained[0])
    with pytest.raises(ValueError, match=message) as caught:
        recipe = load_recipe(recipe_file)
        recipe.init_from = InitFrom(path=str(trained[0]), only=only)
        train(recipe)
    assert str(caught.value).startswith("init_from: ")
    assert str(trained[0]) in str(caught.value)


def test_other_models_weights_are_refused(recipe_file, trained, published, tmp_path):
    for path, settings, message in (
        (trained[0], ["model.gate=head"], r"fusion_gate.value has shape \(1,\), the model needs \(4,\)"),
        (trained[0], ["model.adapter=linear"], r"missing|unexpected \['adapter.linear1"),
        (trained[0], ["model.aligner=mlp"], r"missing \['aligner.project2.bias'"),
        (trained[0], ["model.aligner=null"], r"unexpected \['aligner.mix.bias'"),
        (published, ["model.llm_layers=[1]"], r"was trained with 2 LLM layers, the given LLM has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stages.build(load_recipe(recipe_file, [*settings, f"init_from={path}"]))
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "nowhere is not there; it takes the folder of a trained model"),
        (tmp_path / "empty", "empty holds no trained part"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(recipe_file, [f"init_from={path}"])
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.bin")
    torch.save({"weight": print}, tmp_path / "code.bin")
    (tmp_path / "text.bin").write_text("weights")
    for name, message in (
        ("other.bin", "not a published LayAlign state dict"),
        ("code.bin", "damaged, or holds more than tensors"),
        ("text.bin", "damaged, or holds more than tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_recipe(recipe_file, [f"init_from={tmp_path / name}"]))
    state = torch.load(published)
    for name in ("mapping.end_boundary", "mapping.mlp.linear2.bias"):
        torch.save({key: value for key, value in state.items() if key != name}, published)
        with pytest.raises(ValueError, match=r"no tensor mapping.end_boundary|missing \['adapter.linear2.bias'\]"):
            stages.build(load_recipe(recipe_file, [f"init_from={published}"]))


def test_the_first_weights_depend_on_the_seed_alone(recipe_file, monkeypatch):
    """Not on what loading the bases draws. That is nothing, as they are built on the meta device; but torch keeps the first
    answer to which functions obey a device, and a test that replaces torch.empty before may leave its own in there."""
    first = begun(load_recipe(recipe_file))
    obeying = torch.utils._device._device_constructors() - {torch.empty}
    monkeypatch.setattr(torch.utils._device, "_device_constructors", lambda: obeying)
    before = torch.get_rng_state()
    load_llm(load_recipe(recipe_file).llm)
    assert not before.equal(torch.get_rng_state())
    assert all(value.equal(first[name]) for name, value in begun(load_recipe(recipe_file)).items())
    other = begun(load_recipe(recipe_file, ["seed=1"]))
    assert not other["adapter.boundary"].equal(first["adapter.boundary"])
