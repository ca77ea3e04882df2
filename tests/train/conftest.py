"""Tiny random bases with word-level tokenizers, and recipes over them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.tiny_models import save_bases, word_tokenizer

NUMBERS = ["sifuri", "moja", "mbili", "tatu", "nne", "tano", "sita", "saba", "nane", "tisa"]
ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = [*ENGLISH, "zero", "plus", "is", "translate", "answer", ":"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """A cache of the tests' own, for the processes they start as well."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYALIGN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny encoder and a tiny LLM with random weights."""
    return save_bases(
        tmp_path_factory.mktemp("bases"),
        word_tokenizer([*NUMBERS, *WORDS], end_after_text=True),
        word_tokenizer([*WORDS, *NUMBERS], end_after_text=False),
    )


@pytest.fixture
def program(forks):
    """(name of a program beside this file, its arguments) -> what it prints in the end, read as JSON."""

    def run(name, *arguments):
        done = forks.run([Path(__file__).with_name(name), *arguments])
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def together(program):
    """(recipe, jobs) -> what each job has come to, see together.py; a job is (processes, overrides, the rest)."""

    def run(recipe, *jobs):
        given = [{"processes": processes, "overrides": overrides, **rest} for processes, overrides, rest in jobs]
        return program("together.py", recipe, json.dumps(given))

    return run


@pytest.fixture
def records():
    """Ten records of unequal length that a tiny model can learn by heart."""
    english = ["zero", *ENGLISH]
    return [
        {
            "source": " ".join([NUMBERS[i], *NUMBERS[: i % 4]]),
            "target": f"{english[i]} plus {english[-i]}",
            "lang": "sw",
        }
        for i in range(10)
    ]


@pytest.fixture
def settings(bases, records, tmp_path):
    """Mapping of a recipe with both stages, in memory."""
    stage = {"data": {"records": records}, "steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_steps": 1}
    return {
        **bases,
        "output": str(tmp_path / "run"),
        "progress": False,
        "device": "cpu",
        "stages": {"translation": dict(stage), "task": {**stage, "prompt": "answer : {source}"}},
    }


@pytest.fixture
def recipe_file(settings, tmp_path):
    """The same recipe as a YAML file, with its records in a JSON lines file."""
    data = tmp_path / "data.jsonl"
    records = settings["stages"]["task"]["data"]["records"]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    for stage in settings["stages"].values():
        stage["data"] = {"format": "jsonl", "path": str(data)}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file
