"""Files of `layalign generate` that survive interruptions and belong to one job."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from tqdm import tqdm

from layalign.generation.jobs import generate_texts
from layalign.generation.texts import Answerer
from layalign.journal import Journal


@pytest.fixture
def job(model_folder, questions, tmp_path):
    """Arguments of a file job that has 23 lines."""
    (tmp_path / "texts.txt").write_text("\n".join(questions), encoding="utf-8")
    return dict(
        model_path=model_folder,
        file=tmp_path / "texts.txt",
        output=tmp_path / "out" / "a.jsonl",
        batch_size=1,
        max_new_tokens=6,
        device="cpu",
    )


def test_a_job_cut_anywhere_goes_on_without_repeating_or_losing_a_line(job, loaded, monkeypatch):
    generate_texts(**job)
    output = job["output"]
    whole = output.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["line"] for record in records] == list(range(1, 24))
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    for length in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:length])
        assert generate_texts(**job | {"batch_size": 3}) == records
        assert output.read_bytes() == whole
    output.unlink()
    generate_texts(**job)
    assert output.read_bytes() == whole


def test_what_a_full_disk_did_not_take_is_not_in_the_file(tmp_path):
    """Nor written when it is closed, as what lies in a buffer would be; and the job goes on."""
    records = [{"line": place, "text": "a" * 1000} for place in range(6)]
    code = (
        "import resource, sys; from layalign.journal import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3500, resource.RLIM_INFINITY))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Journal(sys.argv[1], {}) as journal:\n"
        "    for first in (0, 2, 4): journal.append([{'line': first + i, 'text': 'a' * 1000} for i in range(2)])\n"
    )
    file = tmp_path / "a.jsonl"
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert "its 2 lines are as they were. Make room" in done.stderr.splitlines()[-1]
    with Journal(file, {}) as journal:
        assert journal.records == records[:2]
        journal.append(records[2:])
    assert [json.loads(line) for line in file.read_text().splitlines()] == records


def test_half_a_sum_is_not_the_beginning_of_the_next(tmp_path):
    file = tmp_path / "a.jsonl"
    for place in range(3):
        with Journal(file, {}) as journal:
            assert len(journal.records) == place
            journal.append([{"line": place}])
        with open(f"{file}.sums", "ab") as sums:
            sums.write(b"ab12")  # as a killed writer leaves it


def test_a_sampled_job_is_the_same_again_wherever_it_was_cut(job, loaded, monkeypatch):
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    job |= dict(do_sample=True, temperature=2.0, seed=5, batch_size=3)
    records = generate_texts(**job)
    assert generate_texts(**job | {"output": None}, write=lambda text: None) == records
    assert generate_texts(**job | {"output": job["output"].with_name("b.jsonl"), "seed": 6}) != records
    whole = job["output"].read_bytes()
    for lines in (1, 3, 7, 22):
        job["output"].write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
        assert generate_texts(**job) == records
        assert job["output"].read_bytes() == whole
    with pytest.raises(ValueError, match=r"belongs to another job \(different batch_size\)"):
        generate_texts(**job | {"batch_size": 4})


def test_a_finished_job_is_not_done_again(job, monkeypatch):
    records = generate_texts(**job)
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert generate_texts(**job) == records


def test_a_killed_process_is_continued(job):
    code = f"""
import time
from layalign.generation import jobs, texts
answer = texts.Answerer.__call__
texts.Answerer.__call__ = lambda self, texts, *told: (time.sleep(0.2), answer(self, texts, *told))[1]
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


def answer_until_killed(job, loaded, told):
    """In a child process: the job with a model already loaded and a disk so slow that a kill can fall between two parts of a line.
    Each call for answers and each part of a line that is written is told by a byte."""

    class SlowDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            for start in range(0, len(content), 40):
                time.sleep(0.002)
                self.file.write(content[start : start + 40])
                os.write(told, b".")
            return len(content)

    append, answer = Journal.append, Answerer.__call__

    def slow_append(journal, records):
        journal._file = SlowDisk(journal._file)
        append(journal, records)
        journal._file = journal._file.file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
        patch.setattr(Journal, "append", slow_append)
        patch.setattr(Answerer, "__call__", lambda self, *given: (os.write(told, b"."), answer(self, *given))[1])
        generate_texts(**job)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_lose_and_repeat_nothing(job, loaded, questions, monkeypatch, capfd):
    """200 lines; every run but the last ends by SIGKILL while it answers or writes, none is told beforehand."""
    texts = [f"{questions[index % len(questions)]} and {index % 40}" for index in range(200)]
    job["file"].write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    whole_job = job | {"output": job["output"].with_name("whole.jsonl"), "batch_size": 8}
    generate_texts(**whole_job)
    whole = whole_job["output"].read_bytes()
    moments = random.Random(5)
    lines = 0
    for _ in range(20):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                tqdm.set_lock(
                    threading.RLock()
                )  # the parent's is shared: killed while holding it, the child would keep it
                answer_until_killed(job, loaded, tell)
                status = 0
            finally:
                os._exit(status)
        os.close(tell)
        for _ in range(moments.randint(0, 20)):
            os.read(told, 1)
        time.sleep(moments.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(told)
        assert os.WIFSIGNALED(status), "the child ended before it was killed"
        kept = job["output"].read_bytes() if job["output"].exists() else b""
        assert whole.startswith(kept)
        assert kept.count(b"\n") >= lines, "a line that was on the disk is gone"
        lines = kept.count(b"\n")
    assert 0 < lines < 200
    records = generate_texts(**job)
    assert [(record["line"], record["text"]) for record in records] == list(enumerate(texts, 1))
    assert job["output"].read_bytes() == whole


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


def lost(lines):
    return [*lines[:1], *lines[2:]]


def doubled(lines):
    return [lines[0], *lines]


def swapped(lines):
    return [lines[1], lines[0], *lines[2:]]


def surplus(lines):
    return [*lines, lines[-1]]


def null(lines):
    return [b"null\n", *lines[1:]]


def byte_order_mark(lines):
    return [b"\xef\xbb\xbf" + lines[0], *lines[1:]]


def another_answer(lines):
    record = json.loads(lines[2])
    return [*lines[:2], json.dumps({**record, "answer": record["answer"] + "!"}).encode() + b"\n", *lines[3:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lost, ":2: not the answer to line 2 "),
        (doubled, ":2: not the answer to line 2 "),
        (swapped, ":1: not the answer to line 1 "),
        (surplus, ":24: one line too many, 23 were asked"),
        (null, ":1: not a JSON object"),
        (byte_order_mark, ":1: not JSON"),
        (another_answer, ":3: is not what was written there"),
    ],
)
def test_an_output_with_a_changed_line_is_refused_and_kept(job, loaded, monkeypatch, change, message):
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    generate_texts(**job)
    job["output"].write_bytes(b"".join(change(job["output"].read_bytes().splitlines(keepends=True))))
    before = job["output"].read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"a.jsonl{message}"):
            generate_texts(**job)
    assert job["output"].read_bytes() == before


def test_texts_with_nul_are_not_two_texts(job, loaded, monkeypatch):
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    job["file"].write_text("what is\x005")
    generate_texts(**job)
    job["file"].write_text("what is\n5")
    with pytest.raises(ValueError, match="different texts"):
        generate_texts(**job)


def test_a_job_without_sums_goes_on_and_gets_them(job, loaded, monkeypatch):
    """As one of an earlier version has none."""
    monkeypatch.setattr("layalign.generation.jobs.load_model", lambda *_, **__: loaded)
    records = generate_texts(**job)
    sums = job["output"].with_name("a.jsonl.sums")
    before = sums.read_bytes()
    sums.unlink()
    assert generate_texts(**job) == records
    assert sums.read_bytes() == before and before.count(b"\n") == 23


def test_two_processes_cannot_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    with Journal(tmp_path / "a.jsonl", {"kind": "x"}) as journal:
        journal.append([{"line": 1}])
        with pytest.raises(ValueError, match="being written by another process"):
            Journal(tmp_path / "a.jsonl", {"kind": "x"})
    with Journal(tmp_path / "a.jsonl", {"kind": "x"}) as journal:
        assert journal.records == [{"line": 1}]
