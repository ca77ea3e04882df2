"""The model on the GPU: a training step on the Triton kernels in place of PyTorch's, and folding on loading."""

import pytest
import torch

from layalign import LayAlignForConditionalGeneration

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def step(model, batch, dtype):
    """-> loss and gradients of the trained part, of a training step under autocast (None: in fp32)."""
    model = model.to(DEVICE).train()
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        loss = model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
    names, parameters = zip(*model.trained_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("llm", ["llama", "mistral", "gemma2"])
def test_training_step(make_model, batch, llm, dtype):
    """Error against fp32 at most twice that of the torch backend, over each tensor, plus a rounding of its largest value."""
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    exact = step(make_model(llm, attention_backend="torch"), batch, None)
    plain = step(make_model(llm, attention_backend="torch"), batch, dtype)
    fused = step(make_model(llm, attention_backend="auto"), batch, dtype)
    for name, value in exact.items():
        errors = [(other[name].double() - value.double()).norm().item() for other in (fused, plain)]
        rounding = torch.finfo(dtype).eps * value.double().norm().item()
        assert errors[0] <= 2 * errors[1] + rounding, name


def test_folded_on_loading(make_model, make_encoder, make_llm, tmp_path):
    make_model().save_pretrained(tmp_path)
    with torch.device(DEVICE):
        bases = {"encoder": make_encoder().to(DEVICE), "llm": make_llm().to(DEVICE)}
        model = LayAlignForConditionalGeneration.from_pretrained(tmp_path, **bases)
    assert model.aligner._kept is not None
