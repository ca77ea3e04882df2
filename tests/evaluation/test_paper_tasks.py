"""The paper's tasks from files in their original layout to scores, by commands alone, against a slow formula."""

import json
import sys

import pytest
import sacrebleu
import torch

from tests.tasks import originals
from tests.tiny_models import save_bases, word_tokenizer

WORDS = [
    *"ABCDE",
    "entailment",
    "neutral",
    "contradiction",
    "Premise",
    "Hypothesis",
    "Label",
    "Options",
    "Answer",
    "Trains",
    "It",
]
SIZES = {"xcsqa": 4, "xnli": 4, "xcopa": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model that knows letters and labels, its gates open, and (model, processor)."""
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    folder = tmp_path_factory.mktemp("letters")
    tokenizers = (word_tokenizer(WORDS, end_after_text=end, apart_from_signs=True) for end in (True, False))
    bases = save_bases(folder, *tokenizers, initializer_range=0.6)
    torch.manual_seed(4)
    model = LayAlignForConditionalGeneration.from_bases(**bases).eval()
    for name, parameter in model.trained_parameters():
        if "gate" in name:
            parameter.data.fill_(0.5)
    processor = LayAlignProcessor.from_bases(**bases, prompt_template="{text}")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", (model, processor)


def evaluated(monkeypatch, folder, task, data, output):
    from layalign import cli

    options = {"--data": data, "--output": output, "--max-new-tokens": 4, "--device": "cpu"}
    words = ["layalign", "evaluate", folder, "--task", task, *(word for option in options.items() for word in option)]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    records = [json.loads(line) for line in (output / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    return records, json.loads((output / "results.json").read_text())["tasks"][task]


def generated(model, processor, question):
    """Greedy, a token at a time, without generate."""
    encoder, ids = (
        processor(question, prompt=None),
        processor.tokenizer(question, add_special_tokens=False)["input_ids"],
    )
    begin = len(ids)
    while len(ids) < begin + 4:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), **encoder).logits[0, -1].argmax()))
        if ids[-1] == processor.tokenizer.eos_token_id:
            break
    return processor.tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()


def likelihood(model, processor, question, choice):
    encoder, ids = (
        processor(question, prompt=None),
        processor.tokenizer(question, add_special_tokens=False)["input_ids"],
    )
    total = 0.0
    for token in processor.tokenizer(choice, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **encoder).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        ids = [*ids, token]
    return total


@pytest.mark.parametrize(
    "layout", ["xcsqa, published", "xcsqa, original", "xnli, published", "xnli, original table", "xcopa, original"]
)
def test_choices(model, layout, tmp_path, monkeypatch):
    folder, loaded = model
    task, write = originals.LAYOUTS[layout]
    write(tmp_path / "data")
    records, results = evaluated(monkeypatch, folder, task, tmp_path / "data", tmp_path / "results")
    assert len(records) == SIZES[task]
    right = {"official": {}, "loglikelihood": {}}
    for record in records:
        assert record["prediction"] == generated(*loaded, record["question"])
        by_hand = [likelihood(*loaded, record["question"], choice) for choice in record["choices"]]
        assert record["loglikelihoods"] == pytest.approx(by_hand, abs=1e-4)
        best = record["choices"][by_hand.index(max(by_hand))]
        right["official"].setdefault(record["lang"], []).append(record["prediction"].strip() == record["answer"])
        right["loglikelihood"].setdefault(record["lang"], []).append(best == record["answer"])
    for scorer, by_language in right.items():
        expected = {lang: 100 * sum(found) / len(found) for lang, found in by_language.items()}
        assert results["accuracy"][scorer] == expected
        assert results["summary"][scorer]["avg"] == pytest.approx(sum(expected.values()) / len(expected))
    assert len({tuple(record["loglikelihoods"]) for record in records}) > 1, "questions count"


@pytest.mark.parametrize("layout", ["flores, 101", "flores, 200"])
def test_translations(model, layout, tmp_path, monkeypatch):
    folder, _ = model
    task, write = originals.LAYOUTS[layout]
    write(tmp_path / "data")
    records, results = evaluated(monkeypatch, folder, task, tmp_path / "data", tmp_path / "results")
    assert {record["lang"] for record in records} == {"sw", "zh"}
    for lang in ("sw", "zh"):
        pairs = [(record["prediction"], record["answer"]) for record in records if record["lang"] == lang]
        said, meant = zip(*pairs, strict=True)
        assert results["accuracy"]["bleu"][lang] == sacrebleu.corpus_bleu(said, [meant]).score
        assert results["accuracy"]["chrf++"][lang] == sacrebleu.corpus_chrf(said, [meant], word_order=2).score
    assert "tok:13a" in results["signatures"]["bleu"]
    assert "spBLEU is left out" in results["notes"][0] or "spbleu" in results["accuracy"]


def test_several_tasks_in_one_command(model, tmp_path, monkeypatch):
    folder, _ = model
    for layout in ("xcsqa, published", "xnli, published"):
        originals.LAYOUTS[layout][1](tmp_path / "data")
    _, results = evaluated(monkeypatch, folder, "xcsqa", tmp_path / "data", tmp_path / "alone")
    from layalign.evaluation.run import evaluate
    from layalign.evaluation.settings import GenerationSettings

    settings = GenerationSettings(max_new_tokens=4, device="cpu")
    both = evaluate(
        folder, ["xcsqa", "xnli"], data=tmp_path / "data", output=tmp_path / "both", settings=settings, progress=False
    )
    assert both["tasks"]["xcsqa"] == results
    assert set(both["tasks"]["xnli"]["accuracy"]) == {"official", "loglikelihood", "loglikelihood_per_byte"}
