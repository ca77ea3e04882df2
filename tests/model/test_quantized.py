"""Quantised bases: their own projections make the cross states, the trained part trains on them, and the setting is saved."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from layalign import LayAlignForConditionalGeneration, quantization
from layalign.loading import load_llm
from layalign.projections import attention_modules
from layalign.quantization import checked_quantization, chosen_library

WAYS = [(library, bits) for library in ("bitsandbytes", "torchao") for bits in ("4bit", "8bit")]
GROUPS = {("torchao", "4bit"): {"group_size": 8}}  # of the tiny widths


def needs(library):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.fixture
def folders(make_encoder, make_llm, tmp_path):
    """family of the LLM -> folders of both bases."""

    def write(family="llama"):
        make_encoder().save_pretrained(tmp_path / "encoder")
        make_llm(family).save_pretrained(tmp_path / family)
        return {"encoder": tmp_path / "encoder", "llm": tmp_path / family}

    return write


def opened(model):
    """With gates away from 0 and a random trained part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            scale = 1.0 if "fusion_gate" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + 0.1)
    return model.eval()


def called(model, batch):
    """Keys and values (B, L, Hkv, T, D) by each layer's own modules, from streams made in plain torch."""
    out = model.encoder_states(batch["encoder_input_ids"], batch["encoder_attention_mask"].bool())
    states = torch.stack([out.hidden_states[index] for index in model.config.mixed_states]).to(model.llm.dtype)
    aligner = model.aligner
    mixed = torch.einsum("ge,ebtd->gbtd", aligner.mix.weight, states) + aligner.mix.bias[:, None, None, None]
    streams = torch.nn.functional.linear(mixed.relu(), aligner.project.weight, aligner.project.bias)
    found = []
    for layer, attention in attention_modules(model.llm).items():
        if hasattr(attention, "k_proj"):
            pair = attention.k_proj(streams[2 * layer]), attention.v_proj(streams[2 * layer + 1])
        else:
            width = attention.config.num_key_value_heads * attention.head_dim
            keys, values = attention.qkv_proj(streams[2 * layer]), attention.qkv_proj(streams[2 * layer + 1])
            pair = keys[..., -2 * width : -width], values[..., -width:]
        found.append([part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in pair])
    return [torch.stack(part, 1) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("library", "bits"), WAYS)
def test_cross_states_go_through_the_quantised_projections(library, bits, family, folders, batch):
    needs(library)
    whole = batch | {"encoder_attention_mask": torch.ones_like(batch["encoder_attention_mask"])}
    settings = {"llm": {"bits": bits, "library": library, **GROUPS.get((library, bits), {})}}
    model = opened(LayAlignForConditionalGeneration.from_bases(**folders(family), quantization=settings))
    with torch.no_grad():
        found = model.encode(whole["encoder_input_ids"], whole["encoder_attention_mask"])[2:4]
        for part, expected in zip(found, called(model, whole), strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
        assert model.fold() is model and model.aligner._kept is None
        plain = opened(LayAlignForConditionalGeneration.from_bases(**folders(family)))
        exact, rounded = plain(**batch).logits, model(**batch).logits
    # A random LLM of width 32 tells that weights are rounded and not others; 4 bits of random numbers are coarse.
    assert torch.nn.functional.cosine_similarity(exact, rounded, -1).mean() > (0.99 if bits == "8bit" else 0.9)
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize(("library", "bits"), WAYS)
def test_the_trained_part_trains_is_saved_and_answers_the_same(library, bits, folders, batch, tmp_path):
    needs(library)
    settings = {"bits": bits, "library": library, **GROUPS.get((library, bits), {})}
    model = opened(LayAlignForConditionalGeneration.from_bases(**folders(), quantization=settings)).train()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    for name, parameter in model.trained_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    trained = {name for name, _ in model.trained_parameters()}
    assert not any(own.requires_grad for name, own in model.named_parameters() if name not in trained)
    model.eval().save_pretrained(tmp_path / "model")
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.quantization == {"encoder": settings, "llm": settings}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    answers = [one.generate(**batch, max_new_tokens=4, do_sample=False) for one in (model, loaded)]
    assert torch.equal(*answers)
    other = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model", quantization="none")
    assert other.config.quantization is None
    assert type(attention_modules(other.llm)[0].k_proj.weight) is nn.Parameter
    assert type(attention_modules(other.llm)[0].k_proj) is nn.Linear


def test_a_quantised_module_is_used_as_it_is(folders, batch):
    needs("bitsandbytes")
    places = folders()
    llm = load_llm(places["llm"], quantization={"bits": "4bit", "library": "bitsandbytes"})
    module = opened(LayAlignForConditionalGeneration.from_bases(places["encoder"], copy.deepcopy(llm)))
    named = opened(LayAlignForConditionalGeneration.from_bases(**places, quantization={"llm": "4bit"}))
    assert module.config.quantization is None
    with torch.no_grad():
        assert torch.equal(module(**batch).logits, named(**batch).logits)
    with pytest.raises(ValueError, match="the LLM is quantised, which is only ever frozen"):
        LayAlignForConditionalGeneration.from_bases(places["encoder"], llm, train_llm=True)


def test_an_evaluation_changes_no_layer(folders, batch, monkeypatch):
    """As on CPUs for which bitsandbytes has a kernel of its own: without a gradient, in bf16, of no such widths."""
    needs("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    places = folders()
    module = load_llm(places["llm"], quantization={"bits": "4bit", "library": "bitsandbytes"})
    switches = [layer.support_avx512bf16_for_cpu for layer in module.modules() if hasattr(layer, "quant_state")]
    assert switches and not any(switches)
    settings = {"bits": "4bit", "library": "bitsandbytes"}
    model = opened(LayAlignForConditionalGeneration.from_bases(**places, quantization=settings))
    with torch.no_grad():
        model(**batch)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()(**batch, labels=labels).loss.backward()
    for name, parameter in model.trained_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


class Switched(nn.Linear):
    support_avx512bf16_for_cpu = True


def test_modules_of_ones_own_are_kept_from_that_kernel_too(make_model):
    llm = make_model().llm
    layer = attention_modules(llm)[0]
    layer.o_proj = Switched(32, 32)
    assert load_llm(llm) is llm and layer.o_proj.support_avx512bf16_for_cpu is False


class Packed(nn.Module):
    """As AWQ and GPTQ keep a layer: no weight, packed integers, scales."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().int())
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight * self.scales, self.bias)


@torch.no_grad()
def test_layers_of_packed_integers_are_called(make_model, batch):
    model = make_model()
    for attention in attention_modules(model.llm).values():
        attention.k_proj, attention.v_proj = Packed(attention.k_proj), Packed(attention.v_proj)
    whole = batch | {"encoder_attention_mask": torch.ones_like(batch["encoder_attention_mask"])}
    found = model.encode(whole["encoder_input_ids"], whole["encoder_attention_mask"])[2:4]
    for part, expected in zip(found, called(model, whole), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch says that these layers will move to torchao
@torch.no_grad()
def test_torchs_own_int8_layers_are_called(make_encoder, make_llm, batch):
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None:
        pytest.skip("this torch has no int8 layers of its own")
    llm = quantize(make_llm(), {nn.Linear}, dtype=torch.qint8)
    model = opened(LayAlignForConditionalGeneration.from_bases(make_encoder(), llm))
    whole = batch | {"encoder_attention_mask": torch.ones_like(batch["encoder_attention_mask"])}
    found = model.encode(whole["encoder_input_ids"], whole["encoder_attention_mask"])[2:4]
    for part, expected in zip(found, called(model, whole), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
    exact = opened(LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm()))
    rounded, exact = model(**batch).logits, exact(**batch).logits
    assert torch.nn.functional.cosine_similarity(exact, rounded, -1).mean() > 0.99 and not torch.equal(exact, rounded)


def test_what_is_quantised_already_is_refused(folders, tmp_path):
    needs("bitsandbytes")
    places = folders()
    load_llm(places["llm"], quantization={"bits": "4bit", "library": "bitsandbytes"}).save_pretrained(tmp_path / "q")
    joined = LayAlignForConditionalGeneration.from_bases(places["encoder"], tmp_path / "q")
    assert joined.llm.is_quantized
    with pytest.raises(ValueError, match=r"llm .*is quantised already \(bitsandbytes\); leave it out for the llm"):
        LayAlignForConditionalGeneration.from_bases(places["encoder"], tmp_path / "q", quantization="8bit")


def test_a_group_that_does_not_fit_is_named(folders):
    needs("torchao")
    with pytest.raises(ValueError, match=r"quantization: encoder .* cannot be quantised so .*group_size must divide"):
        LayAlignForConditionalGeneration.from_bases(**folders(), quantization={"bits": "4bit", "library": "torchao"})


def test_a_module_is_not_quantised(make_encoder, make_llm):
    for base in ("encoder", "llm"):
        with pytest.raises(ValueError, match=f"quantization: the {base} is a module"):
            LayAlignForConditionalGeneration.from_bases(
                make_encoder(), make_llm(), quantization={base: {"bits": "8bit", "library": found()}}
            )


def found():
    library = next((one for one in ("bitsandbytes", "torchao") if find_spec(one)), None)
    return library or pytest.skip("neither bitsandbytes nor torchao is installed")


def test_a_missing_library_is_named(monkeypatch):
    present = {"torchao"}
    monkeypatch.setattr(quantization, "find_spec", lambda name: name if name in present else None)
    assert chosen_library({"bits": "4bit"}) == "torchao"
    with pytest.raises(ValueError, match=r'4bit needs bitsandbytes, which is not installed: pip install "layalign\['):
        chosen_library({"bits": "4bit", "type": "nf4"})
    present.clear()
    with pytest.raises(ValueError, match="8bit needs bitsandbytes or torchao, which is not installed"):
        LayAlignForConditionalGeneration.from_bases("layalign:tiny_encoder", "layalign:tiny_llm", quantization="8bit")


def test_settings_have_one_form():
    assert checked_quantization("none") is checked_quantization(None) is checked_quantization({"llm": "none"}) is None
    both = checked_quantization("4bit")
    assert both == {"encoder": {"bits": "4bit"}, "llm": {"bits": "4bit"}} == checked_quantization(both)
    mixed = checked_quantization({"llm": {"bits": "4bit", "type": "fp4", "double": True}, "encoder": "8bit"})
    assert mixed["encoder"] == {"bits": "8bit"} and mixed["llm"]["double"] is True
    assert checked_quantization({"llm": "8bit"}) == {"llm": {"bits": "8bit"}}
