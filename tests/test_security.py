"""docs/security.md: files from elsewhere run no code and name no file outside their folder; each line of the page names its test."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"


class Hostile:
    """What a pickle may hold: a call, made where it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A folder that is there if foreign code ran."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def test_the_stand_in_is_hostile(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "x")))
    assert (tmp_path / "x").is_dir()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]"])
def test_a_recipe_with_code_is_refused(tmp_path, marker, tag):
    from layalign.train.recipe import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(f"output: {tag.format(marker)}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(file)


def test_a_checkpoint_with_code_is_refused(bases, tmp_path, marker):
    """Sealed anew, so that its hashes do not tell: optimizer and random states are read as tensors alone."""
    from layalign.train.checkpoints import newest_valid, seal
    from layalign.train.recipe import load_recipe
    from layalign.train.stages import train

    records = tmp_path / "data.jsonl"
    records.write_text("".join(json.dumps({"source": "what", "target": str(n), "lang": "en"}) + "\n" for n in range(8)))
    stage = {
        "data": {"format": "jsonl", "path": str(records)},
        "steps": 2,
        "batch_size": 4,
        "save_steps": 1,
        "prompt": "{source}",
    }
    settings = {"encoder": str(bases / "encoder"), "llm": str(bases / "llm"), "device": "cpu", "progress": False}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "run"), "stages": {"task": stage}}))
    train(load_recipe(file))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "task" / "final")
    checkpoint = newest_valid(tmp_path / "run" / "task")
    (checkpoint / "manifest.json").unlink()
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save(Hostile(marker), checkpoint / name)
    seal(checkpoint)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        train(load_recipe(file))


def test_a_manifest_names_no_file_outside_its_folder(tmp_path):
    from layalign.folders import damage
    from layalign.train.checkpoints import seal, sha256_of

    folder, outside = tmp_path / "checkpoint-1", tmp_path / "outside"
    folder.mkdir()
    (folder / "weights").write_text("w")
    outside.write_text("secret")
    seal(folder)
    assert damage(folder) is None
    named = {"../outside": {"size": 6, "sha256": sha256_of(outside)}}
    (folder / "manifest.json").write_text(json.dumps({"files": named}))
    assert "names a file outside" in damage(folder)


def test_every_line_of_the_page_names_a_test_that_there_is():
    table = PAGE.read_text(encoding="utf-8").partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 9
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_table_of_attacks_is_the_harness_s():
    from tests.attacks.conftest import KINDS
    from tests.attacks.damages import RULES

    text = PAGE.read_text(encoding="utf-8").partition("## Damage by rule")[2]
    numbers = {7: "seven", 12: "twelve"}
    assert f"{numbers[len(KINDS)]} kinds of folder" in text and f"{numbers[len(RULES)]} rules" in " ".join(text.split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    header, _, *kinds, total = rows
    assert header == ["folder", "tried", "identical", "refused"]
    assert [row[0].replace(" ", "_") for row in kinds] == list(KINDS)
    counts = [[int(cell.replace(",", "")) for cell in row[1:]] for row in (*kinds, total)]
    assert all(tried == alike + refused for tried, alike, refused in counts)
    assert counts[-1] == [sum(column) for column in zip(*counts[:-1], strict=True)] and counts[-1][0] >= 1000
