"""One evaluation by several processes: the same files as one writes, whatever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MGSM files of three languages, 150 questions in all."""
    folder = tmp_path_factory.mktemp("data")
    for lang in ("sw", "th", "te"):
        lines = [f"ni ngapi {'na ' * (number % 5)}{number % 40} tufaha\t{number}" for number in range(QUESTIONS // 3)]
        (folder / f"mgsm_{lang}.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def started(processes, model, data, output, tokens=12):
    """`layalign evaluate` in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = {"--data": data, "--output": output, "--batch-size": 4, "--max-new-tokens": tokens, "--device": "cpu"}
    command = [
        sys.executable,
        *(launcher if processes > 1 else ()),
        *("-m", "layalign", "evaluate", model, "--task", "mgsm"),
        *(word for option in options.items() for word in option),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments, **options):
    process = started(*arguments, **options)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    return printed


def killed_after(lines, *arguments):
    """Start it, and kill all its processes when so many records are written, some by each."""
    process, output = started(*arguments), arguments[-1]
    try:
        while process.poll() is None:
            written = [path.read_bytes().count(b"\n") for path in output.glob("records*.jsonl")]
            if len(written) == arguments[0] and min(written) > 0 and sum(written) >= lines:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    finally:
        printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed[-3000:]
    return sum(written)


@pytest.fixture(scope="module")
def whole(model_folder, data, tmp_path_factory):
    """What one uninterrupted process writes."""
    output = tmp_path_factory.mktemp("whole") / "results"
    run(1, model_folder, data, output)
    return output


def assert_same(output, whole):
    assert (output / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert (output / "table.md").read_text() == (whole / "table.md").read_text()
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (output, whole))
    assert ours["tasks"] == theirs["tasks"]


@pytest.mark.slow
def test_two_processes_write_what_one_does(model_folder, data, whole, tmp_path):
    run(2, model_folder, data, tmp_path / "results")
    assert_same(tmp_path / "results", whole)
    records = [json.loads(line) for line in (whole / "records.jsonl").read_bytes().splitlines()]
    assert len({(record["lang"], record["index"]) for record in records}) == len(records) == QUESTIONS


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_a_killed_one_goes_on_with_another_number_of_processes(model_folder, data, whole, tmp_path, first, then):
    output = tmp_path / "results"
    assert killed_after(QUESTIONS // 4, first, model_folder, data, output) < QUESTIONS
    run(then, model_folder, data, output)
    assert_same(output, whole)


def test_an_environment_that_says_half_of_it_is_refused(monkeypatch):
    from layalign.evaluation.processes import Processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK or MASTER_ADDR is not set"):
        Processes.here()
