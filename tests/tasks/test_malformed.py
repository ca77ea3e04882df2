"""Malformed files: each is refused with its place (file and line, or dataset and row) and what is accepted there."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from layalign.tasks import load_task
from tests.tasks.originals import FLORES, XCOPA, csqa, write_lines, xnli_rows

GOOD_CSQA = csqa("sw", "Samaki huishi wapi?", ["jangwani", "majini", "angani", "mtini", "kitabuni"], "B")
GOOD_XNLI = xnli_rows()[0]
GOOD_XCOPA = XCOPA["sw"]
GOOD = {"xcsqa": GOOD_CSQA, "xcopa": GOOD_XCOPA, "msvamp": {"m_query": "Ngapi?", "response": "7.0"}}
FILES = {"xcsqa": "sw/dev.jsonl", "xcopa": "sw/test.sw.jsonl", "msvamp": "test_Swahili.jsonl"}


@dataclass
class Case:
    """A task, files that are wrong, what the error says after the folder's name, and the file that is named as `data`."""

    task: str
    files: dict[str, str | bytes]
    said: str
    data: str = ""


def second_line(task, row, said, change=lambda line: line):
    """A good line and a bad one."""
    line = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    file = FILES[task]
    return Case(task, {file: f"{json.dumps(GOOD[task])}\n{change(line)}\n"}, f"{file}:2: {said}")


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


def question(**changes):
    return GOOD_CSQA | {"question": GOOD_CSQA["question"] | changes}


def choices(*changed):
    """The good question with some of its choices replaced."""
    kept = GOOD_CSQA["question"]["choices"]
    return question(choices=[*changed, *kept[len(changed) :]])


def listed(*rows, said, line):
    """A test.json of one row a line."""
    body = ",\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    return Case("xnli", {"xnli/test.json": f"[\n{body}\n]\n"}, f"xnli/test.json:{line}: {said}")


def table(*lines, said):
    return Case("xnli", {"xnli.test.tsv": "".join(f"{line}\n" for line in lines)}, f"xnli.test.tsv{said}")


def flores(said, **files):
    lines = {code: "".join(f"{line}\n" for line in found) for code, found in FLORES.items()} | files
    return Case("flores", {f"devtest/{code}.devtest": content for code, content in lines.items() if content}, said)


HEADER = "language\tgold_label\tsentence1\tsentence2"
TAKES_LETTERS = "takes one of A, B, C, D, E"
TAKES_LABELS = "takes entailment, neutral, contradiction, or 0 to 2 for them"
TAKES_TEXT = "takes a text that is not empty"
TAKES_CHOICES = "takes a list of at least two, each label and text"

CASES = {
    "X-CSQA, not JSON": second_line("xcsqa", "{stem}", "not JSON (Expecting property name"),
    "X-CSQA, a list": second_line("xcsqa", "[]", "got a list, takes a JSON object per line"),
    "X-CSQA, a string": second_line("xcsqa", '"A"', "got a str, takes a JSON object per line"),
    "X-CSQA, an empty line": Case(
        "xcsqa",
        {FILES["xcsqa"]: f"{json.dumps(GOOD_CSQA)}\n\n{json.dumps(GOOD_CSQA)}\n"},
        "sw/dev.jsonl:2: not JSON (Expecting value",
    ),
    "X-CSQA, no question": second_line("xcsqa", without(GOOD_CSQA, "question"), "no field question; it has id, lang"),
    "X-CSQA, a question as text": second_line(
        "xcsqa", GOOD_CSQA | {"question": "Wapi?"}, "question: got 'Wapi?', takes an object with stem and choices"
    ),
    "X-CSQA, no stem": second_line(
        "xcsqa",
        GOOD_CSQA | {"question": without(GOOD_CSQA["question"], "stem")},
        "question: no field stem; it has choices",
    ),
    "X-CSQA, a blank stem": second_line("xcsqa", question(stem=" \n"), f"question.stem: got ' \\n', {TAKES_TEXT}"),
    "X-CSQA, a number as stem": second_line("xcsqa", question(stem=7), f"question.stem: got 7, {TAKES_TEXT}"),
    "X-CSQA, no choices": second_line(
        "xcsqa", question(choices=None), "question: no field choices; it has stem, choices"
    ),
    "X-CSQA, empty choices": second_line("xcsqa", question(choices=[]), f"question.choices: got [], {TAKES_CHOICES}"),
    "X-CSQA, choices as texts": second_line(
        "xcsqa", question(choices=["a", "b"]), f"question.choices: got ['a', 'b'], {TAKES_CHOICES}"
    ),
    "X-CSQA, one choice": second_line(
        "xcsqa",
        question(choices=[{"label": "A", "text": "a"}]),
        "question.choices: got [{'label': 'A', 'text': 'a'}], takes a list",
    ),
    "X-CSQA, columns of unequal length": second_line(
        "xcsqa",
        question(choices={"label": ["A", "B"], "text": ["a"]}),
        "question.choices: label and text take two lists of the same length",
    ),
    "X-CSQA, a blank choice": second_line(
        "xcsqa", choices({"label": "A", "text": ""}), f"question.choices[0]: text: got '', {TAKES_TEXT}"
    ),
    "X-CSQA, a choice without text": second_line(
        "xcsqa", choices({"label": "A"}), "question.choices[0]: no field text; it has label"
    ),
    "X-CSQA, letters out of order": second_line(
        "xcsqa",
        choices({"label": "B", "text": "a"}),
        "question.choices[0]: label: got 'B', takes 'A', as the letters are in order",
    ),
    "X-CSQA, the test file's missing answer": second_line(
        "xcsqa", without(GOOD_CSQA, "answerKey"), "no field answerKey; it has id, lang, question"
    ),
    "X-CSQA, an answer that is no choice": second_line(
        "xcsqa", GOOD_CSQA | {"answerKey": "F"}, f"answerKey: got 'F', {TAKES_LETTERS}"
    ),
    "X-CSQA, a small letter": second_line(
        "xcsqa", GOOD_CSQA | {"answerKey": "b"}, f"answerKey: got 'b', {TAKES_LETTERS}"
    ),
    "X-CSQA, a number as answer": second_line(
        "xcsqa", GOOD_CSQA | {"answerKey": 1}, f"answerKey: got 1, {TAKES_LETTERS}"
    ),
    "X-CSQA, not UTF-8": Case(
        "xcsqa", {FILES["xcsqa"]: b'{"id": "\xff"}'}, "sw/dev.jsonl:1: not UTF-8 (invalid start byte"
    ),
    "X-CSQA, an empty file": Case("xcsqa", {FILES["xcsqa"]: ""}, "sw/dev.jsonl: the file is empty"),
    "XNLI, not JSON": listed(GOOD_XNLI, "{label: 1}", said="not JSON (Expecting property name", line=3),
    "XNLI, a row that is a list": listed(
        GOOD_XNLI, "[1]", said="got a list, takes a JSON object for each row of the list", line=3
    ),
    "XNLI, no comma": Case(
        "xnli",
        {"xnli/test.json": f"[\n{json.dumps(GOOD_XNLI)}\n{json.dumps(GOOD_XNLI)}\n]"},
        "xnli/test.json:3: not JSON (the list needs a comma or its end here)",
    ),
    "XNLI, cut short": Case(
        "xnli", {"xnli/test.json": f"[\n{json.dumps(GOOD_XNLI)},\n"}, "xnli/test.json:2: not JSON (Expecting value"
    ),
    "XNLI, text behind the list": Case(
        "xnli",
        {"xnli/test.json": f"[\n{json.dumps(GOOD_XNLI)}\n]\n[]"},
        "xnli/test.json:4: not JSON (more text after the list)",
    ),
    "XNLI, an empty list": Case("xnli", {"xnli/test.json": "[]"}, " has no row for xnli"),
    "XNLI, no language": listed(
        GOOD_XNLI, without(GOOD_XNLI, "language"), said="no field language or lang; it has label", line=3
    ),
    "XNLI, a number as language": listed(GOOD_XNLI | {"language": 3}, said=f"language: got 3, {TAKES_TEXT}", line=2),
    "XNLI, no premise": listed(
        GOOD_XNLI, without(GOOD_XNLI, "sentence1"), said="no field sentence1 or premise; it has language", line=3
    ),
    "XNLI, a blank hypothesis": listed(GOOD_XNLI | {"sentence2": ""}, said=f"sentence2: got '', {TAKES_TEXT}", line=2),
    "XNLI, no label": listed(without(GOOD_XNLI, "label"), said="no field gold_label or label; it has language", line=2),
    "XNLI, annotators who disagree": listed(GOOD_XNLI | {"label": "-"}, said=f"label: got '-', {TAKES_LABELS}", line=2),
    "XNLI, a label in capitals": listed(
        GOOD_XNLI | {"label": "Neutral"}, said=f"label: got 'Neutral', {TAKES_LABELS}", line=2
    ),
    "XNLI, a label too high": listed(GOOD_XNLI | {"label": 3}, said=f"label: got 3, {TAKES_LABELS}", line=2),
    "XNLI, true as label": listed(GOOD_XNLI | {"label": True}, said=f"label: got True, {TAKES_LABELS}", line=2),
    "XNLI table, too few fields": table(
        HEADER,
        "sw\tneutral\ta\tb",
        "sw\tneutral\ta",
        said=":3: got 3 tab-separated fields, takes 4 as in the first line",
    ),
    "XNLI table, no header": table(
        "sw\tneutral\ta\tb", "en\tneutral\ta\tb", said=":2: no field language or lang; it has sw, neutral, a, b"
    ),
    "XNLI table, no column of labels": table(
        "language\tsentence1\tsentence2", "sw\ta\tb", said=":2: no field gold_label or label; it has language"
    ),
    "XNLI table, a wrong label": table(HEADER, "sw\tmaybe\ta\tb", said=f":2: label: got 'maybe', {TAKES_LABELS}"),
    "XNLI table, only its header": Case("xnli", {"xnli.test.tsv": HEADER}, " has no row for xnli"),
    "XCOPA, no premise": second_line("xcopa", without(GOOD_XCOPA, "premise"), "no field premise; it has choice1"),
    "XCOPA, a blank choice": second_line("xcopa", GOOD_XCOPA | {"choice2": " "}, f"choice2: got ' ', {TAKES_TEXT}"),
    "XCOPA, another question": second_line(
        "xcopa", GOOD_XCOPA | {"question": "why"}, "question: got 'why', takes cause or effect"
    ),
    "XCOPA, a list as question": second_line(
        "xcopa", GOOD_XCOPA | {"question": ["cause"]}, "question: got ['cause'], takes cause or effect"
    ),
    "XCOPA, a label from one on": second_line("xcopa", GOOD_XCOPA | {"label": 2}, "label: got 2, takes 0 or 1"),
    "XCOPA, a label as text": second_line("xcopa", GOOD_XCOPA | {"label": "1"}, "label: got '1', takes 0 or 1"),
    "XCOPA, true as label": second_line("xcopa", GOOD_XCOPA | {"label": True}, "label: got True, takes 0 or 1"),
    "FLORES, no English": flores(" has no en, which every question of flores is answered in", eng=""),
    "FLORES, a line too few": flores(
        "devtest/eng.devtest:2: has no row of the same number in the other language", swh="Treni husimama hapa.\n"
    ),
    "FLORES, a line too many": flores(
        "devtest/swh.devtest:3: has no row of the same number in the other language", swh="a\nb\nc\n"
    ),
    "FLORES, an empty line": flores(f"devtest/swh.devtest:1: sentence: got '', {TAKES_TEXT}", swh="\nb\n"),
    "FLORES, an empty English line": flores(f"devtest/eng.devtest:1: sentence: got '', {TAKES_TEXT}", eng="\nb\n"),
    "FLORES, an empty file": flores("devtest/swh.devtest: the file is empty", swh="\n"),
    "FLORES, two files of a language": flores(
        "swh_Latn.devtest are both sw, takes one file of each", swh_Latn="a\nb\n"
    ),
    "MSVAMP, no question": second_line("msvamp", {"response": "7.0"}, "no field m_query or question; it has response"),
    "MSVAMP, an answer in words": second_line(
        "msvamp", {"m_query": "q", "response": "seven"}, "answer: got 'seven', takes one finite number"
    ),
    "MSVAMP, infinity": second_line(
        "msvamp", '{"m_query": "q", "response": Infinity}', "answer: got inf, takes one finite number"
    ),
    "no file": Case("xcsqa", {"sw/test.jsonl": "{}"}, "holds no file named like {code}/dev.jsonl for xcsqa"),
    "no folder": Case(
        "xnli", {"other.txt": "x"}, "nowhere is not a folder; xnli takes a folder, one of its files", "nowhere"
    ),
    "a file where a folder is taken": Case(
        "flores",
        {"eng.devtest": "a\n"},
        "eng.devtest is not a folder; flores takes a folder or a datasets name",
        "eng.devtest",
    ),
}


def test_there_are_at_least_forty():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_is_refused_with_its_place(case, tmp_path):
    found = CASES[case]
    for name, content in found.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        load_task(found.task, tmp_path / found.data)
    message = str(raised.value)
    assert found.said in message
    assert str(tmp_path) in message
    assert "\n" not in message


SAVED: dict[str, tuple[str, Callable, str]] = {
    "another split": (
        "xnli",
        lambda folder, kind: kind.dict({"train": kind.rows([GOOD_XNLI])}, folder),
        r"has the parts train; xnli takes languages called like \{code\}, or the split test",
    ),
    "no language": (
        "xcsqa",
        lambda folder, kind: kind.dict({"validation": kind.rows([without(GOOD_CSQA, "lang")])}, folder),
        r"\(validation\), row 0: no field language or lang; it has id, question, answerKey",
    ),
    "a bad row": (
        "xcopa",
        lambda folder, kind: kind.dict({"sw": kind.rows([GOOD_XCOPA, GOOD_XCOPA | {"label": 5}])}, folder),
        r"\(sw\), row 1: label: got 5, takes 0 or 1",
    ),
    "sentences of other numbers": (
        "flores",
        lambda folder, kind: kind.dict(
            {name: kind.rows([{"id": number, "sentence": "a"}]) for number, name in enumerate(("eng", "swh"))}, folder
        ),
        r"\(swh\), row 0: id: got 1, takes 0 as in .*\(eng\), row 0",
    ),
}


class Saved:
    """Writers of saved folders."""

    @staticmethod
    def rows(rows):
        from datasets import Dataset

        return Dataset.from_list(rows)

    @staticmethod
    def dict(parts, folder):
        from datasets import DatasetDict

        DatasetDict(parts).save_to_disk(folder)


@pytest.mark.parametrize("case", SAVED)
def test_a_malformed_saved_folder_is_refused_with_its_row(case, tmp_path):
    task, write, said = SAVED[case]
    write(tmp_path / "saved", Saved)
    with pytest.raises(ValueError, match=said):
        load_task(task, tmp_path / "saved")


def test_a_dataset_that_cannot_be_had_is_named_with_what_to_give_instead(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"xcsqa could not be loaded as the dataset .*files named like \{code\}/dev.jsonl"
    ):
        load_task("xcsqa", f"datasets:{tmp_path / 'nothing'}")


def test_a_bad_line_after_the_limit_is_not_read(tmp_path):
    write_lines(tmp_path / "sw" / "dev.jsonl", [json.dumps(GOOD_CSQA), "{"])
    assert len(load_task("xcsqa", tmp_path, limit=1)) == 1
