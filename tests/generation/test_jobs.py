"""`layalign generate`: texts from everywhere, streams, and bad calls."""

import io
import sys

import pytest

from layalign.generation.jobs import generate_texts

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
        r"latin.txt is not UTF-8 \(invalid start byte at byte 4\)": dict(file=tmp_path / "latin.txt"),
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
