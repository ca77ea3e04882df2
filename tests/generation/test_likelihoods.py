"""Log-likelihoods of given answers, against a slow formula: the logits of one row, token by token."""

import pytest
import torch

from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.prompts import fill_prompt

TEXTS = ["what is 3 plus 4", "how many apples and apples and apples is 12 na 13", "what"]
CHOICES = [["7", "12 13 na", "so"], ["tufaha ngapi", "25"], ["what is so"]]
TEMPLATE = "question {text} answer"


def slow(logits_of, prompt, answer):
    """Sum of log-probabilities; logits_of: ids of the LLM's text -> logits (N, V) of the places that predict what follows each."""
    ids, total = list(prompt), 0.0
    for token in answer:
        total += torch.log_softmax(logits_of(ids)[-1].double(), -1)[token].item()
        ids.append(token)
    return total


def by_hand(model, processor, text, answer, template=TEMPLATE):
    encoded = processor(text, prompt=None)
    tokens = [
        processor.tokenizer(said, add_special_tokens=False)["input_ids"]
        for said in (template.replace("{text}", text), answer)
    ]
    with torch.inference_mode():
        return slow(lambda ids: model(input_ids=torch.tensor([ids]), **encoded).logits[0], *tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_of_the_model(loaded, batch_size):
    model, processor = loaded
    found = Answerer(*loaded, batch_size=batch_size).loglikelihoods(TEXTS, CHOICES)
    expected = [
        [by_hand(model, processor, text, said) for said in given] for text, given in zip(TEXTS, CHOICES, strict=True)
    ]
    assert [len(row) for row in found] == [3, 2, 1]
    for row, by_formula in zip(found, expected, strict=True):
        assert row == pytest.approx(by_formula, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_of_the_llm_alone(loaded, batch_size):
    model, processor = loaded
    found = LLMAnswerer(model.llm, processor.tokenizer, TEMPLATE, batch_size=batch_size, add_bos=True).loglikelihoods(
        TEXTS, CHOICES
    )

    def by_llm(text, said):
        prompt, answer = (
            processor.tokenizer(words, add_special_tokens=False)["input_ids"]
            for words in (fill_prompt(TEMPLATE, text), said)
        )
        with torch.inference_mode():
            return slow(lambda ids: model.llm(input_ids=torch.tensor([ids])).logits[0], [1, *prompt], answer)

    for row, text, given in zip(found, TEXTS, CHOICES, strict=True):
        assert row == pytest.approx([by_llm(text, said) for said in given], abs=1e-4)


def test_the_end_of_sequence_counts_for_nothing(loaded):
    """A prefix is never less likely than what it begins."""
    short, long = Answerer(*loaded).loglikelihoods(["what"], [["7", "7 so"]])[0]
    assert short > long


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([["a"]], "choices: got 1 lists for 2 texts"),
        ([["a"], []], r"choices\[1\]: got \[\]"),
        ([["a"], "ab"], r"choices\[1\]: got 'ab', takes a list"),
        ([["a", ""], ["b"]], r"choices\[0\]: got \['a', ''\]"),
    ],
)
def test_choices_that_are_none(loaded, choices, message):
    with pytest.raises(ValueError, match=message):
        Answerer(*loaded).loglikelihoods(["what", "so"], choices)


def test_languages_must_fit_the_texts(loaded):
    for langs in ("sw", ["sw"]):
        with pytest.raises(ValueError, match="takes a code for each of 2 texts"):
            Answerer(*loaded)(["what", "so"], langs=langs)


def test_nan_is_no_answer(loaded):
    """Greedy search takes NaN for the likeliest token, and a question whose answer is 0 would be right by the published scorer."""
    model, _ = loaded
    weight = model.adapter.linear2.weight
    kept = weight.detach().clone()
    try:
        weight.data[0, 0] = float("nan")
        for answerer in (Answerer(*loaded, max_new_tokens=2), Answerer(*loaded, max_new_tokens=2, num_beams=2)):
            with pytest.raises(ValueError, match="logits are NaN"):
                answerer(["what is 3", "so"])
        with pytest.raises(ValueError, match="logits are NaN"):
            Answerer(*loaded).loglikelihoods(["what"], [["7", "so"]])
    finally:
        weight.data.copy_(kept)
    assert Answerer(*loaded, max_new_tokens=2)(["what is 3"])


def test_an_answer_without_an_end_is_known(loaded):
    model, processor = loaded
    answerer = Answerer(*loaded, max_new_tokens=3, batch_size=2)
    answerer(TEXTS)
    rows = [model.generate(**processor(text), max_new_tokens=3, do_sample=False, pad_token_id=0)[0] for text in TEXTS]
    cut = [processor.tokenizer.eos_token_id not in row.tolist() for row in rows]
    assert answerer.details(TEXTS) == [{"cut": True} if one else {} for one in cut]
    ending = Answerer(*loaded, max_new_tokens=3, eos_token_id=[row[0].item() for row in rows])
    ending(TEXTS)
    assert ending.details(TEXTS) == [{}, {}, {}]
    assert any(cut)
