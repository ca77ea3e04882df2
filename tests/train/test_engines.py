"""Processes that share a step by DDP, FSDP2 or DeepSpeed train what one process does, and go on from each other's checkpoints."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from layalign import LayAlignForConditionalGeneration
from layalign.configuration import STAGES
from layalign.train import engines, stages
from layalign.train.checkpoints import seal
from layalign.train.data.sampling import EpochSampler
from layalign.train.engines import ZERO, check_engine, own_environment, read_deepspeed
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.settings import build
from layalign.train.stages import train

STEPS = 20
SHARDED = {"fsdp2": ["parallel=fsdp2"]}
if find_spec("deepspeed"):
    SHARDED |= {name: ["parallel=deepspeed", f"deepspeed={name}"] for name in ("zero2", "zero3")}
SHORT = [f"stages.{name}.{key}" for name in ("translation", "task") for key in ("steps=10", "save_steps=4")]
# So that what is rounded in one step is not what the next ones begin with.
STILL = [f"stages.{name}.learning_rate=1e-12" for name in ("translation", "task")]
HALVES = [f"stages.{name}.batch_size=1" for name in ("translation", "task")]


def assert_statuses(jobs, expected):
    """Of each job, what its processes ended with; else what those said that ended otherwise."""
    otherwise = [job for job, statuses in zip(jobs, expected, strict=True) if job["statuses"] != statuses]
    said = "\n".join(error[-9000:] for job in otherwise for error in job["errors"])
    assert [job["statuses"] for job in jobs] == expected, said


def assert_ended(job):
    assert_statuses([job], [[0] * len(job["statuses"])])


def assert_same_run(found, expected, tolerance=1e-5):
    """Both stages' losses and weights."""
    for name in ("translation", "task"):
        histories = [json.loads((folder / name / "final" / "history.json").read_text()) for folder in (found, expected)]
        for key in ("loss", "eval_loss"):
            curves = [[entry[key] for entry in history if key in entry] for history in histories]
            assert curves[0] == pytest.approx(curves[1], rel=tolerance), (name, key)
        one, other = (load_file(folder / name / "final" / "model.safetensors") for folder in (found, expected))
        assert one.keys() == other.keys()
        for key in one:
            assert (one[key] - other[key]).abs().max() <= tolerance, key
            assert one[key].dtype == other[key].dtype
    for file in ("config.json", "processor_config.json"):
        assert (found / "model" / file).read_bytes() == (expected / "model" / file).read_bytes()


@pytest.fixture
def recipe(recipe_file):
    """Both stages; in the first an epoch is no whole number of steps, the second evaluates and keeps its best weights."""
    settings = yaml.safe_load(recipe_file.read_text())
    for stage in settings["stages"].values():
        stage |= {"global_batch_size": 4, "batch_size": 2, "steps": STEPS, "save_steps": 8, "learning_rate": 1e-3}
        stage["eps"] = 1e-5  # with less, Adam makes a step of its full size of a gradient that is rounding alone
    settings["stages"]["task"] |= {"hold_out": 2, "eval_steps": 6, "eval_batch_size": 1, "keep": "best"}
    settings["stages"]["task"]["gradient_checkpointing"] = True
    recipe_file.write_text(yaml.safe_dump(settings))
    return recipe_file


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe, together, tmp_path):
    """To 1e-5 over 20 steps of either stage, with the same global batch; and each holds half of the bases' bytes."""
    ways = {"ddp": [], **SHARDED}
    jobs = [(1, [f"output={tmp_path / 'one'}"], {})]
    # The labels are scored in parts, with a backward pass of each part within the forward call.
    jobs += [(2, [f"output={tmp_path / name}", *HALVES, *keys], {"logits": 64}) for name, keys in ways.items()]
    for name, job in zip(["one", *ways], together(recipe, *jobs), strict=True):
        assert_ended(job)
        for process in job["held"]:
            for mine, every in process:
                assert mine / every == pytest.approx(0.5 if name in ("fsdp2", "zero3") else 1, abs=0.01), name
        assert_same_run(tmp_path / name, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "model" / "config.json").read_text())["architectures"] == [
        "LayAlignForConditionalGeneration"
    ]
    loaded = [LayAlignForConditionalGeneration.from_pretrained(tmp_path / name / "model") for name in ("one", "fsdp2")]
    assert loaded[1].gates() == pytest.approx(loaded[0].gates(), abs=1e-5)
    assert loaded[0].gates().abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ["train_llm=true"],
        pytest.param(
            ["lora={rank: 2}"], marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")
        ),
        ["train_llm=true", "encoder=null", "llm_input.translation=true", "stages.translation.prompt='{source}'"],
    ],
    ids=["llm", "lora", "llm alone"],
)
def test_what_is_trained_beside_is_sharded_too(recipe, together, tmp_path, keys):
    """LoRA and the LLM, whose key and value weights the aligner uses outside their layers, packed."""
    keys = [*keys, *SHORT, "stages.task.packing=true"]
    jobs = [(1, [f"output={tmp_path / 'one'}", *keys], {})]
    jobs += [(2, [f"output={tmp_path / 'two'}", *keys, *HALVES, "parallel=fsdp2"], {})]
    for job in together(recipe, *jobs):
        assert_ended(job)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_under_another_engine_in_another_number_of_processes(recipe, together, tmp_path):
    """From checkpoints of step 4 and 8, the task stage's with best weights in it; the first stage's epochs are no whole steps."""
    moved, back = ([f"output={tmp_path / name}", *SHORT] for name in ("moved", "back"))
    jobs = together(
        recipe,
        (1, [f"output={tmp_path / 'one'}", *SHORT], {}),
        (2, [*moved, "parallel=fsdp2"], {"stop": 5}),
        (1, moved, {"stop": 9}),
        (2, moved, {}),
        (1, back, {"stop": 5}),
        (2, [*back, "parallel=fsdp2"], {"stop": 9}),
        (1, back, {"stop": 7}),
        (2, [*back, "parallel=fsdp2"], {}),
    )
    assert_statuses(jobs, [[0], [9, 9], [9], [0, 0], [9], [9, 9], [9], [0, 0]])
    for name in ("moved", "back"):
        assert_same_run(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("way", SHARDED)
def test_a_sharded_run_that_was_ended_goes_on_bit_identical(recipe, together, tmp_path, way):
    whole, broken = ([f"output={tmp_path / name}", *SHORT, *SHARDED[way]] for name in ("whole", "broken"))
    jobs = together(recipe, (2, whole, {}), (2, broken, {"stop": 6}), (2, broken, {"stop": 5}), (2, broken, {}))
    assert_statuses(jobs, [[0, 0], [9, 9], [9, 9], [0, 0]])
    for file in ("translation/final/model.safetensors", "task/final/history.json", "model/model.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in SHARDED if way != "zero2"])
def test_shards_are_gathered_by_all_processes_alike(recipe, together, tmp_path, way):
    """Packed: a process' questions are of one length or of several, which are read in as many calls where the encoder is whole; and some
    steps have fewer examples than processes."""
    settings = yaml.safe_load(recipe.read_text())
    settings["stages"]["translation"] |= {"packing": True, "batch_size": 1}
    del settings["stages"]["task"]["batch_size"]
    settings["stages"]["task"] |= {"packing": True, "batch_tokens": 32, "global_batch_size": 3}
    recipe.write_text(yaml.safe_dump(settings))
    keys = [*SHORT, *SHARDED[way], *([] if way == "zero3" else ["train_llm=true"])]
    whole, broken = ([f"output={tmp_path / name}", *keys] for name in ("whole", "broken"))
    cheap = {"call_tokens": 0, "logits": 64}
    jobs = together(
        recipe,
        (2, whole, cheap),
        (2, broken, cheap | {"stop": 9}),
        (2, broken, cheap | {"stop": 7}),
        (2, broken, cheap),
    )
    assert_statuses(jobs, [[0, 0], [9, 9], [9, 9], [0, 0]])
    for file in ("translation/final/model.safetensors", "task/final/history.json", "model/model.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_bf16_is_autocast_over_fp32_in_every_way(recipe, together, tmp_path):
    """Nothing is rounded beside what autocast rounds: neither the loss nor a gradient. DeepSpeed's own product of ZeRO-3 hears of
    autocast on a GPU alone."""
    sharded = [way for way in SHARDED if way != "zero3"]
    ways = {"one": [], "fp32": [], **{way: [*HALVES, *SHARDED[way]] for way in sharded}}
    precision = {
        way: [f"stages.{name}.precision={'fp32' if way == 'fp32' else 'bf16'}" for name in STAGES] for way in ways
    }
    jobs = [
        (2 if way in sharded else 1, [f"output={tmp_path / way}", *SHORT, *STILL, *ways[way], *precision[way]], {})
        for way in ways
    ]
    for job in together(recipe, *jobs):
        assert_ended(job)

    def losses(way, key):
        history = json.loads((tmp_path / way / "task" / "final" / "history.json").read_text())
        return [entry[key] for entry in history if key in entry]

    for key in ("loss", "eval_loss"):
        assert losses("fp32", key) != pytest.approx(losses("one", key), rel=1e-4)
        for way in sharded:
            assert losses(way, key) == pytest.approx(losses("one", key), rel=1e-6), (way, key)


def test_hosts_that_do_not_share_the_folder_are_told(settings, monkeypatch):
    run = build(Recipe, settings)
    train(run)
    gathered = stages.gather_object

    def other_host(found):
        return (
            [*gathered(found), [[] for _ in STAGES]]
            if isinstance(found[0], list) and len(found[0]) > 2
            else gathered(found)
        )

    monkeypatch.setattr(stages, "gather_object", other_host)
    with pytest.raises(ValueError, match=r"output: processes \[1\] do not see in .*run what the first process does"):
        train(run)


@pytest.mark.slow
def test_what_cannot_go_on_is_refused_by_every_process_at_once(recipe, together, tmp_path):
    fixed = [f"output={tmp_path / 'run'}", *SHORT, "stages.translation.gradient_accumulation=2"]
    settings = yaml.safe_load(recipe.read_text())
    del settings["stages"]["translation"]["global_batch_size"]
    recipe.write_text(yaml.safe_dump(settings))
    begun, fewer = together(recipe, (2, fixed, {"stop": 5}), (1, fixed, {}))
    assert (begun["statuses"], fewer["statuses"]) == ([9, 9], [2])
    assert "gradient_accumulation: " in fewer["errors"][0]
    assert "was written by 2 processes, and there are 1" in fewer["errors"][0]

    shutil.copytree(tmp_path / "run", tmp_path / "engine")
    for checkpoint in (tmp_path / "engine" / "translation").glob("checkpoint-*"):
        running = checkpoint / "running.json"
        running.write_text(json.dumps(json.loads(running.read_text()) | {"engine": "deepspeed, stage 3"}))
        (checkpoint / "manifest.json").unlink()
        seal(checkpoint)
    data = Path(settings["stages"]["translation"]["data"]["path"])
    other, changed = [f"output={tmp_path / 'engine'}", *fixed[1:]], data.with_name("changed.jsonl")
    changed.write_text(data.read_text().replace("moja", "mbili"))
    (engine,) = together(recipe, (2, other, {}))
    assert engine["statuses"] == [2, 2]
    assert all("was written under deepspeed, stage 3, and this is ddp" in error for error in engine["errors"])
    shutil.copy(changed, data)
    (altered,) = together(recipe, (2, fixed, {}))
    assert altered["statuses"] == [2, 2]
    assert all("no longer the data this run began with" in error for error in altered["errors"])
    assert altered["seconds"] < 25  # gloo's processes that wait for one that has left take 30 seconds to hear of it


@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_has_the_same_examples_in_any_number_of_processes(grouped):
    """As accelerate deals batches out, in an epoch of 10 examples and steps of 4; the last step is filled up with the first ones."""

    def steps(processes, batch_size, multiple=4):
        lengths = np.arange(10) % 3 if grouped else None
        order = EpochSampler(10, 3, batch_size, lengths, multiple=multiple)
        batches = BatchSampler(order, batch_size, drop_last=False)
        shards = [list(BatchSamplerShard(batches, processes, index)) for index in range(processes)]
        calls = 4 // (processes * batch_size)
        return [
            sorted(index for shard in shards for batch in shard[start : start + calls] for index in batch)
            for start in range(0, len(shards[0]), calls)
        ]

    for batch_size, counts in ((2, (1, 2)), (1, (1, 2, 4))):
        found = [steps(processes, batch_size) for processes in counts]
        assert [len(step) for step in found[0]] == [4, 4, 4]
        assert found.count(found[0]) == len(found)
    assert steps(1, 1, multiple=1) != steps(2, 1, multiple=1) or steps(1, 1, multiple=1) != steps(4, 1, multiple=1)


@pytest.mark.parametrize(
    ("environment", "parallel", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ddp", r"the environment asks for FSDP \(ACCELERATE_USE_FSDP=true\)"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2", "the recipe says fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "none", "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "ddp", "asks for Megatron-LM"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp2", "unset FSDP_OFFLOAD_PARAMS"),
        ({}, "fsdp2", "fsdp2 shards over processes, and there is one; start several"),
    ],
)
def test_an_engine_that_is_not_the_recipes_is_refused(recipe, monkeypatch, environment, parallel, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wanted = load_recipe(recipe, [f"parallel={parallel}"])
    with pytest.raises(ValueError, match=message):
        train(wanted)
    assert not Path(wanted.output).exists()


def test_shards_that_wait_on_the_cpu_need_another_device(recipe):
    with pytest.raises(
        ValueError, match=r"fsdp\.cpu_offload: the processes train on the CPU, where their shards lie anyway"
    ):
        check_engine(load_recipe(recipe, ["parallel=fsdp2", "fsdp.cpu_offload=true"]))


def test_deepspeed_that_is_not_installed_is_named(recipe, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"parallel: deepspeed is not installed; pip install deepspeed$"):
        check_engine(load_recipe(recipe, ["parallel=deepspeed"]))


def test_zero3_trains_no_llm(recipe, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"train_llm: under ZeRO-3 .*; set parallel to fsdp2, or deepspeed to zero2$"):
        check_engine(load_recipe(recipe, ["parallel=deepspeed", "train_llm=true"]))
    with pytest.raises(ValueError, match="there is one; start several"):
        check_engine(load_recipe(recipe, ["parallel=deepspeed", "train_llm=true", "deepspeed=zero2"]))


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("FSDP_VERSION", "1")
    before = dict(os.environ)
    with own_environment():
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
        del os.environ["FSDP_VERSION"]
    assert dict(os.environ) == before


WRONG_FILES = {
    "[1]": "has no zero_optimization with a stage of 1, 2 or 3",
    "{}": "has no zero_optimization",
    '{"zero_optimization": 3}': "has no zero_optimization",
    '{"zero_optimization": {"stage": 0}}': "with a stage of 1, 2 or 3",
    '{"zero_optimization": {"stage": "3"}}': "with a stage of 1, 2 or 3",
    '{"zero_optimization": {"stage": 3}': "takes zero2, zero3 or the path of a JSON file",
    '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}': "sets optimizer, which the recipe's own keys say",
    '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "train_batch_size": 8}': "sets train_batch_size, bf16",
}


@pytest.mark.parametrize(("content", "message"), WRONG_FILES.items())
def test_wrong_deepspeed_files(recipe, tmp_path, content, message):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="deepspeed: ") as caught:
        load_recipe(recipe, ["parallel=deepspeed", f"deepspeed={file}"])
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_deepspeed_files():
    assert sorted(path.stem for path in ZERO.glob("*.json")) == ["zero2", "zero3"]
    for stage in (2, 3):
        assert read_deepspeed(f"zero{stage}")["zero_optimization"]["stage"] == stage
        assert read_deepspeed(str(ZERO / f"zero{stage}.json")) == read_deepspeed(f"zero{stage}")
    for name in ("zero4", "../deepspeed/zero2", ""):
        with pytest.raises(ValueError, match="deepspeed: takes zero2, zero3 or the path of a JSON file"):
            read_deepspeed(name)
