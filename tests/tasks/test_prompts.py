"""Byte by byte what the published functions return: the prompts and texts of ten examples of each task, and the numbers that
the published scorer reads. published.json holds what they returned; they are not needed here.
"""

import json
from pathlib import Path

import pytest

from layalign.languages import NAMES, language_name
from layalign.tasks import find_task, load_task, prompts
from layalign.tasks.numbers import official_number

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def examples(name):
    return [pytest.param(row, id=f"{number}-{row['lang']}") for number, row in enumerate(PUBLISHED[name])]


def asked(task, folder):
    """What the LLM reads of the only problem in `folder`."""
    (problem,) = load_task(task, folder)
    template = find_task(task).prompt
    return template.format(text=problem["question"], language=NAMES.get(problem["lang"]))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def test_there_are_ten_examples_of_each_task_in_four_languages():
    for name in ("math", "translation", "xcsqa", "xnli"):
        assert len(PUBLISHED[name]) >= 10
        assert len({row["lang"] for row in PUBLISHED[name]}) >= 4


@pytest.mark.parametrize("row", examples("math"))
def test_mathematics(row, tmp_path):
    assert prompts.MATH.format(text=row["text"]).encode() == row["expected"].encode()
    if row["task"] == "mgsm":
        write(tmp_path / "evaluation" / "mgsm" / f"mgsm_{row['lang']}.tsv", f"{row['text']}\t18\n")
    else:
        file = tmp_path / "evaluation" / "msvamp" / f"test_{language_name(row['lang'])}.jsonl"
        write(file, json.dumps({"m_query": row["text"], "response": "18.0"}))
    assert asked(row["task"], tmp_path).encode() == row["expected"].encode()


@pytest.mark.parametrize("row", examples("translation"))
def test_translation(row, tmp_path):
    filled = prompts.TRANSLATION.format(text=row["text"], language=language_name(row["lang"]))
    assert filled.encode() == row["expected"].encode()
    write(tmp_path / f"{row['lang']}.devtest", row["text"] + "\n")
    write(tmp_path / "eng.devtest", "In English.\n")
    assert asked("flores", tmp_path).encode() == row["expected"].encode()


@pytest.mark.parametrize("row", examples("xcsqa"))
def test_xcsqa(row, tmp_path):
    write(tmp_path / "x-csqa" / row["lang"] / "dev.jsonl", json.dumps(row["row"]))
    assert asked("xcsqa", tmp_path).encode() == row["expected"].encode()


@pytest.mark.parametrize("row", examples("xnli"))
def test_xnli(row, tmp_path):
    write(tmp_path / "xnli" / "test.json", json.dumps([row["row"]]))
    assert asked("xnli", tmp_path).encode() == row["expected"].encode()


def test_white_space_is_kept_where_the_published_reader_keeps_it(tmp_path):
    write(tmp_path / "mgsm_sw.tsv", "  Bata wangapi? \t18\n")
    assert [problem["question"] for problem in load_task("mgsm", tmp_path)] == ["Bata wangapi? "]
    write(tmp_path / "test_Swahili.json", json.dumps({"m_query": " Bata wangapi? ", "response": "18.0"}))
    assert [problem["question"] for problem in load_task("msvamp", tmp_path)] == [" Bata wangapi? "]


def test_xcsqa_has_nothing_between_its_colon_and_the_first_choice():
    assert prompts.xcsqa("Where?", ["here", "there"]) == "Where?\nOptions:A. here\tB. there\nAnswer:"


@pytest.mark.parametrize("row", PUBLISHED["numbers"], ids=lambda row: repr(row["text"][:12]))
def test_numbers_as_the_published_scorer_reads_them(row):
    assert official_number(row["text"]) == float(row["value"])
