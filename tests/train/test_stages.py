import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train import stages
from layalign.train.data.sampling import EpochSampler
from layalign.train.plan.plan import make_plan
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.settings import build
from layalign.train.stages import train


def recipe(settings, **changes):
    settings = copy.deepcopy(settings)
    for stage in settings["stages"].values():
        stage.update(changes)
    return build(Recipe, settings)


def only(settings, name):
    return {**settings, "stages": {name: settings["stages"][name]}}


def trained(model):
    return {name: parameter.detach().clone() for name, parameter in model.trained_parameters()}


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def test_both_stages_learn_by_heart_and_only_the_trained_part_changes(settings, bases):
    run = recipe(settings, steps=60, batch_size=10, schedule="constant")
    untrained, _ = stages.build(run)
    before = untrained.state_dict()
    model, processor, history = train(run)
    assert list(history) == ["translation", "task"]
    for name in history:
        assert losses(history[name])[-1] < 0.5
    assert losses(history["translation"])[0] > 3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained(model))
    assert not any(parameter.requires_grad for parameter in (*model.encoder.parameters(), *_frozen(model.llm)))

    saved = f"{run.output}/model"
    loaded, loaded_processor = (
        LayAlignForConditionalGeneration.from_pretrained(saved),
        LayAlignProcessor.from_pretrained(saved),
    )
    assert loaded_processor.prompt_template == processor.prompt_template == "answer : {text}"
    card = (Path(saved) / "README.md").read_text()
    assert "# run\n" in card and "language:\n- sw\n" in card, card
    assert card.count("| languages | sw |") == 2, card
    for line in (
        "## Training: translation stage",
        "## Training: task stage",
        "| steps | 60 |",
        "| training loss at the end | 0.",
    ):
        assert line in card, card
    assert all(torch.equal(value, trained(loaded)[name]) for name, value in trained(model).items())
    record = run.stages["task"].data[0].records[3]
    ids = loaded.generate(**loaded_processor(record["source"]), max_new_tokens=8, do_sample=False)
    assert loaded_processor.batch_decode(ids, skip_special_tokens=True) == [record["target"]]


def _frozen(llm):
    return [parameter for name, parameter in llm.named_parameters() if "fusion_gate" not in name]


def test_the_optimizer_holds_the_trained_part_only(settings):
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            seen["same"] = held == {id(parameter) for _, parameter in model.trained_parameters()}
            group = optimizer.param_groups[0]
            seen["settings"] = (type(optimizer.optimizer).__name__, group["betas"], group["eps"], group["weight_decay"])

    train(recipe(only(settings, "task"), steps=1), callbacks=[Look()])
    assert seen == {"same": True, "settings": ("AdamW", (0.8, 0.999), 1e-8, 3e-7)}


def test_the_logged_rate_is_one_that_something_is_trained_at(settings):
    """A rate of the LLM's own leaves the groups empty that had it before."""
    values = only(settings, "task") | {"encoder": None, "train_llm": True}
    history = train(recipe(values, steps=2, llm_learning_rate=1e-3, schedule="constant", warmup_ratio=0)).history[
        "task"
    ]
    assert {entry["learning_rate"] for entry in history if "loss" in entry} == {1e-3}


@pytest.mark.parametrize("stage", ["translation", "task"])
def test_accumulated_steps_equal_one_big_batch(settings, stage):
    """Targets of unequal length: a mean of means would differ. In the translation stage the first token counts too."""
    settings = only(settings, stage)
    for record in settings["stages"][stage]["data"]["records"][::3]:
        record["target"] = "one"
    results = []
    for batch_size, accumulation in ((10, 1), (2, 5), (3, 4)):
        settings["output"] += "-next"
        run = recipe(settings, steps=3, batch_size=batch_size, gradient_accumulation=accumulation, warmup_ratio=0)
        model, _, history = train(run)
        results.append((history[stage], trained(model)))
    records = run.stages[stage].data[0].records
    model, processor = stages.build(run)
    prompts = [f"answer : {record['source']}" for record in records] if stage == "task" else None
    sources, targets = [record["source"] for record in records], [record["target"] for record in records]
    with torch.no_grad():
        loss = model(**processor(sources, prompt=prompts, target=targets)).loss.item()
    assert results[0][0][0]["loss"] == pytest.approx(loss, rel=1e-5)
    for history, parameters in results[1:]:
        for entry, first in zip(history, results[0][0], strict=True):
            assert entry["loss"] == pytest.approx(first["loss"], rel=1e-5)
            assert entry["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_run(settings):
    calls = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.handle = model.llm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

        def on_train_end(self, args, state, control, **kwargs):
            self.handle.remove()

    plain = train(recipe(settings, steps=3), callbacks=[Count()])
    assert len(calls) == 2 * 3
    settings["output"] += "-checkpointed"
    checkpointed = train(recipe(settings, steps=3, gradient_checkpointing=True), callbacks=[Count()])
    assert len(calls) == 2 * 3 + 2 * 2 * 3
    assert not checkpointed[0].is_gradient_checkpointing
    for name in ("translation", "task"):
        assert losses(checkpointed[2][name]) == pytest.approx(losses(plain[2][name]), rel=1e-6)
    for name, value in trained(checkpointed[0]).items():
        torch.testing.assert_close(value, trained(plain[0])[name], rtol=1e-4, atol=1e-6)


def test_bf16_trains_fp32_parameters_and_leaves_no_autocast_behind(settings):
    model, processor, history = train(recipe(settings, steps=40, batch_size=10, precision="bf16"))
    assert losses(history["task"])[-1] < 0.6 * losses(history["translation"])[0]
    assert all(value.dtype == torch.float32 for value in trained(model).values())
    batch = processor(["moja mbili"], target=["one"])
    with torch.no_grad():
        plain = LayAlignForConditionalGeneration.forward(model, **batch)
        assert torch.equal(model(**batch).logits, plain.logits)
    settings["output"] += "-fp32"
    exact = train(recipe(settings, steps=40, batch_size=10))[2]
    assert losses(exact["task"]) != losses(history["task"])
    assert losses(exact["task"])[-1] == pytest.approx(losses(history["task"])[-1], abs=0.5)


def test_bf16_holds_in_every_stage(settings):
    autocast = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            autocast.append(hasattr(model, "_original_forward"))

    train(recipe(settings, steps=1, precision="bf16"), callbacks=[Look()])
    assert autocast == [True, True]


@pytest.mark.parametrize(
    "instructions, bf16",
    [({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True, "bf16": False}, False)],
)
def test_auto_is_bf16_where_the_machine_multiplies_in_it(settings, monkeypatch, instructions, bf16):
    autocast = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            autocast.append(hasattr(model, "_original_forward"))

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    chosen = recipe(only(settings, "task"), steps=1, precision="auto")
    train(chosen, callbacks=[Look()])
    assert autocast == [bf16]
    card = (Path(settings["output"]) / "model" / "README.md").read_text()
    assert f"| precision | {'bf16' if bf16 else 'fp32'} |" in card


def test_a_prompt_that_no_stage_reads_is_said(settings, caplog):
    chosen = recipe(settings, steps=1)
    chosen.stages["translation"].prompt = "translate {source}"
    train(chosen)
    said = "stages.translation.prompt is not read: the LLM reads no text in this stage (llm_input.translation is false)"
    assert caplog.text.count(" is not read") == 1 and said in caplog.text
    assert make_plan(chosen)["notes"][0] == said
    card = (Path(chosen.output) / "model" / "README.md").read_text()
    assert "answer : {source}" in card and "translate {source}" not in card


def test_bf16_needs_no_accelerator(settings):
    """transformers refuses bf16 without one, unless it is told to use the CPU."""
    del settings["device"]
    assert losses(train(recipe(only(settings, "task"), steps=1, precision="bf16"))[2]["task"])


def test_evaluation_and_tensorboard(settings):
    run = recipe(settings, steps=4, eval_steps=2, hold_out=3, log_steps=3)
    run.report_to = "tensorboard"
    history = train(run)[2]["task"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 3, 4]
    assert list(Path(run.output).rglob("events.out.tfevents*"))
    assert json.loads((Path(run.output) / "task" / "data.json").read_text())["records"] == 7


def test_held_out_records_are_not_trained_on(settings):
    run = recipe(only(settings, "task"), hold_out=4)
    _, processor = stages.build(run)
    data, held_out = stages.read_stage_data("task", run, processor)
    rows = [{tuple(part[index][0].tolist()) for index in range(len(part))} for part in (data, held_out)]
    assert (len(data), len(held_out)) == (6, 4)
    assert not rows[0] & rows[1]
    with pytest.raises(ValueError, match="hold_out: 10 of 10 records leave none"):
        stages.read_stage_data("task", recipe(only(settings, "task"), hold_out=10), processor)


def test_a_finished_run_is_not_trained_again(settings, monkeypatch):
    first = train(recipe(settings))
    monkeypatch.setattr(stages, "StageTrainer", None)
    again = train(recipe(settings, keep_checkpoints=5))
    assert again[2] == first[2]
    assert all(torch.equal(value, trained(again[0])[name]) for name, value in trained(first[0]).items())


def test_another_recipe_is_refused_and_nothing_is_touched(settings, tmp_path):
    run = recipe(settings)
    train(run)
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    settings["seed"] = 1
    with pytest.raises(ValueError) as caught:
        train(recipe(settings, learning_rate=0.5))
    assert "seed: 0 there, 1 here" in str(caught.value)
    assert "stages.task.learning_rate: 0.01 there, 0.5 here" in str(caught.value)
    assert "stages.task.steps" not in str(caught.value)
    settings["seed"] = 0
    settings["stages"]["task"]["data"]["records"][0]["target"] = "two"
    with pytest.raises(ValueError, match=r"stages.task.data.0.records: '10 records"):
        train(recipe(settings))
    del settings["stages"]["translation"]
    with pytest.raises(ValueError, match=r"stages.translation.steps: 6 there, '\(not set\)' here"):
        train(recipe(settings))
    shutil.rmtree(f"{run.output}/translation")
    shutil.rmtree(f"{run.output}/task")
    with pytest.raises(ValueError, match="seed: 0 there, 2 here"):
        train(recipe({**settings, "seed": 2}))
    files = {path: content for path, content in files.items() if path.exists()}
    assert files == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()
    }


def test_foreign_and_unusable_output_folders_are_refused(settings, tmp_path):
    run = recipe(settings)
    keep = tmp_path / "run" / "model" / "weights"
    keep.parent.mkdir(parents=True)
    keep.write_text("mine")
    with pytest.raises(ValueError, match=r"holds \['model'\] but no recipe.json"):
        train(run)
    assert keep.read_text() == "mine"
    run.output = str(keep)
    with pytest.raises(ValueError, match="cannot be made"):
        train(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text("{")
    run.output = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"recipe.json: not JSON that can be read"):
        train(run)
    assert (tmp_path / "other" / "recipe.json").read_text() == "{"
    (tmp_path / "other" / "recipe.json").write_text('{"flour": 500}')
    with pytest.raises(ValueError, match="was not written by a training run"):
        train(run)
    assert (tmp_path / "other" / "recipe.json").read_text() == '{"flour": 500}'


def test_changed_data_files_are_refused(recipe_file, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    settings = ["stages.translation.save_steps=2"]
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(recipe_file, settings), callbacks=[Stop()])
    data = tmp_path / "data.jsonl"
    content = data.read_text()
    data.write_text(content.replace("moja", "mbili"))
    with pytest.raises(ValueError, match=r"stages.translation.data: no longer the data this run began with"):
        train(load_recipe(recipe_file, settings))
    data.write_text(content)
    train(load_recipe(recipe_file, settings))


def test_changed_evaluation_data_are_refused(recipe_file, tmp_path):
    """Their losses would be compared with those of the others."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    held_out = tmp_path / "held_out.jsonl"
    content = (tmp_path / "data.jsonl").read_text()
    held_out.write_text(content)
    source = f"{{format: jsonl, path: {held_out}}}"
    run = load_recipe(recipe_file, ["stages.translation.save_steps=2", f"stages.translation.eval_data={source}"])
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Stop()])
    held_out.write_text(content.replace("moja", "mbili"))
    with pytest.raises(ValueError, match=r"stages.translation.eval_data: no longer the data this run began with"):
        train(run)
    held_out.write_text(content)
    written = Path(run.output) / "translation" / "data.json"
    said = json.loads(written.read_text())
    written.write_text(json.dumps({key: value for key, value in said.items() if not key.startswith("eval")}))
    train(run)  # begun by a version that did not write it down


def test_bases_that_are_not_there(settings):
    settings["llm"] = "/nowhere/llm"
    with pytest.raises(ValueError, match="llm '/nowhere/llm'"):
        train(recipe(settings))


def test_longer_sources_than_the_encoder_reads_are_refused_before_training(settings, bases, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bases["encoder"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    settings["encoder"] = str(tmp_path / "encoder")
    settings["stages"]["translation"]["source_max_length"] = 8
    with pytest.raises(ValueError, match=r"stages\.task.source_max_length: got 200, the encoder takes 8 tokens"):
        train(recipe(settings))
    settings["stages"]["task"]["source_max_length"] = 8
    assert set(train(recipe(settings))[2]) == {"translation", "task"}


def test_a_run_that_failed_before_its_first_checkpoint_may_be_corrected(settings):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise MemoryError

    with pytest.raises(MemoryError):
        train(recipe(settings, steps=2, batch_size=9), callbacks=[Fail()])
    settings["stages"]["task"]["data"]["records"].pop()
    corrected = recipe(settings, steps=2, batch_size=3)
    history = train(corrected)[2]
    assert len(history["task"]) == 2
    assert json.loads((Path(corrected.output) / "recipe.json").read_text())["stages"]["task"]["batch_size"] == 3


def test_a_task_prompt_with_a_language_keeps_its_place(settings):
    processor = train(recipe(only(settings, "task"), steps=1, prompt="{language} : {source}"))[1]
    assert processor.prompt_template == "{language} : {text}"


def test_baselines_are_settings(settings):
    """LangBridge (no aligner, no text for the LLM) and MindMerger (no aligner)."""
    for model_settings, llm_input in (({"adapter": "linear", "aligner": None}, False), ({"aligner": None}, True)):
        settings |= {"model": model_settings, "llm_input": {"task": llm_input}, "output": settings["output"] + "-next"}
        model, processor, history = train(recipe(settings, steps=2))
        assert model.aligner is None
        assert (processor.prompt_template is not None) == llm_input
        assert len(losses(history["task"])) == 2


def test_length_groups_hold_every_record_once_in_batches_of_similar_length():
    lengths = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(0)).numpy()
    sampler = EpochSampler(1003, (3, 4), 8, lengths)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    spread = [max(lengths[order[i : i + 8]]) - min(lengths[order[i : i + 8]]) for i in range(0, 1000, 8)]
    assert sum(spread) / len(spread) < 10
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert order != list(sampler)
    plain = EpochSampler(1003, (3, 4), 8)
    assert sorted(plain) == list(range(1003))
    assert list(plain) != list(EpochSampler(1003, (3, 5), 8))
