"""transformers' own Trainer over a LayAlign model and the batches of its processor, with nothing of ours between them."""

import copy
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from tests.train import plain_trainer_steps

STAGES = ("translation", "task")


@pytest.fixture(scope="module")
def base_model(bases):
    """A model with an active, random trained part."""
    torch.manual_seed(3)
    model = LayAlignForConditionalGeneration.from_bases(bases["encoder"], bases["llm"])
    for _, own in model.trained_parameters():
        own.data = torch.randn_like(own) * max(own.shape[-1], 4) ** -0.5
    return model


@pytest.fixture
def model(base_model):
    return copy.deepcopy(base_model)


@pytest.fixture(scope="module")
def processor(bases):
    return LayAlignProcessor.from_bases(bases["encoder"], bases["llm"])


@pytest.fixture
def records(records):
    """Targets of unequal length too."""
    return [record | {"target": " ".join(record["target"].split()[: 1 + i % 3])} for i, record in enumerate(records)]


@pytest.fixture
def collate(processor):
    """stage -> a collator: the LLM reads the targets alone, or a prompt before them."""

    def of(stage):
        def batch(examples):
            source, target = [[example[name] for example in examples] for name in ("source", "target")]
            prompts = [f"answer : {text}" for text in source] if stage == "task" else None
            return processor(source, prompts, target)

        return batch

    return of


@pytest.fixture
def trainer(model, records, collate, tmp_path):
    """(stage, settings of TrainingArguments, others of Trainer) -> a Trainer."""

    def build(stage="task", trainer_settings=None, **settings):
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        defaults |= {"remove_unused_columns": False, "save_strategy": "no", "per_device_train_batch_size": 2}
        defaults |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "optim": "sgd"}
        given = {"model": model, "data_collator": collate(stage), "train_dataset": records, "eval_dataset": records}
        return Trainer(args=TrainingArguments(**defaults | settings), **given | (trainer_settings or {}))

    return build


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradient_are_the_models(stage, trainer, model, records, collate):
    """Over an optimizer step of two calls of different numbers of labels, and in evaluation; SGD tells the gradient."""
    own = trainer(stage, max_steps=1, gradient_accumulation_steps=2, learning_rate=0.5)
    seen = []
    compute = own.compute_loss
    own.compute_loss = lambda model, inputs, **rest: seen.append(inputs) or compute(model, inputs, **rest)
    before = {name: value.detach().clone() for name, value in model.trained_parameters()}
    own.train()
    after = {name: value.detach().clone() for name, value in model.trained_parameters()}
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    labels = sum((batch["labels"] != -100).sum() for batch in seen)
    assert len({int((batch["labels"] != -100).sum()) for batch in seen}) == 2
    means = [(model(**batch).loss, (batch["labels"] != -100).sum() / labels) for batch in seen]
    loss = sum(mean * share for mean, share in means)
    loss.backward()
    assert own.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in model.trained_parameters():
        torch.testing.assert_close(after[name], before[name] - 0.5 * value.grad, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        batches = [collate(stage)(records[start : start + 5]) for start in (0, 5)]
        expected = np.mean([model.eval()(**batch).loss.item() for batch in batches])
    assert trainer(stage, per_device_eval_batch_size=5).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_label_smoothing_and_own_losses_get_logits_of_the_labels(stage, trainer, model, records, collate):
    """The smoothed loss by its formula, from each row alone, whole logits, no labels; and `compute_loss_func`."""
    batch = collate(stage)(records[:4])
    total, count = 0.0, 0
    for row in range(4):
        real, asked = batch["attention_mask"][row].bool(), batch["encoder_attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row, real][None], batch["labels"][row, real]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, encoder_input_ids=batch["encoder_input_ids"][row, asked][None]).logits
        logs = logits[0, -len(labels) - 1 : -1].log_softmax(-1)[labels != -100]
        wanted = labels[labels != -100]
        total += (0.8 * -logs.gather(1, wanted[:, None])[:, 0] + 0.2 * -logs.mean(1)).sum().item()
        count += len(wanted)
    own = trainer(stage, label_smoothing_factor=0.2, per_device_eval_batch_size=4, max_steps=1, learning_rate=0.5)
    own.eval_dataset = records[:4]
    assert own.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)

    def plain(outputs, labels, num_items_in_batch):
        assert outputs.loss is None and outputs.labels is None
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    with torch.no_grad():
        expected = model(**batch).loss.item()
    by_hand = trainer(stage, {"compute_loss_func": plain, "eval_dataset": records[:4]}, per_device_eval_batch_size=4)
    assert by_hand.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    before = {name: value.detach().clone() for name, value in model.trained_parameters()}
    own.train()
    assert all(not torch.equal(before[name], value) for name, value in model.trained_parameters())


def test_metrics_get_predictions_that_lie_on_their_labels(trainer, model, records, collate):
    """Batches of unequal width, padded by the Trainer, against each row alone."""
    seen = []

    def metrics(found):
        seen.append(found)
        real = found.label_ids != -100
        return {"right": (found.predictions.argmax(-1) == found.label_ids)[real].mean(), "labels": real.sum()}

    settings = {"per_device_eval_batch_size": 3, "include_for_metrics": ["inputs", "loss"]}
    own = trainer("task", {"compute_metrics": metrics}, **settings)
    found = own.evaluate()
    best, losses, right = [], [], []
    with torch.no_grad():
        for record in records:
            out = model.eval()(**collate("task")([record]), only_scored=True)
            best += out.logits.argmax(-1)[0].tolist()
            losses += F.cross_entropy(out.logits[0], out.labels[0], reduction="none").tolist()
            right += (out.logits.argmax(-1) == out.labels)[0].tolist()
    assert found["eval_labels"] == len(right) and found["eval_right"] == pytest.approx(np.mean(right))
    (given,) = seen
    assert given.predictions.shape[:2] == given.label_ids.shape == given.inputs.shape and len(given.inputs) == 10
    logits, labels = torch.tensor(given.predictions), torch.tensor(given.label_ids)
    assert logits.argmax(-1)[labels != -100].tolist() == best and len(set(best)) > 2
    assert F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item() == pytest.approx(np.mean(losses), rel=1e-5)
    predicted = own.predict(records[:4])
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape


def test_checkpoints_hold_the_trained_part_and_go_on_bit_for_bit(trainer, base_model, processor, tmp_path, caplog):
    """AdamW, gradient checkpointing, an evaluation whose best weights are taken up at the end."""
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "optim": "adamw_torch",
    }
    settings |= {"learning_rate": 0.02, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
    settings |= {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
    whole = copy.deepcopy(base_model)
    own = trainer("task", {"model": whole, "processing_class": processor}, **settings)
    own.train()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    saved = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == dict(whole.trained_parameters()).keys()
    assert LayAlignProcessor.from_pretrained(folder / "checkpoint-4").tokenizer.vocab_size
    loaded = LayAlignForConditionalGeneration.from_pretrained(folder / "checkpoint-4")
    for (name, value), (_, found) in zip(whole.trained_parameters(), loaded.trained_parameters(), strict=True):
        assert torch.equal(value, found), name

    resumed = copy.deepcopy(base_model)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    again = trainer("task", {"model": resumed}, **settings | best | {"output_dir": str(tmp_path / "again")})
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert "missing keys" not in caplog.text
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (own, again)]
    assert losses[0][-1] == losses[1][-1] and len(losses[1]) == 4
    written = load_file(tmp_path / "again" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in written.items())
    # By the largest evaluation loss, which the earlier of the two checkpoints has.
    evaluated = [entry["eval_loss"] for entry in again.state.log_history if "eval_loss" in entry]
    assert evaluated[3] < evaluated[2]
    kept = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in resumed.trained_parameters())


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(forks, bases, base_model, records, collate, tmp_path):
    """Each of them half of every batch, with other numbers of labels; losses, weights and padded predictions, in both stages."""
    folder = tmp_path / "model"
    base_model.save_pretrained(folder)
    command = ["-m", "tests.train.plain_trainer_steps", folder, *bases.values(), tmp_path]
    done = forks.run(command, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        found = torch.load(tmp_path / f"{stage}.pt")
        alone = plain_trainer_steps.steps(folder, collate(stage), tmp_path / "alone", 4, 10)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, atol=1e-6, rtol=1e-4)


def test_the_example_trains_both_stages(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "plain_trainer.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60
    main = runpy.run_path(str(example))["main"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    main(str(tmp_path), "1")
    assert capsys.readouterr().out.strip()
    found = [load_file(tmp_path / stage / "checkpoint-1" / "model.safetensors") for stage in STAGES]
    assert found[0].keys() == found[1].keys() and not torch.equal(*(part["adapter.boundary"] for part in found))
    LayAlignForConditionalGeneration.from_pretrained(tmp_path)


def test_blocks_of_the_page_run(capsys):
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert len(blocks) == 4 and "8 ['q_proj', 'v_proj']" in printed and "trainable params" in printed
    assert names["swahili"].get_parameter("adapter.boundary").device.type == "meta"


def test_a_peft_model_is_trained_and_taken_up_again(trainer, model, records, collate, tmp_path):
    peft = pytest.importorskip("peft")
    part = ["adapter", "aligner", "fusion_gate"]
    config = peft.LoraConfig(r=2, target_modules=r".*llm\..*\.(q_proj|v_proj)", modules_to_save=part)
    before = copy.deepcopy(model)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "label_smoothing_factor": 0.1}
    own = trainer("task", {"model": peft.get_peft_model(model, config)}, **settings, learning_rate=0.1)
    own.train()
    with torch.no_grad():
        expected = own.model.eval()(**collate("task")(records)).loss
        loaded = peft.PeftModel.from_pretrained(before, tmp_path / "run" / "checkpoint-2").eval()
        assert loaded(**collate("task")(records)).loss == expected
