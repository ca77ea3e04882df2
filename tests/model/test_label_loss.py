"""The loss of label positions made in parts: exact, for every output layer, with little memory, and by Liger where it is."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layalign import label_loss
from layalign.label_loss import LabelLoss, OutputLayer
from tests.model.packed_rows import assert_same, packed, step


def plain(layer, hidden, targets):
    return F.cross_entropy(layer.logits(hidden).float(), targets, ignore_index=-100, reduction="sum")


def calls_of(module):
    """The rows of each call of its forward, from now on; within a call of the LLM's the layer is not called as a module."""
    calls, forward = [], module.forward

    def counting(hidden):
        calls.append(hidden.shape[:-1].numel())
        return forward(hidden)

    module.forward = counting
    return calls


@pytest.fixture
def parts():
    """(layer, hidden (50, 8), targets (50,)) of 30 tokens; some rows have no label."""

    def make(trained=False, scale=1.0, softcap=None, bias=True):
        torch.manual_seed(3)
        layer = OutputLayer(nn.Linear(8, 30, bias=bias).requires_grad_(trained), scale, softcap)
        targets = torch.randint(0, 30, (50,))
        targets[::7] = -100
        return layer, torch.randn(50, 8, requires_grad=True), targets

    return make


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (2.0, 3.0)])
@pytest.mark.parametrize("rows", [1, 7, 43, 1000])
def test_parts_make_the_whole_loss_and_its_gradients(parts, trained, scale, softcap, rows, monkeypatch):
    layer, hidden, targets = parts(trained, scale, softcap)
    wanted = [hidden, *layer.module.parameters()] if trained else [hidden]
    expected = torch.autograd.grad(3 * plain(layer, hidden, targets), wanted)
    monkeypatch.setattr(label_loss, "CPU_LOGITS", rows * 30)
    largest = calls_of(layer.module)
    loss = label_loss.label_loss(layer, hidden, targets)
    found = torch.autograd.grad(3 * loss, wanted)
    assert max(largest) <= rows and sum(largest) == 42 * (2 if trained and rows < 42 else 1)
    torch.testing.assert_close(loss, plain(layer, hidden, targets), rtol=1e-6, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_gradients_and_without_labels(parts, monkeypatch):
    monkeypatch.setattr(label_loss, "CPU_LOGITS", 5 * 30)
    layer, hidden, targets = parts()
    with torch.no_grad():
        torch.testing.assert_close(label_loss.label_loss(layer, hidden, targets), plain(layer, hidden, targets))
    loss = label_loss.label_loss(layer, hidden, torch.full_like(targets, -100))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss == 0 and gradient.abs().sum() == 0


def test_only_parts_of_the_logits_exist(parts, monkeypatch):
    """Among what is saved for the backward pass nothing is as large as a part's logits."""
    monkeypatch.setattr(label_loss, "CPU_LOGITS", 5 * 30)
    layer, hidden, targets = parts()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        loss = label_loss.label_loss(layer, hidden, targets)
    assert loss.grad_fn is not None
    inside = {5 * 30, 2 * 30}  # of the parts' own graphs, which are gone
    assert [size for size in kept if size > hidden.numel()] == [] and inside


@pytest.mark.parametrize("way", ["whole", "trained", "parts", "liger"])
def test_second_gradients_are_right_or_refused(way, parts, monkeypatch):
    """A penalty on the loss's gradient is never left out; torch.autograd.grad would not tell."""

    def penalised(loss_of, layer, hidden, targets):
        (gradient,) = torch.autograd.grad(loss_of(layer, hidden, targets), hidden, create_graph=True)
        return torch.autograd.grad(gradient.square().sum() + hidden.sum(), hidden)[0]

    given = parts(trained=way == "trained", softcap=3.0)
    expected = penalised(plain, *given)
    if way == "liger":
        monkeypatch.setattr(label_loss, "takes_liger", lambda layer, hidden: True)
        monkeypatch.setattr(label_loss, "_by_liger", lambda layer, hidden, targets: plain(layer, hidden, targets))
    elif way != "whole":
        monkeypatch.setattr(label_loss, "CPU_LOGITS", 5 * 30)
    if way in ("whole", "trained"):
        torch.testing.assert_close(penalised(label_loss.label_loss, *given), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"second gradients \(of _?LabelLoss\): .*skip_logits=False"):
            penalised(label_loss.label_loss, *given)


def head_calls(model):
    return calls_of(model.get_output_embeddings())


@pytest.mark.parametrize("llm", ["llama", "gemma2", "gemma3", "granite", "gpt2", "gpt_neox", "phi3"])
def test_the_output_layer_is_known(llm, make_model, uneven, monkeypatch):
    """Soft caps and scales included: after one comparison all labels are scored in parts."""
    monkeypatch.setattr(label_loss, "CPU_LOGITS", 4 * 60)
    model = make_model(llm).train()
    expected = model.eval()(**uneven).loss
    calls = head_calls(model)
    assert model.train()(**uneven).logits is None
    assert model._label_loss._exact is True
    torch.testing.assert_close(model(**packed(uneven)).loss, expected, rtol=1e-5, atol=0)
    labels = int((uneven["labels"] != -100).sum())
    assert max(calls) < labels and len(calls) > 2 * labels / 4


def test_cohere_scales_its_logits(make_encoder, uneven):
    import transformers

    from layalign import LayAlignForConditionalGeneration

    torch.manual_seed(4)
    config = transformers.CohereConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        logit_scale=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), transformers.CohereForCausalLM(config))
    expected = step(model.eval(), uneven)
    assert_same(step(model.train(), uneven), expected)
    assert_same(step(model, packed(uneven)), expected)
    assert model._label_loss._exact is True


def test_logits_of_another_making_are_left_to_the_llm(make_model, uneven):
    """What an LLM does to its logits and this library does not know: found out, and the loss is the LLM's own."""
    model = make_model()
    forward = model.llm.forward

    def odd(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * torch.linspace(0.5, 2, out.logits.shape[-1])
        return out

    model.llm.forward = odd
    expected = step(model.eval(), uneven)
    calls = head_calls(model)
    assert_same(step(model.train(), uneven), expected)
    assert model._label_loss._exact is False
    before = len(calls)
    assert_same(step(model, packed(uneven)), expected)
    assert len(calls) == before + 1 + 2  # and the two of the trial of packing


def test_logits_are_returned_where_asked_for(make_model, uneven):
    model = make_model().train()
    out = model(**uneven, skip_logits=False)
    assert out.logits.shape[:2] == out.labels.shape
    assert model(**uneven).logits is None
    assert model.eval()(**uneven, skip_logits=True).logits is None
    assert model(**uneven).logits is not None


def test_liger_is_given_what_its_kernel_takes(parts, monkeypatch):
    """With a stand-in for the package; on this machine the kernel itself does not run."""
    seen = []

    def stand_in(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                 reduction="mean", softcap=None, return_z_loss=False):  # fmt: skip
        seen.append((input.dtype, weight.dtype, reduction, softcap))
        logits = input @ weight.T + (0 if bias is None else bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction=reduction)

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = stand_in
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(label_loss, "takes_liger", lambda layer, hidden: True)
    for settings in ({}, {"scale": 2.0, "softcap": 3.0}, {"bias": False, "scale": 0.5}):
        layer, hidden, targets = parts(**settings)
        found = label_loss.label_loss(layer, hidden, targets)
        torch.testing.assert_close(found, plain(layer, hidden, targets), rtol=1e-5, atol=0)
    assert seen == [(torch.float32, torch.float32, "sum", None), (torch.float32, torch.float32, "sum", 3.0), *seen[:1]]


def test_liger_is_for_plain_layers_on_a_gpu(parts, monkeypatch):
    layer, hidden, _ = parts()
    monkeypatch.setattr(label_loss, "find_spec", lambda name: object())
    assert not label_loss.takes_liger(layer, hidden)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(label_loss, "autocast_dtype", lambda tensor: None)
    assert label_loss.takes_liger(layer, on_gpu)
    on_gpu.dtype = torch.bfloat16
    assert not label_loss.takes_liger(layer, on_gpu)
    on_gpu.dtype = torch.float32
    layer.module.register_forward_hook(lambda *args: None)
    assert not label_loss.takes_liger(layer, on_gpu)
    monkeypatch.setattr(label_loss, "find_spec", lambda name: None)
    assert not label_loss.takes_liger(parts()[0], on_gpu)


def test_an_llm_without_an_output_layer_of_its_own_makes_the_logits(make_model, uneven):
    """One whose layer is never called as a module."""
    model = make_model()
    expected = model(**uneven).loss
    model.llm.get_output_embeddings = lambda: nn.Linear(32, 60)
    model.llm.__dict__["get_output_embeddings"] = lambda: nn.Linear(32, 60)
    torch.testing.assert_close(model.train()(**uneven).loss, expected, rtol=1e-6, atol=0)
    assert model._label_loss._exact is False
    assert isinstance(model._label_loss, LabelLoss)
