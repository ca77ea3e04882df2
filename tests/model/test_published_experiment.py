"""From the authors' checkpoint to an evaluation by commands alone, against what their code generated.

The recorded cases are token ids, so that each id of the encoder is a word "e007" here and each of the LLM a word "p007" of one text; the
tokenizers pass over the other's words.
"""

import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from layalign.cli import app
from layalign.tasks.prompts import MATH

VOCABULARY = 256


def words_of(letter, ids, mask):
    """The text of one row: its real ids as words."""
    return " ".join(f"{letter}{token:03}" for token, real in zip(ids.tolist(), mask.tolist(), strict=True) if real)


def tokenizer_of(letter, other):
    tokenizer = Tokenizer(
        models.WordLevel({f"{letter}{token:03}": token for token in range(VOCABULARY)}, unk_token=f"{letter}003")
    )
    tokenizer.normalizer = normalizers.Replace(Regex(rf"{other}\d+ ?"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos = ("e000", "e001") if letter == "e" else ("p002", "p001")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, unk_token=f"{letter}003")


@pytest.fixture(params=["llama_mha", "llama_mha_nopad"])
def published(request, golden_folder, tmp_path):
    """A folder with the case's bases, their tokenizers and the checkpoint, and the case."""
    source = golden_folder(request.param)
    for name, letter, other in (("mt", "e", "p"), ("llm", "p", "e")):
        shutil.copytree(source / name, tmp_path / name, copy_function=shutil.copyfile)
        tokenizer_of(letter, other).save_pretrained(tmp_path / name)
    shutil.copyfile(source / "pytorch_model.bin", tmp_path / "pytorch_model.bin")
    return tmp_path, torch.load(source / "golden.pt", weights_only=True)


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def test_conversion_and_evaluation_give_the_recorded_ids(published):
    """With the prompt that was saved, and no option of the evaluation's but the length of an answer."""
    folder, case = published
    converted = folder / "converted"
    bases = ("--encoder", folder / "mt", "--llm", folder / "llm")
    run("convert", folder / "pytorch_model.bin", converted, *bases, "--compatible", "--prompt", "{text}")
    encoder = zip(case["input_ids_mt"], case["attention_mask_mt"], strict=True)
    prompts = zip(case["input_ids_prompt"], case["mask_prompt"], strict=True)
    texts = [f"{words_of('e', *e)} {words_of('p', *p)}" for e, p in zip(encoder, prompts, strict=True)]
    problems = [{"question": text, "answer": 0, "lang": "en"} for text in texts]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, problems)))
    length = case["generated_task"].shape[1]
    options = ("--output", folder / "results", "--max-new-tokens", length)
    run("evaluate", converted, "--task", folder / "own.jsonl", *options)
    records = [json.loads(line) for line in (folder / "results/records.jsonl").read_text().splitlines()]
    assert [record["question"] for record in records] == texts
    for record, ids in zip(records, case["generated_task"].tolist(), strict=True):
        assert record["prediction"].split() == [f"p{token:03}" for token in ids if token != 1]
    # The prompt is what makes them: without it the answers are those of the translation stage.
    run(
        "evaluate",
        converted,
        "--task",
        folder / "own.jsonl",
        *options[:1],
        folder / "without",
        *options[2:],
        "--prompt",
        "none",
    )
    records = [json.loads(line) for line in (folder / "without/records.jsonl").read_text().splitlines()]
    for record, ids in zip(records, case["generated_translation"].tolist(), strict=True):
        assert record["prediction"].split() == [f"p{token:03}" for token in ids if token != 1]


def test_the_published_prompt_is_saved_by_the_tasks_name(published):
    from layalign import LayAlignProcessor

    folder, _ = published
    bases = ("--encoder", folder / "mt", "--llm", folder / "llm")
    run("convert", folder / "pytorch_model.bin", folder / "math", *bases, "--task", "math")
    assert LayAlignProcessor.from_pretrained(folder / "math").prompt_template == MATH
    run("convert", folder / "pytorch_model.bin", folder / "choices", *bases, "--task", "xcsqa")
    assert LayAlignProcessor.from_pretrained(folder / "choices").prompt_template == "{text}"
    assert "no prompt saved" in run("convert", folder / "pytorch_model.bin", folder / "none", *bases)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "maths"), "task: got 'maths', takes math, xcsqa, xnli"),
        (("--task", "math", "--prompt", "{text}"), "give one of them"),
        (("--prompt", "no place"), r"takes a text that contains \{text\} once"),
    ],
)
def test_prompts_that_cannot_be_saved(published, options, message):
    folder, _ = published
    bases = ("--encoder", folder / "mt", "--llm", folder / "llm")
    result = CliRunner().invoke(
        app, list(map(str, ("convert", folder / "pytorch_model.bin", folder / "out", *bases, *options)))
    )
    assert result.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert not (folder / "out").exists()
