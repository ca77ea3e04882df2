"""`layalign generate`: texts from everywhere, streams, and bad calls."""

import io
import json
import random
import re
import sys

import pytest
import torch
from transformers import GenerationConfig

from layalign.generation.jobs import generate_texts
from layalign.generation.logits import NaNLogits
from layalign.generation.texts import Answerer

SETTINGS = dict(max_new_tokens=6, device="cpu")


def test_one_text_is_streamed_and_several_are_printed(model_folder, loaded, questions, capsys, answers_by_hand):
    expected = answers_by_hand(*loaded, questions[:3])
    pieces = []
    records = generate_texts(model_folder, questions[:1], write=pieces.append, **SETTINGS)
    assert "".join(pieces).strip() == expected[0]
    assert len(pieces) > 2
    assert records == [{"line": 1, "text": questions[0], "answer": expected[0]}]
    generate_texts(model_folder, questions[:3], batch_size=2, **SETTINGS)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected
    assert "3 texts," in captured.err
    assert "tokens/s" in captured.err


def test_a_streamed_answer_is_flushed_word_by_word(model_folder, questions, monkeypatch):
    class Terminal(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate_texts(model_folder, questions[:1], **SETTINGS)
    assert sys.stdout.flushed > 2


def test_standard_input_and_files(model_folder, loaded, questions, tmp_path, monkeypatch, capsys, answers_by_hand):
    expected = answers_by_hand(*loaded, questions[:2])
    content = f"\ufeff{questions[0]}\r\n\n   \n{questions[1]}\n"
    (tmp_path / "texts.txt").write_text(content, encoding="utf-8")
    records = generate_texts(model_folder, file=tmp_path / "texts.txt", **SETTINGS)
    assert [(record["line"], record["answer"]) for record in records] == [(1, expected[0]), (4, expected[1])]
    for file in (None, "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content.removeprefix("\ufeff")))
        assert generate_texts(model_folder, file=file, **SETTINGS) == records
    assert capsys.readouterr().out.splitlines() == expected * 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bad_calls(model_folder, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"what\xff")
    (tmp_path / "plain").mkdir()
    calls = {
        "give either texts or a file": dict(texts=["what"], file=tmp_path / "empty.txt"),
        "empty.txt is empty": dict(file=tmp_path / "empty.txt"),
        "no such file: .*nowhere.txt": dict(file=tmp_path / "nowhere.txt"),
        r"line 1: not UTF-8 \(invalid start byte at byte 5 of the line\); on_bad_line='skip'": dict(
            file=tmp_path / "latin.txt"
        ),
        "the text given is empty": dict(texts=[" "]),
        "nothing to answer": dict(),
        "no such folder: .*nowhere": dict(texts=["what"], model_path=tmp_path / "nowhere"),
        "holds no model": dict(texts=["what"], model_path=tmp_path / "plain"),
        "is a file": dict(texts=["what"], model_path=tmp_path / "latin.txt"),
        "dtype: got 'float8'": dict(texts=["what"], dtype="float8"),
        "device: got 'quantum'": dict(texts=["what"], device="quantum"),
        "batch_size: got 0": dict(texts=["what"], batch_size=0),
    }
    monkeypatch.setattr(sys, "stdin", Terminal())
    for message, arguments in calls.items():
        with pytest.raises(ValueError, match=message):
            generate_texts(**{"model_path": model_folder, **SETTINGS, **arguments})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="standard input is empty"):
        generate_texts(model_folder, **SETTINGS)


BAD = {3: b"\xff\xfe what", 5: b"what \xed\xa0\x80 is", 8: b"is " * 33_334}


def test_bad_lines_are_named_and_the_rest_is_answered(model_folder, loaded, tmp_path, monkeypatch, capsys):
    """Eleven kinds of odd lines that are texts, and three that cannot be answered; two are of a hundred thousand characters."""
    odd = [
        b"what is 1", "what \u202e is \U0001f600".encode(), b"", b"what\0is", b"  ", "\ufeffwhat".encode(), b"what is 2\r",
        b"is", "\u0645\u0627 1".encode(), "e\u0301 \u2028 5".encode(), b"x" * 100_000,
    ]  # fmt: skip
    lines = [BAD.get(number) or odd[number % len(odd)] for number in range(1, 23)]
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    monkeypatch.setattr(loaded[0], "encoder_limit", 60)
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    call = dict(file=tmp_path / "texts.txt", output=tmp_path / "a.jsonl", **SETTINGS)
    with pytest.raises(ValueError, match=r"line 3: not UTF-8 .*; line 5: not UTF-8 .*on_bad_line='skip'"):
        generate_texts(model_folder, **call)
    assert not (tmp_path / "a.jsonl").exists()
    records = generate_texts(model_folder, **call, on_bad_line="skip")
    said = "3 not answered: line 3: not UTF-8 (invalid start byte at byte 1 of the line); line 5: not UTF-8 (.*); line 8: got"
    assert re.search(
        said.replace("(i", r"\(i").replace("line)", r"line\)").replace("(.*)", r"\(.*\)"), capsys.readouterr().err
    )
    texts = {number: line.decode("utf-8", "replace").strip() for number, line in enumerate(lines, 1)}
    assert {record["line"]: record["text"] for record in records} == {n: text for n, text in texts.items() if text}
    assert {record["line"] for record in records if record["answer"] is None} == set(BAD)
    alone = generate_texts(model_folder, [texts[n] for n in (1, 6, 7)], write=lambda _: None, **SETTINGS)
    by_line = {record["line"]: record["answer"] for record in records}
    assert [record["answer"] for record in alone] == [by_line[n] for n in (1, 6, 7)]
    with pytest.raises(ValueError, match="on_bad_line: got 'ignore', takes error or skip"):
        generate_texts(model_folder, **call, on_bad_line="ignore")


def test_ten_thousand_lines_with_bad_ones_among_them(model_folder, loaded, tmp_path, monkeypatch, capsys):
    """Each by its number, cut in the midst and gone on with; answers are made by hand: the number of the line."""
    chance = random.Random(5)
    spoilt, long = [b"\xff\xfe", b"what \xed\xa0\x80", b"\x80 is"], b"is " * 33_334
    bad = {n: spoilt[n % 4] if n % 4 < 3 else b"is " * 100 for n in chance.sample(range(1, 10_001), 150)}
    bad |= {4321: long, 8765: long}
    blank = set(chance.sample(sorted(set(range(1, 10_001)) - set(bad)), 100))
    lines = [bad.get(n) or (b" \t" if n in blank else b"what is %d" % n) for n in range(1, 10_001)]
    (tmp_path / "texts.txt").write_bytes(b"\r\n".join(lines))

    def number_of_line(self, asked, **arguments):
        return torch.tensor([[int(text.split()[-1])] for text in asked.texts])

    monkeypatch.setattr(Answerer, "_generate", number_of_line)
    monkeypatch.setattr(Answerer, "_decode", lambda self, row: str(row.item()))
    monkeypatch.setattr(loaded[0], "encoder_limit", 60)
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    call = dict(file=tmp_path / "texts.txt", output=tmp_path / "a.jsonl", batch_size=64, **SETTINGS)
    first = min(number for number, line in bad.items() if line in spoilt)
    with pytest.raises(ValueError, match=rf"^line {first}: not UTF-8 .*; and \d+ more lines; on_bad_line='skip'"):
        generate_texts(model_folder, **call)
    assert not (tmp_path / "a.jsonl").exists()
    records = generate_texts(model_folder, **call, on_bad_line="skip")
    assert f"{len(bad)} not answered: line {min(bad)}: " in capsys.readouterr().err
    assert [record["line"] for record in records] == [n for n in range(1, 10_001) if n not in blank]
    for record in records:
        assert record["answer"] == (None if record["line"] in bad else str(record["line"]))
        assert ("error" in record) == (record["line"] in bad)
    written = (tmp_path / "a.jsonl").read_bytes()
    assert [json.loads(line) for line in written.splitlines()] == records
    (tmp_path / "a.jsonl").write_bytes(written[: len(written) // 2])
    assert generate_texts(model_folder, **call, on_bad_line="skip") == records
    assert (tmp_path / "a.jsonl").read_bytes() == written


def test_a_line_that_there_is_no_memory_for_is_named_and_the_rest_is_answered(model_folder, tmp_path, monkeypatch):
    """A question of a hundred thousand words asks an encoder without a limit for terabytes."""

    def greedy_for_memory(self, asked, **arguments):
        if any(len(text) > 1000 for text in asked.texts):
            torch.empty(1 << 60, dtype=torch.uint8)
        return generate(self, asked, **arguments)

    generate = Answerer._generate
    monkeypatch.setattr(Answerer, "_generate", greedy_for_memory)
    texts = ["what is 1", "is " * 2000, "what is 2"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    call = dict(file=tmp_path / "texts.txt", **SETTINGS)
    with pytest.raises(ValueError, match="line 2: got 2001 tokens, for which there is not enough memory here"):
        generate_texts(model_folder, **call, output=tmp_path / "a.jsonl")
    records = generate_texts(model_folder, **call, output=tmp_path / "b.jsonl", on_bad_line="skip")
    assert [record["answer"] is None for record in records] == [False, True, False]


def test_a_line_whose_logits_are_nan_is_named_and_the_rest_is_answered(model_folder, tmp_path, monkeypatch):
    """In float16 one long question may overflow; the lines that were asked with it are answered, and none is asked in vain again."""

    def overflowing(self, asked, **arguments):
        if "is is" in asked.texts:
            raise NaNLogits
        return generate(self, asked, **arguments)

    generate = Answerer._generate
    monkeypatch.setattr(Answerer, "_generate", overflowing)
    texts = ["what is 1", "is is", "what is 2"]
    with pytest.raises(ValueError, match="line 2: the model's logits are NaN"):
        generate_texts(model_folder, texts, **SETTINGS, output=tmp_path / "a.jsonl")
    records = generate_texts(model_folder, texts, **SETTINGS, output=tmp_path / "b.jsonl", on_bad_line="skip")
    assert [record["answer"] is None for record in records] == [False, True, False]


def test_arguments_that_are_no_text_are_named(model_folder):
    with pytest.raises(ValueError, match=r"line 2: holds a surrogate, which is no character \(character 4\)"):
        generate_texts(model_folder, ["what", "is \udcff"], **SETTINGS)
    with pytest.raises(ValueError, match="texts: got 1 among them, takes texts"):
        generate_texts(model_folder, ["what", 1], **SETTINGS)


def test_a_generation_config_is_heard(model_folder, questions, capsys):
    """Its beams too, which do not go with a text that is shown while it is written."""
    short = GenerationConfig(max_new_tokens=2, num_beams=2)
    (record,) = generate_texts(model_folder, questions[:1], device="cpu", generation_config=short)
    assert 1 <= len(record["answer"].split()) <= 2


def test_arguments_that_no_later_start_could_know_again(model_folder, questions, tmp_path):
    given = {"stopping_criteria": [object()], **SETTINGS}
    with pytest.raises(ValueError, match=r"stopping_criteria: got .* could not know again"):
        generate_texts(model_folder, questions, output=tmp_path / "a.jsonl", **given)
    assert not list(tmp_path.iterdir())
