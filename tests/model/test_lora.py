"""LoRA on the LLM: beside the trained part, saved with it, seen by the cross states on every path."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from layalign import LayAlignForConditionalGeneration
from layalign.lora import add_lora, checked_lora
from layalign.lora import merge_lora as merge

pytest.importorskip("peft")

FAMILIES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]


@pytest.fixture
def adapted(make_model):
    """family -> a model whose gates are open and whose LoRA changes something; make_model fills all that is trained."""

    def build(family="llama", **settings):
        return make_model(family, **{"lora": {"rank": 3, "alpha": 2}, **settings})

    return build


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def cross(model, batch):
    return model.encode(batch["encoder_input_ids"], batch["encoder_attention_mask"])[2:4]


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_it_changes_nothing_and_merged_it_answers_the_same(family, make_encoder, make_llm, adapted, batch):
    fresh = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm(family), lora={"rank": 3}).eval()
    plain = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm(family)).eval()
    plain.load_state_dict(fresh.trained_state_dict() | plain.llm.state_dict(prefix="llm."), strict=False)
    model = adapted(family)
    with torch.no_grad():
        # With gates at 0 as at the start of training; the bases' weights are the same.
        assert torch.equal(fresh(**batch).logits, plain(**batch).logits)
        before, keys_values = model(**batch).logits, cross(model, batch)
        assert model.fold().aligner._kept is None
        names = [name for name, _ in model.llm.named_modules() if "lora" not in name and "base_layer" not in name]
        assert model.merge_lora() is model and model.config.lora is None and model.config.train_llm
        assert [name for name, _ in model.llm.named_modules()] == names
        assert not hasattr(model.llm, "peft_config")
        for part, merged in zip(keys_values, cross(model, batch), strict=True):
            torch.testing.assert_close(part, merged, atol=2e-5, rtol=1e-4)
        assert model.aligner._kept is not None  # plain again, so it folds
        torch.testing.assert_close(model(**batch).logits, before, atol=5e-5, rtol=1e-4)
        assert (before - plain(**batch).logits).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_the_weights_it_stands_for(family, adapted, batch):
    """d loss / dB of an adapter against scale * (d loss / dW) A^T of the merged model, whose W autograd differentiates by the other
    path: cross states by the operators, from weights, where adapters are called."""
    model = adapted(family).train()
    loss(model, batch).backward()
    weights = {
        name: (module.lora_A["layalign"].weight.detach().clone(), module.lora_B["layalign"].weight.grad)
        for name, module in model.llm.named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(weights) == 2 * {"phi3": 2, "gpt2": 2, "gpt_neox": 2}.get(family, 4)
    assert all(own.grad is not None and own.grad.any() for _, own in model.trained_parameters())
    for name, own in model.named_parameters():
        assert own.requires_grad == (own.grad is not None), name
    model.zero_grad()
    model.merge_lora().train_only()
    loss(model, batch).backward()
    for name, (down, found) in weights.items():
        grad = model.llm.get_submodule(name).weight.grad
        grad = grad.T if family == "gpt2" else grad
        torch.testing.assert_close(found, 2 / 3 * grad @ down.T, atol=2e-5, rtol=2e-3)


def test_saved_and_loaded_with_the_trained_part(adapted, make_encoder, make_llm, batch, tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_llm().save_pretrained(tmp_path / "llm")
    model = LayAlignForConditionalGeneration.from_bases(
        tmp_path / "encoder", tmp_path / "llm", lora={"rank": 2, "targets": ["q_proj", "up_proj"], "dropout": 0.5}
    )
    model.load_state_dict({name: torch.randn_like(own) for name, own in model.trained_parameters()}, strict=False)
    model.eval().save_pretrained(tmp_path / "model")
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.lora == {"rank": 2, "alpha": 4, "dropout": 0.5, "targets": ["q_proj", "up_proj"]}
    assert not (tmp_path / "model" / "llm").exists()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    found = {name for name, _ in loaded.trained_parameters() if ".lora_" in name}
    assert len(found) == 2 * 2 * 2 and all("q_proj" in name or "up_proj" in name for name in found)
    half = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {own.dtype for own in half.parameters()} == {torch.bfloat16}
    merged = loaded.merge_lora()
    merged.save_pretrained(tmp_path / "merged")
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_weights_are_fp32_over_a_half_precision_llm(make_encoder, make_llm, batch):
    llm = make_llm().bfloat16()
    model = LayAlignForConditionalGeneration.from_bases(make_encoder().bfloat16(), llm, lora={"rank": 2}).train()
    assert {own.dtype for _, own in model.trained_parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, batch).backward()
    assert all(own.grad.dtype == torch.float32 for name, own in model.trained_parameters() if "lora_B" in name)


def test_dropout_is_in_lora_alone(make_encoder, make_llm):
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm("gpt2"), lora={"dropout": 0.1}).train()
    on = {name for name, module in model.llm.named_modules() if isinstance(module, nn.Dropout) and module.training}
    assert on and all(".lora_dropout." in name for name in on)
    assert any(isinstance(module, nn.Dropout) and not module.training for module in model.llm.modules())
    model.train_only(["adapter"]).train()
    assert not any(module.training for module in model.llm.modules() if isinstance(module, nn.Dropout))


@torch.no_grad()
def test_a_fold_is_given_up_when_adapters_come_and_go(make_model, batch):
    """PEFT merges through `.data`, which leaves no trace on the weight that the fold was made from."""
    model = make_model()
    plain = [part.clone() for part in cross(model, batch)]
    assert model.aligner._kept is not None
    add_lora(model.llm, checked_lora({"rank": 2}))
    for name, own in model.named_parameters():
        if ".lora_" in name:
            own.normal_(generator=torch.Generator().manual_seed(1))
    called = cross(model, batch)
    for module in list(model.llm.modules()):
        if hasattr(module, "lora_A"):
            module.merge()  # in place, as PEFT does by default
    merge(model.llm)
    for part, merged, before in zip(called, cross(model, batch), plain, strict=True):
        torch.testing.assert_close(part, merged, atol=1e-4, rtol=1e-4)
        assert (part - before).abs().max() > 0.1


def test_published_has_no_place_for_it(adapted, make_encoder, batch, tmp_path):
    model = adapted("llama", encoder_layers=[0, 1])
    with pytest.raises(ValueError, match=r"the published format has no place for LoRA: merge_lora\(\)"):
        model.save_published(tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        expected = model(**batch).logits
        model.merge_lora().save_published(tmp_path / "pytorch_model.bin")
        again = LayAlignForConditionalGeneration.from_published(
            tmp_path / "pytorch_model.bin", encoder=model.encoder, llm=_bare(model.llm)
        )
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def _bare(llm):
    """The LLM as a model of its own, without gates."""
    bare = type(llm)(llm.config)
    bare.load_state_dict({name: value for name, value in llm.state_dict().items() if "fusion_gate" not in name})
    return bare


def test_over_a_quantised_llm(make_encoder, make_llm, batch, tmp_path):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_llm().save_pretrained(tmp_path / "llm")
    model = LayAlignForConditionalGeneration.from_bases(
        tmp_path / "encoder", tmp_path / "llm", lora={"rank": 2}, quantization={"llm": "4bit"}
    )
    model.load_state_dict({name: torch.randn_like(own) for name, own in model.trained_parameters()}, strict=False)
    loss(model.train(), batch).backward()
    assert all(own.grad is not None and own.grad.any() for _, own in model.trained_parameters())
    model.eval().save_pretrained(tmp_path / "model")
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"merge_lora: .*k_proj is quantised|merge_lora: .*_proj is quantised"):
        model.merge_lora()
    assert model.config.lora is not None
    LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model", quantization="none").merge_lora()


def test_what_cannot_be_adapted_is_refused(make_encoder, make_llm, monkeypatch):
    def build(llm, **lora):
        return LayAlignForConditionalGeneration.from_bases(make_encoder(), llm, lora=lora)

    with pytest.raises(
        ValueError, match=r"lora.targets: qproj: no such linear layer in LlamaForCausalLM; it has down_proj"
    ):
        build(make_llm(), targets=["qproj"])
    with pytest.raises(ValueError, match=r"lora.targets: fusion_gate, embed_tokens: no such"):
        build(make_llm(), targets=["fusion_gate", "embed_tokens"])
    once = build(make_llm())
    with pytest.raises(ValueError, match="has adapters already \\(layalign\\)"):
        build(once.llm)
    with pytest.raises(ValueError, match="train_llm and lora"):
        LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm(), lora={}, train_llm=True)
    with pytest.raises(ValueError, match="train_only: this model has no llm; it has adapter, aligner, gates, lora"):
        once.train_only(["llm"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'lora: needs peft, which is not installed: pip install "layalign\[lora\]"'):
        build(make_llm())
