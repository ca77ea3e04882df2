"""Records that are evaluation texts are left out, and told of."""

import json
import random
import time
from pathlib import Path

import pytest

from layalign import LayAlignProcessor
from layalign.train.data.decontamination import Decontamination, EvaluationTexts, Item, evaluation_texts
from layalign.train.data.stage_data import read_stage_data
from layalign.train.recipe import Recipe
from layalign.train.settings import build

QUESTION = "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins."
CHINESE = "小明有5个苹果，他给了小红两个，又从商店买了三个，请问他现在一共有多少个苹果？"
THAI = "เป็ดของเจเน็ตออกไข่ 16 ฟองต่อวัน เธอกินไข่สามฟองเป็นอาหารเช้าทุกเช้า"
BENGALI = "জ্যানেটের হাঁসগুলি প্রতিদিন ১৬টি ডিম পাড়ে।"


def index(*texts, ngram=13):
    return EvaluationTexts([Item("set", "", number, text) for number, text in enumerate(texts)], ngram)


def kinds(texts, *candidates, ngram=13):
    found = index(*texts, ngram=ngram).matches(candidates)
    return [match and match.kind for match in found]


def test_whole_texts_are_found_however_they_are_written():
    variants = [
        QUESTION,
        QUESTION.upper(),
        f" «{QUESTION}» ",
        QUESTION.replace(" ", "\u00a0"),
        QUESTION.replace(".", " !"),
    ]
    assert kinds([QUESTION], *variants, QUESTION + " So", "") == ["exact"] * 5 + ["ngram", None]
    assert kinds(["Tano na tatu."], "tano NA tatu", "tano na") == ["exact", None], "short ones as a whole only"
    assert kinds([BENGALI], BENGALI[:-1], BENGALI.replace("ডিম", "ডম")) == ["exact", None], (
        "vowel signs are no punctuation"
    )
    assert kinds(["ﬁve", "..."], "five", "!") == ["exact", None]
    unseen = "".join(f"{letter}\u200c" if letter in "uks" else letter for letter in QUESTION)
    assert kinds([QUESTION], unseen, unseen + " So") == ["exact", "ngram"] and kinds([unseen], QUESTION) == ["exact"]
    assert kinds(["她有12个蛋"], "她 有 12 个蛋。", "她有 1 2 个蛋") == ["exact", None]


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    words = QUESTION.split()
    assert kinds([QUESTION], *("so " + " ".join(words[3 : 3 + count]) + " then" for count in (13, 12))) == [
        "ngram",
        None,
    ]
    # "Janet's" are two words.
    assert kinds([QUESTION], "x " + " ".join(words[:12]), "x " + " ".join(words[:11])) == ["ngram", None]
    assert kinds([QUESTION], "x " + " ".join(words[:6]), ngram=5) == ["ngram"]


@pytest.mark.parametrize(("text", "long", "short"), [(CHINESE, 28, 20), (THAI, 60, 40)])
def test_scripts_without_spaces_are_compared_by_characters(text, long, short):
    parts = [f"x{text[2 : 2 + length]}y" for length in (long, short)]
    assert kinds([text], text, *parts) == ["exact", "ngram", None]
    # Where the spaces stand makes no difference to a part of it.
    assert kinds([text], "x" + " ".join(text[2 : 2 + long]).replace("1 6", "16") + "y") == ["ngram"]


def test_two_texts_with_one_hash_are_not_taken_for_each_other(monkeypatch):
    from layalign.train.data import decontamination

    monkeypatch.setattr(decontamination, "hash", lambda window: 7, raising=False)
    other = " ".join(f"word{number}" for number in range(20))
    assert kinds([QUESTION], other, QUESTION + " x")[0] is None


def test_the_words_and_the_item_are_told():
    (match,) = index("nothing", QUESTION).matches(["a b " + QUESTION])
    assert (match.item.number, match.words) == (1, "janet s ducks lay 16 eggs per day she eats three for breakfast")


def test_tasks_and_files_are_read(tmp_path):
    (tmp_path / "mgsm").mkdir()
    (tmp_path / "mgsm" / "mgsm_en.tsv").write_text("How many eggs?\t18\n")
    (tmp_path / "mgsm" / "mgsm_sw.tsv").write_text("Mayai mangapi?\t18\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"question": "three", "answer": "4", "lang": "en"}\n')
    settings = Decontamination(tasks="mgsm", data=".", files=["a.txt", "b.jsonl"])
    found = evaluation_texts(settings, tmp_path)
    assert [(item.origin, item.lang, item.text) for item in found.items] == [
        ("mgsm", "sw", "Mayai mangapi?"),
        ("mgsm", "en", "How many eggs?"),
        ("a.txt", "", "one"),
        ("a.txt", "", "two"),
        ("b.jsonl", "en", "three"),
    ]
    for file, content, message in (
        ("c.txt", "", "decontaminate.files: .*c.txt is empty"),
        ("c.jsonl", "{", "c.jsonl:1: not JSON"),
        ("c.jsonl", '{"question": "a"}\n{"text": "b"}', "c.jsonl:2: takes an object with a text as question"),
        ("c.jsonl", "[1]", "c.jsonl:1: takes an object"),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            evaluation_texts(Decontamination(files=[file]), tmp_path)
    with pytest.raises(ValueError, match=r"decontaminate.tasks: msvamp: data: .* holds no file"):
        evaluation_texts(Decontamination(tasks=["msvamp"], data="."), tmp_path)


def test_what_stands_in_a_prompt_is_found_by_itself(tmp_path):
    """Stem, premise and hypothesis of fewer words than a run; not an option of a word or two, which is anybody's."""
    stem = "Where would you find a sharp pencil in an office"
    options = ["desk drawer", "next to the lake", "oven", "car", "tree"]
    premise, hypothesis = "The man in the red hat walked slowly to the old", "他走向一座建筑物"
    choices = [{"label": label, "text": text} for label, text in zip("ABCDE", options, strict=True)]
    question = {"id": "1", "question": {"stem": stem, "choices": choices}, "answerKey": "A"}
    pair = {"sentence1": premise, "sentence2": hypothesis, "gold_label": "neutral", "language": "zh"}
    caused = {
        "premise": "Mees pani kätte valed kingad",
        "choice1": "Ta vahetas need välja",
        "choice2": "Tuli",
        "label": 0,
    }
    for file, content in (
        ("x-csqa/sw/dev.jsonl", question),
        ("xnli/test.json", [pair]),
        ("xcopa/et/test.et.jsonl", caused | {"question": "effect"}),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(json.dumps(content) + "\n")
    found = evaluation_texts(build(Decontamination, {"tasks": ["xcsqa", "xnli", "xcopa"], "data": str(tmp_path)}))
    copied = [f"{stem}?", premise, hypothesis, caused["premise"], caused["choice1"], options[1]]
    assert [match and match.kind for match in found.matches(copied)] == ["exact"] * 6
    assert found.matches(["Desk drawer", "Oven", "Tuli", "Options", "What happened as a result?"]) == [None] * 5
    wholes = [item.text for item in found.items if "\n" in item.text]
    assert len(wholes) == 3 and all(found.matches(wholes))
    assert {(item.origin, item.lang) for item in found.items} == {("xcsqa", "sw"), ("xnli", "zh"), ("xcopa", "et")}


def test_a_stage_is_trained_without_them_and_says_so(settings, records, tmp_path, caplog):
    (tmp_path / "exam.txt").write_text(f"{records[2]['source']} !\n{records[5]['target']}\nunrelated\n")
    settings |= {"data_root": str(tmp_path), "decontaminate": {"files": "exam.txt"}, "cache": str(tmp_path / "cache")}
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings["stages"]["task"]["data"] = {"format": "jsonl", "path": "mine.jsonl"}
    folder = Path(settings["output"]) / "task"

    def read():
        recipe = build(Recipe, settings)
        return read_stage_data("task", recipe, LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)).train

    clean = read()
    assert len(clean) == 8
    assert (
        "task: 2 of 10 records left out, which are evaluation texts (2 exactly, 0 by 13 words in a row)" in caplog.text
    )
    report = json.loads((folder / "decontamination.json").read_text())
    assert (report["read"], report["removed"], report["by_kind"]) == (10, 2, {"exact": 2})
    assert report["by_source"] == [{"source": str(file), "lang": "sw", "read": 10, "removed": 2}]
    assert report["by_evaluation"] == [{"evaluation": "exam.txt", "lang": "", "texts": 3, "removed": 2}]
    listed = [json.loads(line) for line in (folder / "decontamination.jsonl").read_text().splitlines()]
    assert [(row["place"], row["side"]) for row in listed] == [(f"{file}:3", "source"), (f"{file}:6", "target")]
    readable = (folder / "decontamination.md").read_text()
    assert f"- {file}:3, source, exact, exam.txt 0" in readable
    # The others are what they are without it, in their order; from the cache it is told again.
    file.write_text("".join(json.dumps(record) + "\n" for place, record in enumerate(records) if place not in (2, 5)))
    settings["decontaminate"] = None
    assert read().digest() == clean.digest()
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings["decontaminate"] = {"files": ["exam.txt"]}
    (folder / "decontamination.json").unlink()
    caplog.clear()
    assert read().digest() == clean.digest()
    assert "2 of 10 records left out" in caplog.text
    assert json.loads((folder / "decontamination.json").read_text()) == report
    # Other evaluation texts are another key.
    (tmp_path / "exam.txt").write_text("unrelated\n")
    assert len(read()) == 10
    (tmp_path / "exam.txt").write_text("".join(record["source"] + "\n" for record in records))
    with pytest.raises(ValueError, match="no records are left of 10"):
        read()


def test_it_takes_minutes_for_millions_of_lines():
    """Seconds of this process for 20,000 texts of 12 words against 5,000 questions: 2 million pairs in under 10 minutes."""
    generator = random.Random(0)
    words = [str(number) + "w" for number in range(5000)]
    texts = [" ".join(generator.choices(words, k=40)) for _ in range(5000)]
    found = index(*texts)
    lines = [" ".join(generator.choices(words, k=12 + place % 8)) for place in range(20_000)]
    start = time.process_time()
    for first in range(0, len(lines), 1024):
        assert not any(found.matches(lines[first : first + 1024]))
    assert time.process_time() - start < 3.0
