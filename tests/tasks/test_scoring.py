"""What choices and translations are scored by, against slow formulas and sacrebleu's own functions."""

import random
import sys
from types import SimpleNamespace

import pytest
import sacrebleu

from layalign.tasks.choices import Choices
from layalign.tasks.task import shares
from layalign.tasks.translations import Translations
from layalign.tasks.word_problems import SCORING

CHOICES = ["entailment", "neutral", "contradiction"]


def record(lang, index, said, answer, values=None, choices=CHOICES):
    found = {"task": "xnli", "lang": lang, "index": index, "answer": answer, "choices": choices, "prediction": said}
    return found | Choices().fields(said, answer) | ({} if values is None else {"loglikelihoods": values})


@pytest.mark.parametrize(
    ("said", "right"),
    [("B", True), (" B\n", True), ("b", False), ("B.", False), ("A B", False), ("", False), ("BB", False)],
)
def test_generated_text_is_the_answer_or_not_as_published(said, right):
    assert Choices().fields(said, "B") == {"official": right}


def test_choices_are_scored_as_slow_formulas_do():
    draw = random.Random(3)
    records = [
        record(lang, index, draw.choice([*CHOICES, "?"]), draw.choice(CHOICES), [-draw.random() * 20 for _ in CHOICES])
        for lang in ("sw", "en")
        for index in range(40)
    ]
    scores = Choices().scores(records)
    assert list(scores) == ["official", "loglikelihood", "loglikelihood_per_byte"]
    for lang in ("sw", "en"):
        right = {name: 0 for name in scores}
        for found in (found for found in records if found["lang"] == lang):
            right["official"] += found["prediction"].strip() == found["answer"]
            best = best_per_byte = 0
            for place, choice in enumerate(CHOICES):
                values, lengths = found["loglikelihoods"], [len(other.encode("utf-8")) for other in CHOICES]
                if values[place] > values[best]:
                    best = place
                if values[place] / lengths[place] > values[best_per_byte] / lengths[best_per_byte]:
                    best_per_byte = place
                assert len(choice) == lengths[place]
            right["loglikelihood"] += CHOICES[best] == found["answer"]
            right["loglikelihood_per_byte"] += CHOICES[best_per_byte] == found["answer"]
        assert {name: by_language[lang] for name, by_language in scores.items()} == {
            name: pytest.approx(100 * count / 40) for name, count in right.items()
        }
    assert len({tuple(sorted(by_language.items())) for by_language in scores.values()}) == 3


def test_of_equal_choices_the_first_wins_and_bytes_are_not_letters():
    def verdicts(values, answer, choices):
        scores = Choices().scores([record("sw", 0, "", answer, values, choices)])
        return scores["loglikelihood"]["sw"], scores["loglikelihood_per_byte"]["sw"]

    assert verdicts([-2.0, -2.0], "A", ["A", "B"]) == (100.0, 100.0)
    assert verdicts([-2.0, -2.0], "B", ["A", "B"]) == (0.0, 0.0)
    assert verdicts([-3.0, -6.0], "น้ำ", ["aa", "น้ำ"]) == (0.0, 100.0)  # nine bytes of three letters
    assert verdicts([-float("inf"), -4.0], "B", ["A", "B"]) == (100.0, 100.0)


def test_records_without_loglikelihoods_leave_those_scorers_out():
    scored, not_scored = record("sw", 0, "neutral", "neutral", [0.0, -1.0, -2.0]), record("sw", 1, "", "neutral")
    assert Choices().scores([scored, not_scored]) == {"official": {"sw": 50.0}}
    assert list(Choices().scores([scored])) == ["official", "loglikelihood", "loglikelihood_per_byte"]
    assert Choices().scores([]) == {"official": {}}


@pytest.mark.parametrize("values", [[-1.0], [-1.0, -2.0, -3.0, -4.0], [-1.0, float("nan"), -2.0]])
def test_loglikelihoods_that_do_not_belong_to_the_choices_are_refused(values):
    with pytest.raises(ValueError, match=r"xnli, sw, question 7: loglikelihoods: got .*, takes a number for each of"):
        Choices().scores([record("sw", 7, "", "neutral", values)])


@pytest.mark.parametrize("scoring", [SCORING, Choices()], ids=["numbers", "choices"])
def test_statistics_of_verdicts_give_the_scores(scoring):
    draw = random.Random(5)
    records = [
        {"lang": "sw", "index": index, **scoring.fields(draw.choice(["7", "8", ""]), "7")} for index in range(30)
    ]
    for name, (rows, score) in scoring.statistics(records).items():
        assert score([sum(column) for column in zip(*rows, strict=True)]) == scoring.scores(records)[name]["sw"]


def test_shares():
    rows, score = shares([True, False, True, True])
    assert score([sum(column) for column in zip(*rows, strict=True)]) == 75.0


REFERENCES = {
    "sw": ["Trains stop here.", "It rained for a whole week.", "She sold three of her goats at the market.", "No."],
    "zh": ["The old bridge was closed, and nobody knew why.", "He drinks tea."],
}
SAID = {
    "sw": ["Trains stop here.", " It rained for a week. ", "She sold the goats\nat a market.", ""],
    "zh": ["The old bridge is closed and nobody knows why.", "He drinks a tea."],
}


@pytest.fixture
def translations(monkeypatch, tmp_path):
    """Translations of two languages, without spBLEU's model."""
    monkeypatch.delenv("LAYALIGN_SPBLEU_MODEL", raising=False)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    return [
        {"task": "flores", "lang": lang, "index": index, "prediction": said, "answer": answer}
        for lang, found in SAID.items()
        for index, (said, answer) in enumerate(zip(found, REFERENCES[lang], strict=True))
    ]


def test_translations_are_scored_by_sacrebleu(translations):
    scoring = Translations()
    scores = scoring.scores(translations)
    for lang, said in SAID.items():
        said = [text.strip() for text in said]
        assert scores["bleu"][lang] == sacrebleu.corpus_bleu(said, [REFERENCES[lang]]).score
        assert scores["chrf++"][lang] == sacrebleu.corpus_chrf(said, [REFERENCES[lang]], word_order=2).score
    assert Translations().fields("a", "b") == {}


def test_statistics_of_translations_give_the_scores(translations):
    scoring = Translations()
    scores = scoring.scores(translations)
    for lang in SAID:
        found = [translation for translation in translations if translation["lang"] == lang]
        for name, (rows, score) in scoring.statistics(found).items():
            assert len(rows) == len(found)
            total = [sum(column) for column in zip(*rows, strict=True)]
            assert score(total) == pytest.approx(scores[name][lang], abs=1e-9)


def test_signatures_name_the_tokenizer_and_the_version(translations):
    signatures = Translations().signatures()
    assert list(signatures) == ["bleu", "chrf++"]
    assert "tok:13a" in signatures["bleu"]
    assert "nw:2" in signatures["chrf++"]
    assert all(f"version:{sacrebleu.__version__}" in signature for signature in signatures.values())
    scored = Translations()
    scored.scores(translations)
    assert scored.signatures() == signatures


def test_spbleu_without_sentencepiece_is_left_out_and_named(translations, monkeypatch):
    monkeypatch.setattr("layalign.tasks.translations.find_spec", lambda name: None)
    assert list(Translations().scores(translations)) == ["bleu", "chrf++"]
    assert Translations().notes() == ["spBLEU is left out: the package sentencepiece is not installed."]


def test_spbleu_without_its_model_is_left_out_and_named(translations, monkeypatch, tmp_path):
    monkeypatch.setattr("layalign.tasks.translations.find_spec", lambda name: object())
    assert list(Translations().scores(translations)) == ["bleu", "chrf++"]
    (note,) = Translations().notes()
    assert f"model {tmp_path}/models/flores200sacrebleuspm is not there; set LAYALIGN_SPBLEU_MODEL to it" in note
    monkeypatch.setenv("LAYALIGN_SPBLEU_MODEL", "/nowhere/spm.model")
    assert Translations().notes() == ["spBLEU is left out: its tokenizer's model /nowhere/spm.model is not there."]


@pytest.mark.parametrize(("name", "said"), [("flores200sacrebleuspm", "tok:flores200"), ("own.model", "tok:spm:")])
def test_spbleu_with_a_local_model(translations, monkeypatch, tmp_path, name, said):
    """With a SentencePiece of the test's own, whose pieces are letters."""

    class Processor:
        def __init__(self, model_file):
            self.loaded = model_file

        def encode(self, line, out_type):
            assert out_type is str
            return list(line.replace(" ", "▁"))

    model = tmp_path / name
    model.write_bytes(b"pieces")
    monkeypatch.setitem(
        sys.modules, "sentencepiece", SimpleNamespace(SentencePieceProcessor=Processor, __spec__=object())
    )
    monkeypatch.setenv("LAYALIGN_SPBLEU_MODEL", str(model))
    scoring = Translations()
    assert scoring.notes() == []
    scores = scoring.scores(translations)
    assert list(scores) == ["bleu", "spbleu", "chrf++"]
    letters = [" ".join(text.strip().replace(" ", "▁")) for text in SAID["zh"]]
    expected = sacrebleu.corpus_bleu(
        letters, [[" ".join(text.replace(" ", "▁")) for text in REFERENCES["zh"]]], tokenize="none", force=True
    )
    assert scores["spbleu"]["zh"] == expected.score
    assert said in scoring.signatures()["spbleu"]
