"""`layalign train --plan`: what it says, against what a run then does."""

import copy
import json
import shutil

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5EncoderModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from typer.testing import CliRunner

from bench.memory import peak_bytes, saved_bytes
from layalign.cli import app
from layalign.model import LayAlignForConditionalGeneration
from layalign.train import stages
from layalign.train.plan.cost import Batch, arithmetic, memory, sizes_of
from layalign.train.plan.machine import named_machine, this_machine
from layalign.train.plan.plan import empty_model, make_plan
from layalign.train.plan.text import plan_text
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.settings import build
from layalign.train.stages import train


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders with the config.json of the published bases and nothing else."""
    folder = tmp_path_factory.mktemp("published")
    MT5Config(
        vocab_size=250112,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        architectures=["MT5ForConditionalGeneration"],
    ).save_pretrained(folder / "mt5-xl")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(vocab_size=32001, dtype="float16", **sizes).save_pretrained(folder / "llm")
    return {"encoder": str(folder / "mt5-xl"), "llm": str(folder / "llm")}


def test_the_published_model_has_the_papers_numbers(published):
    """Table 10, and 1,670 M of Table 5."""
    recipe = load_recipe("math", [f"{role}={path}" for role, path in published.items()], check_files=False)
    plan = make_plan(recipe, 8, named_machine("L40"))
    trained = plan["parameters"]["trained"]
    assert trained == {"adapter": 25_178_112, "aligner": 8_394_304, "gates": 32, "total": 33_572_448}
    assert round(plan["parameters"]["frozen"]["encoder"] / 1e6) == 1670
    text = plan_text(plan)
    assert "33.57 M  adapter 25.18 M + aligner 8.39 M + gates 32" in text
    assert "128 examples = 8 processes x 8 x 2 accumulated" in text
    # The files are not there; what the recipe takes of them at most is known: 9 x 100,000 and 9 x 30,000, less 3,000.
    assert [stage["examples"] for stage in plan["stages"].values()] == [897_000, 267_000]
    assert [stage["steps"] for stage in plan["stages"].values()] == [3 * 7008, 3 * 2086]
    assert "at most 897,000, 3,000 held out" in text
    assert "note: translation: data files are missing: data/bilingual_pairs/en-bn/train_100k.bn" in text
    assert "note: a tokenizer is missing" in text
    for stage in plan["stages"].values():
        assert stage["memory"]["weights"] == 2 * (1_669_958_656 + 6_738_423_808) + 4 * 33_572_448
        assert stage["memory"]["total"] < plan["machine"]["memory"]


@pytest.mark.parametrize(
    ("engine", "weights", "rest"), [("fsdp2", 4, 4), ("deepspeed", 4, 4), ("zero2", 1, 4), ("ddp", 1, 1)]
)
def test_engines_share_what_they_hold(settings, engine, weights, rest):
    engines = {"zero2": {"parallel": "deepspeed", "deepspeed": "zero2"}}.get(engine, {"parallel": engine})
    alone = make_plan(build(Recipe, settings))["stages"]["task"]["memory"]
    shared = make_plan(build(Recipe, {**settings, **engines}), 4)["stages"]["task"]["memory"]
    assert shared["weights"] == -(-alone["weights"] // weights)
    copies = 2 if engine == "ddp" else 1
    assert (shared["gradients"], shared["optimizer"]) == (
        copies * -(-alone["gradients"] // rest),
        -(-alone["optimizer"] // rest),
    )
    assert shared["activations"] == alone["activations"]
    assert ("gathered" in shared) == (weights > 1)


def test_token_budgets(settings):
    """As many calls in a step, and as many steps, as training makes."""
    changes = {"packing": True, "batch_tokens": 24, "global_batch_size": 5, "epochs": 2}
    settings = copy.deepcopy(settings)
    del settings["stages"]["translation"], settings["stages"]["task"]["steps"], settings["stages"]["task"]["batch_size"]
    settings["stages"]["task"] |= changes
    recipe = build(Recipe, settings)
    plan = make_plan(recipe)["stages"]["task"]
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(args.gradient_accumulation_steps)

    history = train(recipe, [Look()]).history["task"]
    assert plan["steps"] == history[-1]["step"] == 4
    assert plan["accumulation"] == seen[0] > 1
    assert plan["global_batch"] == 5
    assert "at most 24 tokens" in plan_text(make_plan(recipe))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"aligner": "mlp", "gate": "head"},
        {"aligner": None, "adapter": "linear"},
        {"adapter": None, "gate": "dynamic"},
    ],
)
def test_parameters_are_those_of_the_built_model(settings, model):
    recipe = build(Recipe, {**settings, "model": model})
    plan, (built, _) = make_plan(recipe), stages.build(recipe)
    assert plan["parameters"]["trained"]["total"] == built.num_trained_parameters
    assert plan["parameters"]["frozen"]["encoder"] == sum(value.numel() for value in built.encoder.parameters())
    frozen = [value for value in built.llm.parameters() if not value.requires_grad]
    assert plan["parameters"]["frozen"]["llm"] == sum(value.numel() for value in frozen)
    empty = empty_model(recipe)
    assert {name: (value.shape, value.dtype) for name, value in empty.named_parameters()} == {
        name: (value.shape, value.dtype) for name, value in built.named_parameters()
    }
    assert all(value.is_meta for value in empty.parameters())


@pytest.mark.parametrize("beside", [{"lora": {"rank": 3}}, {"train_llm": True}, {"train_llm": True, "encoder": None}])
def test_what_is_trained_beside_the_trained_part_is_counted(settings, beside):
    if "lora" in beside:
        pytest.importorskip("peft")
    settings = settings | beside
    if "encoder" in beside:
        settings["stages"] = {"task": settings["stages"]["task"]}
    recipe = build(Recipe, settings)
    plan = make_plan(recipe)
    empty = {name: value.shape for name, value in empty_model(recipe).named_parameters()}
    built = train(recipe).model
    assert plan["parameters"]["trained"]["total"] == built.num_trained_parameters
    assert empty == {name: value.shape for name, value in built.named_parameters()}
    counts = plan["parameters"]["trained"]
    part = counts["adapter"] + counts["aligner"] + counts["gates"]
    for name, stage in plan["stages"].items():
        trained = part if name == "translation" else counts["total"]
        assert stage["memory"]["optimizer"] == 2 * stage["memory"]["gradients"] == 8 * trained
    assert ("trained, float32" in plan_text(plan)) == ("train_llm" in beside)
    assert f"+ {'lora' if 'lora' in beside else 'llm'} " in plan_text(plan)


def test_quantised_bases_take_less(settings, monkeypatch):
    monkeypatch.setattr("layalign.quantization.find_spec", lambda name: name)
    plain = make_plan(build(Recipe, settings))["stages"]["task"]["memory"]["weights"]
    sizes = sizes_of(empty_model(build(Recipe, settings)))
    plan = make_plan(build(Recipe, settings | {"quantization": {"llm": "4bit"}}))
    saved = plain - plan["stages"]["task"]["memory"]["weights"]
    assert saved == pytest.approx(sizes.llm_layers * (4 - 4.5 / 8), abs=1)
    assert plan["bases"]["llm"]["dtype"] == "4bit" and plan["bases"]["encoder"]["dtype"] == "float32"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 4}},
        {"train_llm": True},
        {"encoder": None, "train_llm": True},
        {"encoder": None, "lora": {"rank": 2}},
    ],
)
def test_trained_llms_and_lora(settings, changes):
    """What is trained in the task stage is what the model trains, and gradients and the optimizer are its."""
    if "lora" in changes:
        pytest.importorskip("peft")
    settings = copy.deepcopy(settings)
    del settings["stages"]["translation"]
    recipe = build(Recipe, settings | changes)
    plan, seen = make_plan(recipe), []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(sum(value.numel() for value in model.parameters() if value.requires_grad))

    recipe.stages["task"].steps = 1
    train(recipe, [Look()])
    assert plan["parameters"]["trained"]["total"] == seen[0]
    assert plan["stages"]["task"]["memory"]["gradients"] == 4 * seen[0]
    assert plan["stages"]["task"]["memory"]["optimizer"] == 8 * seen[0]
    assert plan["notes"] == []
    assert plan_text(plan)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"epochs": 2.5, "batch_size": 4, "gradient_accumulation": 2}, 5),
        ({"epochs": 1, "batch_size": 3}, 4),
        ({"epochs": 3, "batch_size": 4, "hold_out": 3}, 6),
        ({"steps": 7}, 7),
    ],
)
def test_steps_are_those_that_the_run_takes(settings, changes, steps):
    settings = copy.deepcopy(settings)
    del settings["stages"]["translation"]
    stage = settings["stages"]["task"]
    del stage["steps"]
    recipe = build(Recipe, {**settings, "stages": {"task": stage | changes}})
    planned = make_plan(recipe)["stages"]["task"]
    assert planned["steps"] == train(recipe).history["task"][-1]["step"] == steps
    assert planned["examples"] == 10 - changes.get("hold_out", 0)


def _llama():
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2000, num_key_value_heads=4, pad_token_id=0, **sizes))


def _qwen():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=4000, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, **sizes)
    )


@pytest.mark.parametrize("llm", [_llama, _qwen])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_llm", [False, True])
def test_memory_is_what_a_step_allocates(llm, autocast, checkpointing, train_llm):
    """Within 1.3 of PyTorch's own record, and near what autograd keeps; operations within 1.4 of those counted."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"vocab_size": 512, "d_model": 192, "d_kv": 32, "d_ff": 384, "num_layers": 4, "num_heads": 6}
    model = LayAlignForConditionalGeneration.from_bases(
        MT5EncoderModel(MT5Config(**sizes)), llm(), train_llm=train_llm
    ).train()
    batch = Batch(4, 48, 120, 40)
    ids, text = torch.randint(4, 500, (4, 48)), torch.randint(4, 500, (4, 120))
    labels = text.clone()
    labels[:, :80] = -100
    if checkpointing:
        stages._checkpointing(model, "enable")

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(encoder_input_ids=ids, input_ids=text, labels=labels)

    forward().loss.backward()
    trained = ("adapter", "aligner", "gates", "llm")[: 4 if train_llm else 3]
    planned = memory(sizes_of(model), batch, autocast, checkpointing, True, trained)
    step = planned["activations"] + planned["logits"]
    peak = peak_bytes(lambda: forward().loss.backward(), torch.device("cpu"))
    assert 1 / 1.3 < step / peak < 1.3
    if not checkpointing:
        assert 1 / 1.3 < step / saved_bytes(forward, list(model.parameters())) < 1.3
    if not autocast:  # as many operations, and here bf16's take longest
        with FlopCounterMode(display=False) as counted:
            forward().loss.backward()
        assert 1 < arithmetic(sizes_of(model), batch, checkpointing, trained) / counted.get_total_flops() < 1.4


def test_the_command_plans_without_weights_and_writes_nothing(recipe_file, bases, tmp_path):
    for base in ("encoder", "llm"):
        shutil.copytree(bases[base], tmp_path / base, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = yaml.safe_load(recipe_file.read_text()) | {
        "encoder": str(tmp_path / "encoder"),
        "llm": str(tmp_path / "llm"),
    }
    recipe_file.write_text(yaml.safe_dump(settings))
    before = sorted(tmp_path.rglob("*"))
    run = CliRunner().invoke(
        app, ["train", str(recipe_file), "stages.task.epochs=4", "stages.task.steps=null", "--plan"]
    )
    assert run.exit_code == 0, run.output
    assert "12 (4 epochs)" in run.output
    assert "of the encoder," in run.output
    assert "note" not in run.output
    run = CliRunner().invoke(app, ["train", str(recipe_file), "--plan", "--json", "--processes", "2", "--gpu", "h100"])
    plan = json.loads(run.stdout)
    assert plan["processes"] == 2
    assert plan["stages"]["task"]["global_batch"] == 8
    assert plan["seconds"] > 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--gpu", "h1000"], "gpu: got 'h1000', takes a100"),
        (["--plan", "llm=nowhere/at-all"], "llm 'nowhere/at-all' is neither a folder"),
        (["--plan", "encoder=layalign:tiny"], "no base called 'layalign:tiny'"),
        (
            ["--plan", "stages.task.global_batch_size=8", "--processes", "3"],
            "stages.task.global_batch_size: 8 examples do not",
        ),
        (["--plan", "stages.task.stepz=3"], "did you mean 'steps'"),
        (["--json"], "--json goes with --plan"),
        (["--processes", "2"], "--processes goes with --plan"),
        (["--gpu", "h100"], "--gpu goes with --plan"),
    ],
)
def test_plans_that_cannot_be_made(recipe_file, words, message):
    run = CliRunner().invoke(app, ["train", str(recipe_file), *words])
    assert isinstance(run.exception, ValueError)
    assert message in str(run.exception)


def test_each_precision_has_its_speed(settings):
    """A GPU's tensor cores, and its other cores for fp32; what is left to the machine is the named one's."""
    speeds = {"bf16": 0.4 * 989e12, "fp32": 0.4 * 67e12}
    stage, settings["device"] = settings["stages"]["task"], "auto"
    for given, taken in (("bf16", "bf16"), ("fp32", "fp32"), ("auto", "bf16")):
        stage["precision"] = given
        plan = make_plan(build(Recipe, settings), 1, named_machine("h100"))
        planned = plan["stages"]["task"]
        assert planned["seconds"] == pytest.approx(planned["steps"] * planned["operations_a_step"] / speeds[taken])
        assert plan["machine"]["flops_per_second"] == speeds
    assert "h100 (989 TFLOP/s in bf16 and 67 TFLOP/s in fp32 by its data sheet, 40% of it taken)" in plan_text(plan)


def test_an_llm_that_is_trained_is_in_fp32(settings):
    """Whatever the bases are in: the whole model is built in bf16, and the stage that trains the LLM has it in fp32."""
    settings |= {"model": {"dtype": "bfloat16"}, "train_llm": True, "parallel": "none"}
    settings["stages"]["task"] |= {"precision": "bf16"}

    def planned(processes=1, **changes):
        recipe = build(Recipe, settings | changes)
        stage = make_plan(recipe, processes)["stages"]["task"]
        return sizes_of(empty_model(recipe)), stage["memory"], stage["activations_if_checkpointing"]

    sizes, held, checkpointed = planned()
    assert sizes.llm_bytes == 2
    copies = 2 * sizes.llm_layers
    assert held["activations"] > copies and checkpointed > copies, "autocast keeps the copies of trained weights"
    assert planned(2, parallel="ddp")[1]["gradients"] == 2 * held["gradients"]
    _, shared, gathering = planned(2, parallel="fsdp2")
    of_llm = 2 * sizes.llm_layers // sizes.depth + sizes.llm - sizes.llm_layers
    assert shared["gathered"] == 4 * of_llm + 2 * (sizes.encoder - sizes.encoder_layers)
    assert gathering == checkpointed - copies + copies // sizes.depth


def test_a_bert_is_planned_as_well(settings, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(vocab_size=40, **sizes).save_pretrained(tmp_path / "bert")
    plan = make_plan(build(Recipe, {**settings, "encoder": str(tmp_path / "bert")}))
    assert plan["bases"]["encoder"]["class"] == "BertModel"


def test_this_machine_is_measured():
    machine = this_machine(["fp32"], cpu=True)
    assert machine.is_cpu
    assert "TFLOP/s in fp32 measured" in machine.name
    assert 1e8 < machine.flops_per_second["fp32"] < 1e14
    assert machine.memory > 1e8
