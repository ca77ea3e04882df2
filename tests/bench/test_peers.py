"""Every file of a peer is found, and stands in its suite beside the others."""

from types import SimpleNamespace

import pytest
import torch

import bench.peers.attention
from bench.measuring import Missing
from bench.peers import needs_cuda, peers_of

SUITES = {"attention": ("attention", "decode"), "aligner": ("layer_mix", "stream_linear", "cross_key_values")}
SUITES |= {"model": ("model",)}


@pytest.mark.parametrize(("folder", "suite"), [(folder, suite) for folder in SUITES for suite in SUITES[folder]])
def test_every_suite_has_the_published_way_or_a_yardstick(folder, suite):
    assert {"published", "published sdpa", "plain product"} & set(peers_of(folder, suite))


def test_a_new_file_is_a_new_peer(tmp_path, monkeypatch):
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "new_one.py").write_text('PEERS = {"decode": {"new one": lambda case: min}}\n')
    monkeypatch.setattr(bench.peers, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(bench.peers.attention, "__path__", [str(tmp_path / "attention")])
    assert peers_of("attention", "decode")["new one"](None) is min and not peers_of("attention", "attention")


def test_two_peers_of_one_name_are_refused(monkeypatch):
    from bench.peers.aligner import plain_product, published

    monkeypatch.setattr(plain_product, "PEERS", {"layer_mix": published.PEERS["layer_mix"]})
    with pytest.raises(ValueError, match=r"published.py: there is a published of layer_mix already"):
        peers_of("aligner", "layer_mix")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(distribution, module): one that is there and does not import."""

    def install(distribution, module):
        for name, text in {
            f"{module}/__init__.py": "raise ImportError('cuda.so: undefined symbol: _ZN3c10')",
            f"{module}-2.7.4.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.7.4\n",
        }.items():
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_a_package_that_does_not_import_is_missing(installed):
    """It costs its own row: those beside it are made by the same call."""
    from bench.peers.attention.flash_attention import flash_attn
    from bench.peers.model.liger import liger

    installed("flash-attn", "flash_attn")
    found = flash_attn("flash-attn", "flash_attn")
    assert found == Missing("flash-attn does not import: ImportError: cuda.so: undefined symbol: _ZN3c10")
    installed("liger-kernel", "liger_kernel")
    compared = SimpleNamespace(llm=SimpleNamespace(device=torch.device("cuda")))
    assert liger(compared).reason.startswith("liger-kernel does not import: ImportError: cuda.so: undefined symbol")


def test_without_a_gpu_its_peers_are_missing():
    class Case:
        device = "cpu"

    assert needs_cuda("flex", lambda case: max)(Case) == Missing("flex needs a CUDA device")
