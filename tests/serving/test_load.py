"""The load on servers: both do the same work. No server is started."""

import json
import subprocess
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest

from tests.serving.conftest import save_model

pytest.importorskip("httpx", reason="httpx is not installed (layalign[ui])")
from bench import serving

TEMPLATE = "Q: {text}\nA:"
QUESTIONS = [f"{number} + 1?" for number in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("loaded"), template=TEMPLATE)


def test_workload(folder):
    """The LLM alone is asked what LayAlign's LLM reads as text; no question comes twice."""
    found = serving.workload(folder, QUESTIONS)
    own, alone = found[serving.LAYALIGN], found[serving.BARE]
    assert {load: len(texts) for load, texts in own.items()} == serving.LOADS
    texts = [text for some in own.values() for text in some]
    assert texts == QUESTIONS[: len(texts)]
    assert alone == {load: [f"Q: {text}\nA:" for text in some] for load, some in own.items()}
    with pytest.raises(ValueError, match="got 167 different ones, takes at least 168"):
        serving.workload(folder, QUESTIONS[:167] * 2)


def test_a_measurement(folder, monkeypatch, tmp_path):
    """What servers and client are started with, and what is recorded of their work."""
    started, asked = [], []

    @contextmanager
    def running(title, command, log):
        started.append(command)
        yield "http://127.0.0.1:1"

    def client(command, **_):
        given = dict(pairwise(command))
        with open(given["--dataset-path"], encoding="utf-8") as file:
            texts = [json.loads(line)["prompt"] for line in file]
        asked.append((given["--model"], int(given["--max-concurrency"]), texts))
        figures = dict.fromkeys(serving.FIGURES, 8.0) | {"completed": len(texts), "total_input_tokens": 30 * len(texts)}
        figures.pop("mean_prompt_tokens")
        with open(given["--result-filename"], "w", encoding="utf-8") as file:
            json.dump(figures, file)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(serving, "running", running)
    monkeypatch.setattr(subprocess, "run", client)
    monkeypatch.setattr(serving, "_generate", lambda *_: dict.fromkeys(serving.BATCHES, 2.0))
    found = serving.measure(folder, QUESTIONS, rounds=1)
    assert len(started) == 2 and all("--no-enable-prefix-caching" in command for command in started)
    expected = serving.workload(folder, QUESTIONS)
    assert asked == [(name, load, texts) for name, loads in expected.items() for load, texts in loads.items()]
    for loads in found["servers"].values():
        assert [row["mean_prompt_tokens"] for row in loads.values()] == [30.0] * len(serving.LOADS)
    rows, _ = serving.table(found).split("\n\n| throughput")
    rows = [line for line in rows.splitlines() if line.startswith("|")]
    assert rows[0].endswith("| prompt tokens |") and "| 30.0 |" in rows[2]
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
