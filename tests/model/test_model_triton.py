"""The model on the Triton attention, interpreted, against the torch backend."""

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    names, parameters = zip(*model.trained_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@pytest.fixture
def launches(monkeypatch):
    """Forward launches so far: equal results alone could come from the torch backend twice."""
    from layalign.kernels.adaptive_fusion_attention import triton_backend

    calls, forward = [], triton_backend.forward
    monkeypatch.setattr(triton_backend, "forward", lambda *arguments: calls.append(arguments) or forward(*arguments))
    return calls


@pytest.mark.parametrize("llm, gate", [("llama", "dynamic"), ("mistral", "scalar"), ("gemma2", "head")])
def test_training_step(make_model, batch, launches, llm, gate):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = loss_and_gradients(make_model(llm, gate=gate, attention_backend="torch"), batch)
    actual = loss_and_gradients(make_model(llm, gate=gate, attention_backend="triton"), batch)
    assert len(launches) == 2  # layers
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


def test_generation(make_model, batch, launches):
    ids = [
        make_model("llama", attention_backend=backend).generate(**batch, max_new_tokens=4, do_sample=False)
        for backend in ("torch", "triton")
    ]
    assert torch.equal(*ids)
    assert len(launches) == 2 * 4
