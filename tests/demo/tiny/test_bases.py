"""The shipped bases: small, local, and what the demo says they are."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from layalign.evaluation.loop import evaluate_problems
from layalign.generation.texts import LLMAnswerer
from layalign.loading import SHIPPED, load_encoder, load_llm, resolve
from layalign.train.demo.problems import TINY
from layalign.train.demo.tiny.run import ENCODER, LLM, PROMPT


@pytest.fixture(scope="module")
def accuracy():
    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    answer = LLMAnswerer(load_llm(LLM), tokenizer, PROMPT.format(source="{text}"), max_new_tokens=32, batch_size=64)
    asked = [problem for problem in TINY.evaluation_problems(63, 11) if problem["lang"] in ("en", "sw", "bn", "th")]
    return evaluate_problems(answer, asked, batch_size=len(asked), progress=False)["accuracy"]["strict"]


def test_llm_solves_held_out_problems_in_english_and_in_no_low_resource_language(accuracy):
    assert accuracy["en"] >= 95
    assert max(accuracy[language] for language in ("sw", "bn", "th")) <= 5


def test_bases_are_small_and_say_how_they_were_made():
    files = [path for name in ("tiny_encoder", "tiny_llm") for path in (SHIPPED / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "make_bases" in text and "MIT" in text


@pytest.mark.parametrize("load, name", [(load_encoder, ENCODER), (load_llm, LLM)])
def test_bases_load_as_float32(load, name):
    assert {parameter.dtype for parameter in load(name).parameters()} == {torch.float32}


def test_encoder_loads_through_auto_model_with_the_stored_weights():
    encoder = AutoModel.from_pretrained(resolve(ENCODER))
    ours = load_encoder(ENCODER)
    ids = torch.tensor([[5, 6, 7, 1]])
    states = encoder.get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(states, ours(ids).last_hidden_state)


@pytest.mark.parametrize("language", TINY.languages)
def test_encoder_tokenizer_knows_every_text(language):
    tokenizer = AutoTokenizer.from_pretrained(resolve(ENCODER))
    for problem, _ in zip(TINY.problems("tokens"), range(90), strict=False):
        ids = tokenizer(problem.text(language)).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id and len(ids) <= 64


def test_llm_tokenizer_gives_back_what_it_read():
    tokenizer = AutoTokenizer.from_pretrained(resolve(LLM))
    for problem, _ in zip(TINY.problems("tokens"), range(90), strict=False):
        text = f"{problem.text('en')} Answer: {TINY.worked_answer(problem)}"
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_encoder_tells_meanings_apart_across_languages():
    """The same problem in two languages is nearer in mean state than another problem of the same kind, mostly."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(resolve(ENCODER)), load_encoder(ENCODER)
    chosen = [problem for problem, _ in zip(TINY.problems("states"), range(63), strict=False)]

    def states(language):
        batch = tokenizer([problem.text(language) for problem in chosen], padding=True, return_tensors="pt")
        with torch.inference_mode():
            state = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((state * mask).sum(1) / mask.sum(1), dim=-1)

    english = states("en")
    for language in ("sw", "bn", "th"):
        found = (states(language) @ english.T).argmax(1)
        assert (found == torch.arange(len(chosen))).float().mean() > 0.5


def test_configurations_name_no_path():
    for name in ("tiny_encoder", "tiny_llm"):
        config = json.loads((SHIPPED / name / "config.json").read_text(encoding="utf-8"))
        assert "_name_or_path" not in config and config["dtype"] == "float32"
