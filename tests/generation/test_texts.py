"""Answerers: order, batches, prompts, ends, and what is refused."""

import logging

import pytest
import torch
from transformers import GenerationConfig

from layalign.generation.texts import Answerer, LLMAnswerer


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_the_models_own_in_order_at_any_batch_size(loaded, questions, batch_size, answers_by_hand):
    answers = Answerer(*loaded, max_new_tokens=6, batch_size=batch_size)(questions)
    assert answers == answers_by_hand(*loaded, questions)
    assert len(set(answers)) > len(questions) // 2


def test_prompts(loaded, questions, answers_by_hand):
    with_template = Answerer(*loaded, max_new_tokens=6, prompt="how many {text} so")(questions)
    without = Answerer(*loaded, max_new_tokens=6, prompt=None)(questions)
    assert with_template == answers_by_hand(*loaded, questions, "how many {text} so")
    assert without == answers_by_hand(*loaded, questions, None)
    assert with_template != without


def test_answers_end_at_the_end_of_sequence_and_their_tokens_are_counted(loaded, questions):
    model, processor = loaded
    rows = [model.generate(**processor(text), max_new_tokens=6, do_sample=False)[0].tolist() for text in questions]
    third = [row[2] for row in rows]
    end = max(set(third), key=third.count)
    cut = [row[: row.index(end)] if end in row else row for row in rows]
    answerer = Answerer(model, processor, max_new_tokens=6, eos_token_id=end)
    assert answerer(questions) == [processor.decode(row, skip_special_tokens=True) for row in cut]
    assert 0 < sum(end in row for row in rows) < len(rows)
    assert answerer.new_tokens == sum(len(row) + (end in whole) for row, whole in zip(cut, rows, strict=True))
    assert answerer([]) == []


def test_sampling_and_beams_are_passed_on(loaded, questions):
    torch.manual_seed(0)
    sampled = Answerer(*loaded, max_new_tokens=6, do_sample=True, temperature=5.0)(questions)
    beams = Answerer(*loaded, max_new_tokens=6, num_beams=3)(questions)
    greedy = Answerer(*loaded, max_new_tokens=6)(questions)
    assert sampled != greedy
    assert beams != greedy


@pytest.fixture
def llm(bases):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(bases / "llm"), AutoTokenizer.from_pretrained(bases / "llm")


@pytest.mark.parametrize("padding", ["its own", "none"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_llm_alone(llm, questions, padding, add_bos):
    model, tokenizer = llm
    if padding == "none":
        tokenizer.pad_token = None
    answers = LLMAnswerer(model, tokenizer, "question {text} answer", max_new_tokens=6, batch_size=5, add_bos=add_bos)(
        questions
    )
    for text, answer in zip(questions, answers, strict=True):
        ids = [1] * add_bos + tokenizer(f"question {text} answer")["input_ids"]
        new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, len(ids) :
        ].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
    assert tokenizer.padding_side == llm[1].padding_side
    assert (tokenizer.pad_token is None) == (padding == "none")


def test_an_end_of_sequence_that_a_tokenizer_adds_to_the_prompt_is_dropped(llm, bases, questions):
    from transformers import AutoTokenizer

    model, tokenizer = llm
    ending = AutoTokenizer.from_pretrained(bases / "encoder")
    assert ending("what")["input_ids"][-1] == 2
    assert LLMAnswerer(model, ending, max_new_tokens=6)(questions) == LLMAnswerer(model, tokenizer, max_new_tokens=6)(
        questions
    )


BAD_ANSWERERS = {
    "no tokens": (dict(max_new_tokens=0), "max_new_tokens: got 0"),
    "tokens as text": (dict(max_new_tokens="8"), "max_new_tokens: got '8'"),
    "negative batch": (dict(batch_size=-1), "batch_size: got -1"),
    "a template without its place": (dict(prompt="question"), "prompt: got 'question'"),
    "a template with two places": (dict(prompt="{text} {text}"), "prompt: got"),
}


@pytest.mark.parametrize("case", BAD_ANSWERERS)
def test_bad_settings(loaded, case):
    settings, message = BAD_ANSWERERS[case]
    with pytest.raises(ValueError, match=message):
        Answerer(*loaded, **settings)


def test_bad_texts(loaded):
    answerer = Answerer(*loaded)
    with pytest.raises(ValueError, match=r"texts\[1\]: got ' '"):
        answerer(["what", " "])
    with pytest.raises(ValueError, match=r"texts\[0\]: got 5"):
        answerer([5])


def test_several_sequences_a_text(loaded, questions):
    answerer = Answerer(*loaded, max_new_tokens=6, num_beams=3, num_return_sequences=2, batch_size=4)
    sequences = answerer.sequences(questions[:5])
    assert [answers[0] for answers in sequences] == Answerer(*loaded, max_new_tokens=6, num_beams=3)(questions[:5])
    assert all(len(set(answers)) == 2 for answers in sequences)
    with pytest.raises(ValueError, match="num_return_sequences: got 2, takes 1"):
        answerer(questions[:5])


def test_what_transformers_returns_in_a_dict(loaded, questions):
    plain = Answerer(*loaded, max_new_tokens=6)(questions[:3])
    assert Answerer(*loaded, max_new_tokens=6, return_dict_in_generate=True)(questions[:3]) == plain


def test_bad_calls_are_told_before_anything_is_generated(loaded, questions, monkeypatch):
    monkeypatch.setattr(loaded[0], "generate", lambda **_: pytest.fail("generated"))
    with pytest.raises(ValueError, match="texts: got one text, 'hello', takes a list"):
        Answerer(*loaded)("hello")
    with pytest.raises(ValueError, match="texts: got one text, 'hello', takes a list"):
        Answerer(*loaded).loglikelihoods("hello", [["a"]] * 5)
    with pytest.raises(ValueError, match="max_length: got 12; max_new_tokens says"):
        Answerer(*loaded, max_length=12)
    for given in (
        {"num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
    ):
        with pytest.raises(ValueError, match="num_return_sequences: got 2, takes 1"):
            Answerer(*loaded, do_sample=True, **given)(questions)


def test_an_llms_own_max_length_is_not_warned_about(loaded, questions, monkeypatch, caplog):
    monkeypatch.setattr(loaded[0].generation_config, "max_length", 30)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    answers = Answerer(*loaded, max_new_tokens=6)(questions[:2])
    assert len(answers) == 2 and "max_length" not in caplog.text
