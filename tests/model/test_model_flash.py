"""The model on `backend="flash"`, over the kernel tests' stand-in for flash-attn: padding goes there as spans."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import flash_backend


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """flash-attn 2 takes tensors of CPUs, and how often it was called."""
    path = Path(__file__).parents[1] / "kernels" / "flash_stand_in.py"
    spec = importlib.util.spec_from_file_location("flash_stand_in", path)
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    module = stand_in.modules(2)["flash_attn"]
    counts = []
    for name, function in list(vars(module).items()):
        if name.startswith("flash_attn"):

            def counted(*arguments, run=function, name=name, **options):
                counts.append(name)
                return run(*arguments, **options)

            setattr(module, name, counted)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash_backend, "DEVICES", ("cuda", "cpu"))
    flash_backend._installed.cache_clear()
    yield counts
    flash_backend._installed.cache_clear()


def loss_and_gradients(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    names, parameters = zip(*model.trained_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@pytest.mark.parametrize("llm", ["llama", "mistral", "gemma2"])
def test_training_step(make_model, batch, calls, llm):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = loss_and_gradients(make_model(llm, attention_backend="torch"), batch)
    assert not calls
    actual = loss_and_gradients(make_model(llm, attention_backend="flash"), batch)
    assert calls == ["flash_attn_varlen_func"] * 4  # two layers
    for name, value in plain.items():
        assert (actual[name] - value).norm() <= 0.05 * value.norm(), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("llm", ["llama", "mistral"])
def test_generation(lively, batch, calls, llm, options):
    models = [lively(llm, attention_backend=backend).half() for backend in ("torch", "flash")]
    ids = [model.generate(**batch, max_new_tokens=4, do_sample=False, **options) for model in models]
    assert torch.equal(*ids)
    assert len(calls) == 2 * 2 * 4


def test_a_static_cache_is_refused(lively, batch):
    """Its place in the cache is a tensor, so that a step can be captured; flash-attn aligns to a number of keys."""
    model = lively("llama", attention_backend="flash").half()
    with pytest.raises(ValueError, match=r"^query_start: got a tensor, takes an int or None"):
        model.generate(**batch, max_new_tokens=2, do_sample=False, cache_implementation="static")
