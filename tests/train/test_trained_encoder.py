"""An encoder that a recipe trains: which stage does, by which rate, resuming, the plan, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train.plan.plan import make_plan
from layalign.train.recipe import Recipe
from layalign.train.settings import build
from layalign.train.stages import train
from tests.train.test_adapted import Seen, everything, recipe


def of_encoder(folder):
    return {name: own for name, own in load_file(folder / "model.safetensors").items() if name.startswith("encoder.")}


@pytest.mark.parametrize("kind", [True, "embeddings"])
def test_the_task_stage_trains_it_the_translation_stage_does_not(settings, kind, tmp_path):
    seen = Seen()
    rates = {"learning_rate": 0.01, "encoder_learning_rate": 1e-3}
    run = recipe(settings, train_encoder=kind, stages__task=rates)
    model, _, _ = train(run, callbacks=[seen])
    part = {"adapter": {0.01}, "aligner": {0.01}, "gates": {0.01}}
    assert seen.groups == [part, part | {"encoder": {1e-3}}]
    output = tmp_path / "run"
    assert not of_encoder(output / "translation" / "final")
    base = LayAlignForConditionalGeneration.from_pretrained(output / "translation" / "final").encoder
    trained = of_encoder(output / "model")
    first = {f"encoder.{name}": own for name, own in base.named_parameters()}
    assert len(trained) == (1 if kind == "embeddings" else len(first))
    assert all(not value.equal(first[name]) for name, value in trained.items())
    loaded = LayAlignForConditionalGeneration.from_pretrained(output / "model")
    batch = LayAlignProcessor.from_pretrained(output / "model")(["moja mbili"], target=["one two"])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    # Of all weights those that are not trained are the base's.
    rest = {name: own for name, own in loaded.named_parameters() if name in first and name not in trained}
    assert all(own.equal(first[name]) for name, own in rest.items())


def test_resumed_it_ends_as_if_it_had_not_been_stopped(settings, tmp_path):
    """With the dropout that an encoder has while it is trained."""
    stage = {"stages__task": {"save_steps": 2, "steps": 5}, "train_encoder": True}
    whole = train(recipe(settings, **stage))
    broken = recipe(settings, output=str(tmp_path / "broken"), **stage)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("task") and state.global_step == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(broken, callbacks=[Stop()])
    again = train(broken)
    assert again.history == whole.history
    assert everything(tmp_path / "broken") == everything(tmp_path / "run")


def test_a_stage_trains_it_where_it_is_named(settings, tmp_path):
    """LangBridge's kind: a linear adapter and the encoder, in one stage."""
    settings = copy.deepcopy(settings)
    settings["stages"] = {"translation": settings["stages"]["translation"] | {"train": ["adapter", "encoder"]}}
    settings |= {"train_encoder": True, "model": {"adapter": "linear", "aligner": None}}
    train(build(Recipe, settings))
    assert of_encoder(tmp_path / "run" / "model")
    with pytest.raises(ValueError, match="holds a trained encoder, which no run can begin with"):
        train(build(Recipe, settings | {"output": str(tmp_path / "next"), "init_from": str(tmp_path / "run")}))


def test_the_plan_counts_it(settings):
    frozen = make_plan(recipe(settings))
    whole, part = (make_plan(recipe(settings, train_encoder=kind)) for kind in (True, "embeddings"))
    count = frozen["parameters"]["frozen"]["encoder"]
    assert whole["parameters"]["trained"]["encoder"] == count and whole["parameters"]["frozen"]["encoder"] == 0
    embeddings = part["parameters"]["trained"]["encoder"]
    assert 0 < embeddings < count and part["parameters"]["frozen"]["encoder"] == count - embeddings
    steps = [plan["stages"]["task"]["operations_a_step"] for plan in (frozen, part, whole)]
    assert steps == sorted(set(steps))
    memory = [plan["stages"]["task"]["memory"]["optimizer"] for plan in (frozen, part, whole)]
    assert memory[2] - memory[0] == 8 * count and memory[1] - memory[0] == 8 * embeddings
    assert {plan["stages"]["translation"]["memory"]["optimizer"] for plan in (frozen, part, whole)} == {memory[0]}
    assert "is not counted in the memory" in whole["notes"][-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_encoder": "layers"}, "train_encoder must be true, false or 'embeddings', got 'layers'"),
        ({"train_encoder": True, "stages__task": {"train": ["adapter"]}}, "train_encoder: no stage trains it"),
        ({"stages__task": {"train": ["encoder"]}}, "stages.task.train: this recipe trains no encoder"),
        ({"stages__task": {"encoder_learning_rate": 1e-5}}, "stages.task.encoder_learning_rate: this stage does not"),
        ({"train_encoder": True, "quantization": {"encoder": "4bit"}}, "a quantised encoder is only ever frozen"),
    ],
)
def test_wrong_settings(settings, changes, message):
    with pytest.raises(ValueError) as caught:
        recipe(settings, **changes)
    assert message in str(caught.value)


def test_engines_that_shard_refuse_it(settings, monkeypatch):
    from layalign.train import engines

    class Two:
        num_processes = 2

    monkeypatch.setattr(engines, "processes", lambda _: Two())
    with pytest.raises(ValueError, match="train_encoder: is for parallel none and ddp; fsdp2 shards frozen encoders"):
        engines.check_engine(recipe(settings, train_encoder=True, parallel="fsdp2"))
