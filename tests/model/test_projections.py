"""Key and value projections follow what becomes of the LLM's attention modules after the model is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layalign import modules
from layalign.projections import KeyValueProjection, attention_modules

# What holds keys and values, by family.
NAMES = {
    "llama": ["k_proj", "v_proj"],
    "qwen3": ["k_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
}


class Adapted(nn.Module):
    """A low-rank adapter around a projection, as LoRA puts it there."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        shape = base.weight.shape if isinstance(base, nn.Linear) else base.weight.T.shape
        generator = torch.Generator().manual_seed(5)
        self.down = nn.Parameter(torch.randn(2, shape[1], generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(shape[0], 2, generator=generator) * 0.3)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T

    @torch.no_grad()
    def merged(self):
        change = self.up @ self.down
        self.base.weight.add_(change.T if isinstance(self.base, Conv1D) else change)
        return self.base


def encoder_inputs(batch):
    return batch["encoder_input_ids"], batch["encoder_attention_mask"]


def cross(model, batch):
    """Cross keys and values."""
    return model.encode(*encoder_inputs(batch))[2:4]


def adapt(model, family, names=None, layer=1):
    """Adapters on the projections of one layer."""
    attention = attention_modules(model.llm)[layer]
    for name in names or NAMES[family]:
        setattr(attention, name, Adapted(getattr(attention, name)))
    return attention


@pytest.mark.parametrize("aligner", ["linear", "mlp"])
@pytest.mark.parametrize("family", NAMES)
def test_adapters_put_on_later(family, aligner, make_model, batch):
    """On one of two layers: its cross states go through the adapter and train it, the other layer's stay."""
    model = make_model(family, aligner=aligner)
    before = [part.detach() for part in cross(model, batch)]
    attention = adapt(model, family)
    adapted = cross(model, batch)
    torch.stack([part.square().sum() for part in adapted]).sum().backward()
    for name in NAMES[family]:
        adapter = getattr(attention, name)
        assert adapter.down.grad.abs().sum() > 0 and adapter.up.grad.abs().sum() > 0
        assert adapter.base.weight.grad is None
        setattr(attention, name, adapter.merged())
    for part, plain, merged in zip(adapted, before, cross(model, batch), strict=True):
        torch.testing.assert_close(part, merged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part[:, 0], plain[:, 0], atol=1e-5, rtol=1e-5)
        assert (part[:, 1] - plain[:, 1]).abs().max() > 0.1


def test_an_adapter_on_the_values_alone(make_model, batch):
    """What LoRA adapts by default; keys stay as they were."""
    model = make_model()
    keys, values = cross(model, batch)
    adapt(model, "llama", ["v_proj"])
    adapted_keys, adapted_values = cross(model, batch)
    torch.testing.assert_close(adapted_keys, keys, atol=1e-5, rtol=1e-5)
    assert (adapted_values - values).abs().max() > 0.1


def test_an_adapter_before_the_join(make_llm, make_encoder, batch):
    from layalign import LayAlignForConditionalGeneration

    for family in ("llama", "phi3"):
        llm = make_llm(family)
        for attention in attention_modules(llm).values():
            for name in NAMES[family]:
                setattr(attention, name, Adapted(getattr(attention, name)))
        model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)
        expected = cross(model, batch)
        for attention in attention_modules(llm).values():
            for name in NAMES[family]:
                setattr(attention, name, getattr(attention, name).merged())
        for part, other in zip(cross(model, batch), expected, strict=True):
            torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    """A linear layer whose weight is not all there is to it, as 4-bit layers are."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["replaced", "subclass", "forward hook", "forward pre-hook", "own forward"])
@torch.no_grad()
def test_other_modules(change, make_model, batch):
    """Each change doubles layer 1's keys and nothing else."""
    model = make_model()
    keys, values = cross(model, batch)
    projection = attention_modules(model.llm)[1].k_proj
    if change in ("replaced", "subclass"):
        other = (nn.Linear if change == "replaced" else Doubled)(32, 16)
        factor = 2 if change == "replaced" else 1
        other.load_state_dict({name: factor * value for name, value in projection.state_dict().items()})
        attention_modules(model.llm)[1].k_proj = other
    elif change == "forward hook":
        projection.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "forward pre-hook":
        projection.bias.zero_()
        keys, _ = cross(model, batch)
        projection.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    else:
        plain = projection.forward
        projection.forward = lambda x: 2 * plain(x)
    new_keys, new_values = cross(model, batch)
    torch.testing.assert_close(new_keys[:, 1], 2 * keys[:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_keys[:, 0], keys[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_values, values, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)
def test_fsdp2(make_model, make_encoder, make_llm, batch, tmp_path):
    """Loss and gradients of a model sharded by fully_shard, layers alone and with their projections, in a process of its own."""
    model = make_model("qwen3").train()
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_llm("qwen3").save_pretrained(tmp_path / "llm")
    model.save_pretrained(tmp_path / "model")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.save((batch, NAMES["qwen3"]), tmp_path / "given.pt")
    attention_modules(model.llm)[0].requires_grad_(True)
    loss = model(**batch).loss
    loss.backward()
    with torch.no_grad():
        answers = model.eval()(**batch).loss
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {name for name, _ in model.trained_parameters()}
    script = Path(__file__).with_name("fsdp2_step.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for number, (sharded_loss, sharded_answers, gradients) in enumerate(torch.load(tmp_path / "results.pt")):
        torch.testing.assert_close(sharded_loss, loss.detach())
        torch.testing.assert_close(sharded_answers, answers)
        assert gradients.keys() == (trained if number < 2 else expected.keys())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("wrapped", [0, 1])
def test_one_wrapped_layer_leaves_the_others_folded(wrapped, make_model, batch, monkeypatch):
    """Only the wrapped layer's streams are made, and what comes out and trains is as where every projection is called."""
    mixed, mix = [], modules.layer_mix

    def watched(states, weight, *rest, **more):
        mixed.append(len(weight))
        return mix(states, weight, *rest, **more)

    monkeypatch.setattr(modules, "layer_mix", watched)
    model = make_model()
    adapt(model, "llama", ["v_proj"], layer=wrapped)
    trained = [own for name, own in model.trained_parameters() if "aligner" in name]

    def made():
        with torch.no_grad():
            answered = cross(model, batch)
        both = cross(model, batch)
        return answered, both, torch.autograd.grad(sum(part.square().sum() for part in both), trained)

    answered, both, gradients = made()
    assert mixed == [2, 2]
    assert len(model.aligner._kept.sources) == 2 + 2 * 2  # projected, and both weights and biases of the other layer
    monkeypatch.setattr(KeyValueProjection, "is_plain", property(lambda self: False))
    called, again, expected = made()
    assert mixed == [2, 2, 4, 4] and model.aligner._kept is None
    for found, right in zip((*answered, *both, *gradients), (*called, *again, *expected), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_folds_follow_which_layers_are_wrapped(make_model, batch):
    """A layer that is wrapped, changed and unwrapped is folded anew."""
    model = make_model()
    cross(model, batch)
    for layer in (0, 1):
        attention = adapt(model, "llama", ["k_proj"], layer=layer)
        adapted = cross(model, batch)
        attention.k_proj = attention.k_proj.merged()
        for part, merged in zip(adapted, cross(model, batch), strict=True):
            torch.testing.assert_close(part, merged, atol=1e-5, rtol=1e-5)
