"""Translate, then answer: what is translated from which language, what the LLM then reads, what is kept."""

import pytest
import torch

from layalign.evaluation.settings import GenerationSettings
from layalign.generation.texts import LLMAnswerer
from layalign.systems import TranslateFirst
from layalign.systems.translator import target_token
from layalign.tasks import prompts

SETTINGS = GenerationSettings(batch_size=3, max_new_tokens=5, device="cpu")
TEXTS = ["ni ngapi na 3", "tufaha 4 na 12 plus 3", "what is 3", "ngapi", "so 7 na 8 na 9"]
LANGS = ["sw", "th", "en", "sw", "th"]


def by_hand(folder, text, lang):
    """The translation of one text, by transformers alone; lang: NLLB's code, None for a T5."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    told = {}
    if lang is not None:
        tokenizer.src_lang = lang
        told["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids("eng_Latn")
    ids = tokenizer(text, return_tensors="pt")
    row = model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=8, do_sample=False, **told
    )[0]
    return tokenizer.decode(row, skip_special_tokens=True).strip(), row.tolist()


def system(translator, bases, **options):
    options = {"settings": SETTINGS, "translation_tokens": 8, **options}
    return TranslateFirst(translator=str(translator), llm=str(bases / "llm"), **options)


def test_nllb_is_told_both_languages(nllb, bases):
    answerer = system(nllb, bases).load("question {text} answer")
    answers = answerer(TEXTS, langs=LANGS)
    codes = {"sw": "swh_Latn", "th": "tha_Thai"}
    translations = [
        text if lang == "en" else by_hand(nllb, text, codes[lang])[0] or text
        for text, lang in zip(TEXTS, LANGS, strict=True)
    ]
    assert [said["translation"] for said in answerer.details(TEXTS, LANGS)] == translations
    assert by_hand(nllb, TEXTS[0], "swh_Latn")[1][1] == answerer.translator.tokenizer.convert_tokens_to_ids("eng_Latn")
    assert by_hand(nllb, TEXTS[0], "swh_Latn")[0] != by_hand(nllb, TEXTS[0], "tha_Thai")[0]
    plain = LLMAnswerer(answerer.model, answerer.tokenizer, "question {text} answer", max_new_tokens=5)
    assert answers == plain(translations)
    assert len(set(answers)) > 2


def test_choices_are_compared_after_the_translation(nllb, bases):
    answerer = system(nllb, bases).load("question {text} answer")
    choices = [["3", "4"]] * len(TEXTS)
    found = answerer.loglikelihoods(TEXTS, choices, LANGS)
    translations = [kept["translation"] for kept in answerer.details(TEXTS, LANGS)]
    plain = LLMAnswerer(answerer.model, answerer.tokenizer, "question {text} answer", max_new_tokens=5)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain.loglikelihoods(translations, choices)))


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (prompts.xcsqa("ni ngapi", ["tufaha 4", "na 12"]), ["ni ngapi", "tufaha 4", "na 12"]),
        (prompts.xnli("tufaha na 3", "ni so"), ["tufaha na 3", "ni so"]),
        (prompts.xcsqa(f"ni so {prompts.COPA['cause']}", ["tufaha 4", "na 12"]), ["ni so", "tufaha 4", "na 12"]),
        ("ni ngapi na 3", ["ni ngapi na 3"]),
    ],
)
def test_the_published_prompt_is_left_around_what_is_translated(nllb, bases, question, said):
    answerer = system(nllb, bases).load()
    asked = []
    answerer.translator = lambda texts, langs: asked.append(texts) or [f"<{text}>" for text in texts]
    expected = question
    for text in said:
        expected = expected.replace(text, f"<{text}>")
    assert answerer.translations([question], ["sw"]) == [expected]
    assert asked == [said]


def test_each_text_is_translated_once(nllb, bases):
    answerer = system(nllb, bases).load()
    asked = []
    translate = answerer.translator
    answerer.translator = lambda texts, langs: asked.append(texts) or translate(texts, langs)
    answerer(TEXTS, langs=LANGS)
    answerer.details(TEXTS, LANGS)
    answerer([*TEXTS[:2], "na na"], langs=["sw", "sw", "sw"])
    # Of the second call, a text is new, and one is now said to be in another language.
    assert asked == [[TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[4]], [TEXTS[1], "na na"]]


def test_t5_is_told_in_words(t5, bases):
    answerer = system(t5, bases, prefix="translate {language} to English ").load()
    answerer(TEXTS, langs=LANGS)
    names = {"sw": "Swahili", "th": "Thai"}
    expected = [
        text if lang == "en" else by_hand(t5, f"translate {names[lang]} to English {text}", None)[0] or text
        for text, lang in zip(TEXTS, LANGS, strict=True)
    ]
    assert [kept["translation"] for kept in answerer.details(TEXTS, LANGS)] == expected
    assert len(set(expected)) > 2
    plain = system(t5, bases).load()
    assert plain.details(TEXTS) == [{"translation": by_hand(t5, text, None)[0] or text} for text in TEXTS]
    assert plain(TEXTS) != answerer(TEXTS, langs=LANGS)


def test_an_empty_translation_leaves_the_question(t5, bases):
    answerer = system(t5, bases).load()
    answerer.translator = lambda texts, langs: ["" for _ in texts]
    assert answerer.details(["ni 3"], ["sw"]) == [{"translation": "ni 3"}]
    assert len(answerer(["ni 3"], langs=["sw"])) == 1


def test_examples_are_those_in_the_llms_language(nllb, bases, tmp_path):
    file = tmp_path / "examples.jsonl"
    file.write_text(
        '{"question": "ni 1", "answer": "2", "lang": "sw"}\n{"question": "what is 5", "answer": "6", "lang": "en"}\n'
    )
    few = system(nllb, bases, examples=str(file), shots=1)
    few.check(["sw", "th"])
    assert few.load().prompt("how many", "en").startswith("Question: what is 5\nAnswer: 6\n\nQuestion: how many")


def test_what_is_refused(nllb, t5, bases, tmp_path, model_folder):
    with pytest.raises(
        ValueError, match=r"lang: 'fr' is no language of this encoder's NllbTokenizer, which has deu_Latn"
    ):
        system(nllb, bases).check(["sw", "fr"])
    with pytest.raises(ValueError, match="lang: 'fr' is no language"):
        system(nllb, bases, target="fr").check(["sw"])
    with pytest.raises(
        ValueError, match=r"translator: .*llm holds LlamaForCausalLM, takes an encoder-decoder such as NLLB"
    ):
        system(bases / "llm", bases).check()
    with pytest.raises(ValueError, match=r"translator: .*encoder holds MT5EncoderModel, takes an encoder-decoder"):
        system(bases / "encoder", bases).check()
    with pytest.raises(ValueError, match=r"llm: .*nllb holds M2M100ForConditionalGeneration, takes a causal LM"):
        TranslateFirst(translator=str(nllb), llm=str(nllb)).check()
    with pytest.raises(ValueError, match="translator: no such folder: '/nowhere/at/all'"):
        system("/nowhere/at/all", bases).check()
    for name in ("translation_tokens", "translation_beams"):
        with pytest.raises(ValueError, match=f"{name}: got 0, takes a positive int"):
            system(nllb, bases, **{name: 0})
    with pytest.raises(ValueError, match="langs: got none, but NllbTokenizer is told the language of each text"):
        system(nllb, bases).load()(TEXTS)
    with pytest.raises(ValueError, match="langs: got none"):
        system(t5, bases, prefix="translate {language} to English ").load()(TEXTS)


def test_what_tells_a_job_from_others(nllb, t5, bases):
    jobs = [
        system(nllb, bases),
        system(t5, bases),
        system(nllb, bases, translation_tokens=9),
        system(nllb, bases, translation_beams=2),
        system(nllb, bases, prefix="so "),
        system(nllb, bases, target="sw"),
    ]
    prints = [str(job.fingerprint()) for job in jobs]
    assert len(set(prints)) == len(jobs)
    assert prints[0] == str(system(nllb, bases).fingerprint())
    assert jobs[0].name == "nllb + llm"


class M2M100:
    """The parts of M2M100's tokenizer that name languages: its codes are not its tokens."""

    def __init__(self):
        self.lang_code_to_id = {"en": 7, "sw": 9}

    def get_lang_id(self, code):
        return self.lang_code_to_id[code]


def test_the_target_of_m2m100():
    assert target_token(M2M100(), "English") == 7
    assert target_token(M2M100(), "sw") == 9
    with pytest.raises(ValueError, match="'de' is no language"):
        target_token(M2M100(), "de")
