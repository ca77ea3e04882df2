"""Folded weights at inference: used whenever nothing is trained, made once, and never those of other weights."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from layalign import LayAlignForConditionalGeneration, modules
from layalign.projections import attention_modules

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "gpt2", "gpt_neox"]


@pytest.fixture
def calls(monkeypatch):
    """("fold", dtype) for every fold, ("folded", None) and ("unfolded", None) for calls of the aligner with such weights."""
    calls = []
    fold, cross = modules.fold_key_values, modules.cross_key_values

    def counting_fold(weight, *arguments, **options):
        calls.append(("fold", weight.dtype))
        return fold(weight, *arguments, **options)

    def counting_cross(*arguments, **options):
        calls.append(("unfolded" if arguments[3] is not None else "folded", None))
        return cross(*arguments, **options)

    monkeypatch.setattr(modules, "fold_key_values", counting_fold)
    monkeypatch.setattr(modules, "cross_key_values", counting_cross)
    return calls


def kinds(calls):
    names = [kind for kind, _ in calls]
    calls.clear()
    return names


@torch.no_grad()
def cross(model, batch):
    return model.encode(batch["encoder_input_ids"], batch["encoder_attention_mask"])[2:4]


def assert_current(model, batch):
    """Its cross states are those of its weights as they are now."""
    folded = cross(model, batch)
    model.config.fold_at_inference = False
    for part, expected in zip(folded, cross(model, batch), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
    model.config.fold_at_inference = True


def test_adapters_merged_by_peft(make_model, batch):
    """By `.data`, which leaves no trace in what was folded before."""
    peft = pytest.importorskip("peft")
    model = make_model()
    cross(model, batch)
    targets = r"llm\..*\.(k_proj|v_proj)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    merged = adapted.eval().merge_and_unload()
    assert_current(merged, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_once(family, make_model, batch, alone, calls):
    """Whatever the number of tokens; one token alone would not be worth a fold."""
    model = make_model(family)
    with torch.no_grad():
        logits = model(**batch).logits
        model(**alone(batch, 0))
        model.generate(**alone(batch, 1), max_new_tokens=2, do_sample=False)
        assert kinds(calls) == ["fold", "folded", "folded", "folded"]
        model.config.fold_at_inference = False
        torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-5)
        assert kinds(calls) == ["unfolded"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
def test_an_optimizers_step_is_seen(optimizer, fused, make_model, batch):
    """Fused steps raise no version. Not in training mode, which gives folded weights up by itself."""
    model = make_model()
    cross(model, batch)
    assert model.aligner._kept is not None
    steps = getattr(torch.optim, optimizer)([own for _, own in model.trained_parameters()], lr=0.5, fused=fused)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    cross(model, batch)
    steps.step()
    assert_current(model, batch)


def weight_in_place(model):
    model.aligner.project.weight.add_(0.1)


def bias_in_place(model):
    model.aligner.project.bias.mul_(2)


def llm_weight_in_place(model):
    attention_modules(model.llm)[1].k_proj.weight.neg_()


def llm_bias_in_place(model):
    attention_modules(model.llm)[0].v_proj.bias.add_(1)


def optimizer_step(model):
    weight = model.aligner.project.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()


def loaded(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def other_parameter(model):
    model.aligner.project.weight = nn.Parameter(model.aligner.project.weight * 2)


def other_module(model):
    attention = attention_modules(model.llm)[1]
    attention.v_proj = nn.Linear(32, 16).requires_grad_(False)


def other_data(model):
    for parameter in (model.aligner.project.weight, attention_modules(model.llm)[0].k_proj.weight):
        parameter.data = parameter.data * 2


def other_strides(model):
    """The same memory read in another order."""
    weight = attention_modules(model.llm)[0].k_proj.weight
    weight.data = weight.data.view(32, 16).T


CHANGES = [
    weight_in_place,
    bias_in_place,
    llm_weight_in_place,
    llm_bias_in_place,
    optimizer_step,
    loaded,
    assigned,
    other_parameter,
    other_module,
    other_data,
    other_strides,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(change, make_model, batch, calls):
    model = make_model()
    before = cross(model, batch)
    calls.clear()
    with torch.no_grad():
        change(model)
    after = cross(model, batch)
    assert kinds(calls) == ["fold", "folded"]
    assert max((new - old).abs().max() for new, old in zip(after, before, strict=True)) > 1e-3
    assert_current(model, batch)


@torch.no_grad()
def test_an_address_used_again(make_model, batch):
    """Weights whose memory was another's when it was folded: address and version say nothing new."""
    model = make_model()
    weight = model.aligner.project.weight
    for _ in range(8):
        cross(model, batch)
        values = weight.data.clone().numpy() * 1.25
        weight.data = torch.zeros(1)
        weight.data = torch.from_numpy(values).clone()
        assert_current(model, batch)


def test_unchanged_weights(make_model, batch, calls):
    """Nothing of this makes a fold anew: the mix and the gates are not in it."""
    model = make_model()
    cross(model, batch)
    with torch.no_grad():
        model.aligner.mix.weight.add_(1)
        model.adapter.boundary.add_(1)
    model.eval().requires_grad_(False).requires_grad_(True)
    model.zero_grad()
    model.state_dict()
    cross(model, batch)
    assert kinds(calls) == ["fold", "folded", "folded"]


def test_one_dtype_at_a_time(make_model, batch, calls):
    model = make_model()
    for enabled in (False, True, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            keys, _ = cross(model, batch)
        assert keys.dtype == (torch.bfloat16 if enabled else torch.float32)
    model.to(torch.bfloat16)
    assert cross(model, batch)[0].dtype == torch.bfloat16
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    assert [dtype for kind, dtype in calls if kind == "fold"] == dtypes


@pytest.mark.parametrize("drop", ["train", "move"])
def test_memory_is_given_back(drop, make_model, batch):
    model = make_model()
    cross(model, batch)
    kept = weakref.ref(model.aligner._kept.weights[0])
    if drop == "train":
        model.train()
    else:
        model.to("meta")
    gc.collect()
    assert kept() is None


def test_training_never_folds(make_model, batch, calls):
    """Neither a training step, nor a step in evaluation mode with gradients, nor a call without gradients in training mode."""
    batch["labels"] = batch["input_ids"]
    model = make_model()
    gradients = []
    for training in (True, False):
        model.train(training)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append(model.aligner.project.weight.grad.clone())
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)
    cross(model.train(), batch)
    assert kinds(calls) == ["unfolded"] * 3
    assert model.aligner._kept is None


def test_inference_mode_then_training(make_model, batch, calls):
    """The kept weights serve calls with gradients too: an aligner that is not trained beside gates that are."""
    batch["labels"] = batch["input_ids"]
    model = make_model()
    with torch.inference_mode():
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    model.aligner.requires_grad_(False)
    model(**batch).loss.backward()
    states = [torch.randn(1, 5, 24, requires_grad=True) for _ in range(3)]
    keys, _ = model.aligner(states, model._projections, torch.float32, fold=True)
    keys.sum().backward()
    assert all(state.grad is not None for state in states)
    assert kinds(calls) == ["fold", "folded", "folded", "folded"]
    model.aligner.requires_grad_(True)
    model.train()
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for _, parameter in model.trained_parameters())
    assert kinds(calls) == ["unfolded"]


def test_parameters_made_in_inference_mode(make_model, batch, calls):
    """Their changes leave no trace, so nothing is kept of them."""
    with torch.inference_mode():
        model = make_model()
        for factor in (1, 2):
            model.aligner.project.weight.mul_(factor)
            assert_current(model, batch)
    assert set(kinds(calls)) == {"unfolded"}


def test_not_saved_and_not_copied(make_model, make_encoder, make_llm, batch, calls, tmp_path):
    model = make_model()
    buffer = io.BytesIO()
    torch.save(model.aligner, buffer)
    names, size = list(model.state_dict()), buffer.tell()
    cross(model, batch)
    assert list(model.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(model.aligner, buffer)
    assert buffer.tell() == size
    assert model.aligner._kept is not None
    again = copy.deepcopy(model)
    assert again.aligner._kept is None
    with torch.no_grad():
        again.aligner.project.weight.add_(1)
        attention_modules(again.llm)[0].k_proj.weight.add_(1)
    assert_current(again, batch)
    calls.clear()
    cross(model, batch)
    assert kinds(calls) == ["folded"]
    model.save_pretrained(tmp_path)
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path, encoder=make_encoder(), llm=make_llm())
    assert loaded.aligner._kept is None, "on a CPU the first call folds"
    for part, expected in zip(cross(loaded, batch), cross(model, batch), strict=True):
        assert torch.equal(part, expected)


def test_fold(make_model, batch, calls):
    model = make_model()
    assert model.fold() is model
    assert kinds(calls) == ["fold"]
    assert all(not tensor.requires_grad for tensor in model.aligner._kept.weights)
    cross(model, batch)
    assert kinds(calls) == ["folded"]
    for other in (
        make_model().train(),
        make_model(fold_at_inference=False),
        make_model(aligner="mlp"),
        make_model(aligner=None),
    ):
        assert other.fold() is other
    assert kinds(calls) == []


def test_folded_on_loading_where_the_weights_are_not_on_a_cpu(make_model, monkeypatch):
    """No accelerator here: devices as `parameters` tells them."""

    class Elsewhere:
        def __init__(self, device):
            self.device = torch.device(device)

    for devices, folds in ((["cuda:0"], True), (["cuda:0", "cpu"], False), (["meta"], False)):
        model = make_model()
        monkeypatch.setattr(model, "parameters", lambda devices=devices: map(Elsewhere, devices))
        assert model._folded_on_accelerator() is model
        assert (model.aligner._kept is not None) == folds


def test_under_compile(make_model, batch):
    """The aligner compiles in one graph and follows its weights, although it was folded before."""
    model = make_model()
    cross(model, batch)
    states = [torch.randn(1, 5, 24) for _ in range(3)]

    def run(states):
        return model.aligner(states, model._projections, torch.float32, fold=True)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            for part, expected in zip(compiled(states), run(states), strict=True):
                torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
            model.aligner.project.weight.mul_(2)
