"""Answerers and `layalign generate`: order, batches, templates, streams, and files that survive interruptions."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tqdm import tqdm

from layalign.generation.jobs import generate_texts
from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.journal import Journal
from layalign.loading import fingerprint, load_model

SETTINGS = dict(max_new_tokens=6, device="cpu")


def answers_by_hand(model, processor, texts, template="question {text} answer"):
    """The model's answers one by one, with nothing of the Answerer's."""
    found = []
    for text in texts:
        prompt = template and template.replace("{text}", text)
        ids = model.generate(**processor(text, prompt=prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
        ids = ids[: ids.index(2)] if 2 in ids else ids
        found.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_the_models_own_in_order_at_any_batch_size(loaded, questions, batch_size):
    answers = Answerer(*loaded, max_new_tokens=6, batch_size=batch_size)(questions)
    assert answers == answers_by_hand(*loaded, questions)
    assert len(set(answers)) > len(questions) // 2


def test_prompts(loaded, questions):
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


def test_one_text_is_streamed_and_several_are_printed(model_folder, loaded, questions, capsys):
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


def test_standard_input_and_files(model_folder, loaded, questions, tmp_path, monkeypatch, capsys):
    expected = answers_by_hand(*loaded, questions[:2])
    content = f"\ufeff{questions[0]}\r\n\n   \n{questions[1]}\n"
    (tmp_path / "texts.txt").write_text(content, encoding="utf-8")
    records = generate_texts(model_folder, file=tmp_path / "texts.txt", **SETTINGS)
    assert [(record["line"], record["answer"]) for record in records] == [(1, expected[0]), (4, expected[1])]
    for file in (None, "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content.removeprefix("\ufeff")))
        assert generate_texts(model_folder, file=file, **SETTINGS) == records
    assert capsys.readouterr().out.splitlines() == expected * 3


@pytest.fixture
def job(model_folder, questions, tmp_path):
    """Arguments of a file job that has 23 lines."""
    (tmp_path / "texts.txt").write_text("\n".join(questions), encoding="utf-8")
    return dict(
        model_path=model_folder,
        file=tmp_path / "texts.txt",
        output=tmp_path / "out" / "a.jsonl",
        batch_size=1,
        **SETTINGS,
    )


def test_a_job_cut_anywhere_goes_on_without_repeating_or_losing_a_line(job, loaded, monkeypatch):
    generate_texts(**job)
    output = job["output"]
    whole = output.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["line"] for record in records] == list(range(1, 24))
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_: loaded)
    for length in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:length])
        assert generate_texts(**job | {"batch_size": 3}) == records
        assert output.read_bytes() == whole
    output.unlink()
    generate_texts(**job)
    assert output.read_bytes() == whole


def test_a_finished_job_is_not_done_again(job, monkeypatch):
    records = generate_texts(**job)
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert generate_texts(**job) == records


def test_a_killed_process_is_continued(job):
    code = f"""
import time
from layalign.generation import jobs, texts
answer = texts.Answerer.__call__
texts.Answerer.__call__ = lambda self, texts, streamer=None: (time.sleep(0.2), answer(self, texts))[1]
jobs.generate_texts({str(job["model_path"])!r}, file={str(job["file"])!r}, output={str(job["output"])!r},
                     batch_size=1, max_new_tokens=6, device="cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (job["output"].exists() and job["output"].stat().st_size):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = job["output"].read_bytes()
    assert 0 < kept.count(b"\n") < 23
    records = generate_texts(**job)
    assert [record["line"] for record in records] == list(range(1, 24))
    assert job["output"].read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])


def answer_until_killed(job, loaded, delay):
    """In a child process: the job with a model already loaded and a disk so slow that a kill can fall between two parts of a line."""

    class SlowDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            for start in range(0, len(content), 40):
                time.sleep(0.002)
                self.file.write(content[start : start + 40])
                self.file.flush()

    append, answer = Journal.append, Answerer.__call__

    def slow_append(journal, records):
        journal._file = SlowDisk(journal._file)
        append(journal, records)
        journal._file = journal._file.file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layalign.generation.jobs.load_model", lambda *_: loaded)
        patch.setattr(Journal, "append", slow_append)
        patch.setattr(Answerer, "__call__", lambda self, texts: (time.sleep(delay), answer(self, texts))[1])
        generate_texts(**job)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_lose_and_repeat_nothing(job, loaded, questions, monkeypatch, capfd):
    """200 lines; every run but the last ends by SIGKILL while it answers or writes, none is told beforehand."""
    texts = [f"{questions[index % len(questions)]} and {index % 40}" for index in range(200)]
    job["file"].write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_: loaded)
    whole_job = job | {"output": job["output"].with_name("whole.jsonl"), "batch_size": 8}
    generate_texts(**whole_job)
    whole = whole_job["output"].read_bytes()
    moments = random.Random(5)
    lines = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                tqdm.set_lock(
                    threading.RLock()
                )  # the parent's is shared: killed while holding it, the child would keep it
                answer_until_killed(job, loaded, delay=0.08)
                status = 0
            finally:
                os._exit(status)
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended before it was killed"
        kept = job["output"].read_bytes() if job["output"].exists() else b""
        assert whole.startswith(kept)
        assert kept.count(b"\n") >= lines, "a line that was on the disk is gone"
        lines = kept.count(b"\n")
    assert 0 < lines < 200
    records = generate_texts(**job)
    assert [(record["line"], record["text"]) for record in records] == list(enumerate(texts, 1))
    assert job["output"].read_bytes() == whole


def test_several_sequences_a_text(loaded, questions):
    answerer = Answerer(*loaded, max_new_tokens=6, num_beams=3, num_return_sequences=2, batch_size=4)
    sequences = answerer.sequences(questions[:5])
    assert [answers[0] for answers in sequences] == Answerer(*loaded, max_new_tokens=6, num_beams=3)(questions[:5])
    assert all(len(set(answers)) == 2 for answers in sequences)
    with pytest.raises(ValueError, match="num_return_sequences: got 2, takes 1"):
        answerer(questions[:5])


def change_texts(job, loaded):
    job["file"].write_text("what is 5\n")


def change_tokens(job, loaded):
    job["max_new_tokens"] = 7


def change_prompt(job, loaded):
    job["prompt"] = None


def change_model(job, loaded):
    folder = job["file"].parent / "other"
    loaded[0].save_pretrained(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    job["model_path"] = folder


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_texts, "texts"), (change_tokens, "max_new_tokens"), (change_prompt, "prompt"), (change_model, "model")],
)
def test_another_jobs_output_is_refused_and_kept(job, loaded, change, named):
    generate_texts(**job)
    before = job["output"].read_bytes()
    change(job, loaded)
    with pytest.raises(ValueError, match=rf"belongs to another job \(different {named}\)"):
        generate_texts(**job)
    assert job["output"].read_bytes() == before


def not_ours(job):
    job["output"].parent.mkdir()
    job["output"].write_text("my notes, without an end of line")


def broken_line(job):
    generate_texts(**job)
    lines = job["output"].read_bytes().split(b"\n")
    job["output"].write_bytes(b"\n".join([lines[0], lines[1][:-5], *lines[2:]]))


def broken_description(job):
    generate_texts(**job)
    job["output"].with_name("a.jsonl.job.json").write_text("{")


def a_folder(job):
    job["output"].mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_ours, "a.jsonl exists and was not written by such a job"),
        (broken_line, "a.jsonl:2: not JSON"),
        (broken_description, "a.jsonl exists and was not written by such a job"),
        (a_folder, "a.jsonl is a folder"),
    ],
)
def test_a_spoilt_output_is_refused_and_kept(job, spoil, message):
    spoil(job)
    before = job["output"].read_bytes() if job["output"].is_file() else None
    with pytest.raises(ValueError, match=message):
        generate_texts(**job)
    assert (job["output"].read_bytes() if job["output"].is_file() else None) == before


def test_two_processes_cannot_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    with Journal(tmp_path / "a.jsonl", {"kind": "x"}) as journal:
        journal.append([{"line": 1}])
        with pytest.raises(ValueError, match="being written by another process"):
            Journal(tmp_path / "a.jsonl", {"kind": "x"})
    with Journal(tmp_path / "a.jsonl", {"kind": "x"}) as journal:
        assert journal.records == [{"line": 1}]


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


def test_dtype_and_fingerprint(model_folder):
    model, _ = load_model(model_folder, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(fingerprint(model_folder)) == 64
    assert fingerprint("someone/model") == "someone/model"
