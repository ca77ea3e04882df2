import logging
import shutil

import pytest

from layalign.folders import damage
from layalign.train.checkpoints import newest_valid, prune, sealed_folder


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 200):
        with sealed_folder(tmp_path / f"checkpoint-{step}") as partial:
            (partial / "weights").write_bytes(b"w" * step)
            (partial / "sub").mkdir()
            (partial / "sub" / "state").write_text(str(step))
    return tmp_path


def cut(checkpoint):
    (checkpoint / "weights").write_bytes(b"w" * 199)


def flip(checkpoint):
    (checkpoint / "weights").write_bytes(b"v" + b"w" * 199)


def lose(checkpoint):
    (checkpoint / "sub" / "state").unlink()


def lose_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def break_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text('{"files": [')


def empty_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text("[]")


DAMAGES = [
    (cut, "weights has 199 bytes instead of 200"),
    (flip, "weights is damaged"),
    (lose, "sub/state is missing"),
    (lose_manifest, "it was not written to the end"),
    (break_manifest, "manifest.json is unreadable"),
    (empty_manifest, "manifest.json is unreadable"),
]


@pytest.mark.parametrize(("harm", "reason"), DAMAGES, ids=[harm.__name__ for harm, _ in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_and_kept(folder, caplog, harm, reason):
    assert newest_valid(folder).name == "checkpoint-200"
    harm(folder / "checkpoint-200")
    with caplog.at_level(logging.WARNING):
        assert newest_valid(folder).name == "checkpoint-10"
    assert reason in caplog.text
    assert (folder / "checkpoint-200").is_dir()


def test_nothing_valid(folder, tmp_path):
    assert newest_valid(tmp_path / "absent") is None
    for step in (5, 10, 200):
        lose_manifest(folder / f"checkpoint-{step}")
    (folder / "checkpoint-x").mkdir()
    assert newest_valid(folder) is None


def test_an_interrupted_write_leaves_the_old_folder(folder):
    target = folder / "checkpoint-200"
    with pytest.raises(RuntimeError), sealed_folder(target) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert damage(target) is None
    with sealed_folder(target) as partial:
        assert not list(partial.iterdir())
        (partial / "weights").write_text("new")
    assert damage(target) is None
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_prune_keeps_the_newest(folder):
    prune(folder, 2, {folder / "checkpoint-200"})
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-200"]
    shutil.rmtree(folder / "checkpoint-200")
    prune(folder, 2, {folder / "checkpoint-10"})
    assert [path.name for path in folder.iterdir()] == ["checkpoint-10"]


def test_prune_does_not_count_damaged_ones(folder):
    """A run that went on from step 10, as 200 was damaged, has written 15: 10 and 15 are its way back."""
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-15")
    flip(folder / "checkpoint-200")
    prune(folder, 1, {folder / "checkpoint-15"})
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-15", "checkpoint-200"]
    assert newest_valid(folder).name == "checkpoint-15"
