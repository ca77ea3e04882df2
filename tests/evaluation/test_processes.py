"""One evaluation by several processes: the same files as one writes, whatever is killed on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

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


def command(model, data, output, tokens=12):
    """`layalign evaluate`, as arguments of `python`."""
    options = {"--data": data, "--output": output, "--batch-size": 4, "--max-new-tokens": tokens, "--device": "cpu"}
    words = [
        "-m",
        "layalign",
        "evaluate",
        model,
        "--task",
        "mgsm",
        *(word for pair in options.items() for word in pair),
    ]
    return list(map(str, words))


def started(forks, processes, *arguments):
    """So many processes of one evaluation, as torchrun starts them."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        counted = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(bound.getsockname()[1])}
    counted |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    ranks = [counted | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]
    return [
        forks.start(command(*arguments), stdout=PIPE, stderr=PIPE, env=rank if processes > 1 else {}) for rank in ranks
    ]


def run(forks, processes, *arguments):
    begun = started(forks, processes, *arguments)
    with ThreadPoolExecutor(processes) as beside:
        printed = list(beside.map(lambda fork: fork.communicate(), begun))
    assert not any(fork.returncode for fork in begun), printed


def killed_after(lines, forks, processes, model, data, output):
    """Start it, and kill all its processes when so many records are written, some by each."""
    begun, ends = started(forks, processes, model, data, output), time.monotonic() + 300
    while True:
        written = [path.read_bytes().count(b"\n") for path in output.glob("records*.jsonl")]
        if len(written) == processes and min(written) > 0 and sum(written) >= lines:
            break
        assert not (output / "results.json").exists(), "it ended before it could be killed"
        assert time.monotonic() < ends, "it died, or hangs"
        time.sleep(0.005)
    for fork in begun:
        fork.send_signal(signal.SIGKILL)
    for fork in begun:
        printed = fork.communicate()
        assert fork.returncode == -signal.SIGKILL, printed
    return sum(written)


@pytest.fixture(scope="module")
def whole(forks, model_folder, data, tmp_path_factory):
    """What one uninterrupted process writes."""
    output = tmp_path_factory.mktemp("whole") / "results"
    run(forks, 1, model_folder, data, output)
    return output


def assert_same(output, whole):
    assert (output / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    assert (output / "table.md").read_text() == (whole / "table.md").read_text()
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (output, whole))
    assert ours["tasks"] == theirs["tasks"]


@pytest.mark.slow
def test_two_processes_write_what_one_does(model_folder, data, whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = command(model_folder, data, tmp_path / "results")
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "results", whole)
    records = [json.loads(line) for line in (whole / "records.jsonl").read_bytes().splitlines()]
    assert len({(record["lang"], record["index"]) for record in records}) == len(records) == QUESTIONS


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_a_killed_one_goes_on_with_another_number_of_processes(forks, model_folder, data, whole, tmp_path, first, then):
    output = tmp_path / "results"
    assert killed_after(QUESTIONS // 4, forks, first, model_folder, data, output) < QUESTIONS
    run(forks, then, model_folder, data, output)
    assert_same(output, whole)


def test_an_environment_that_says_half_of_it_is_refused(monkeypatch):
    from layalign.evaluation.processes import Processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK or MASTER_ADDR is not set"):
        Processes.here()
