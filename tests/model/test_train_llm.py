"""Full fine-tuning: the LLM's weights are trained through both places they stand in, and saved as a model of their own."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layalign import LayAlignForConditionalGeneration
from layalign.projections import attention_modules
from tests.model.packed_rows import assert_same, packed, step


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def gradients(model, batch):
    model.train().zero_grad()
    loss(model, batch).backward()
    return {name: own.grad.clone() for name, own in model.trained_parameters()}


class Called(nn.Linear):
    """A projection that the aligner calls as it is no plain layer, so that autograd differentiates it."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_gradients_of_shared_projections_equal_autograds(family, make_model, batch):
    """The operators' own backward against autograd through called modules and through the reference."""
    model = make_model(family, train_llm=True)
    assert all(own.requires_grad for own in model.llm.parameters())
    assert not any(own.requires_grad for own in model.encoder.parameters())
    found = gradients(model, batch)
    model.config.attention_backend = "reference"
    for attention in attention_modules(model.llm).values():
        for name in ("k_proj", "v_proj", "qkv_proj", "query_key_value"):
            if hasattr(attention, name):
                getattr(attention, name).__class__ = Called
    assert not any(projection.is_plain for projection in model._projections)
    expected = gradients(model, batch)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_cross_states_are_part_of_the_gradient(make_model, batch):
    """With the gates at 0 the loss does not depend on them, and the shared projections' gradient is that of the bare LLM."""
    model = make_model(train_llm=True)
    name = next(name for name, _ in model.llm.named_parameters() if name.endswith("layers.0.self_attn.k_proj.weight"))
    whole = gradients(model, batch)[f"llm.{name}"]
    with torch.no_grad():
        for attention in attention_modules(model.llm).values():
            attention.fusion_gate.value.zero_()
    bare = gradients(model, batch)[f"llm.{name}"]
    assert (whole - bare).abs().max() > 1e-3 * bare.abs().max()


@pytest.fixture
def saved(make_encoder, make_llm, tmp_path):
    """(family, dtype) -> a model whose LLM has been moved away from its base, and the folder it is saved in."""

    def build(family="llama", dtype=None, **kwargs):
        make_encoder().save_pretrained(tmp_path / "encoder")
        make_llm(family).save_pretrained(tmp_path / "base")
        model = LayAlignForConditionalGeneration.from_bases(
            tmp_path / "encoder", tmp_path / "base", dtype=dtype, train_llm=True
        )
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, own in model.trained_parameters():
                own.add_(torch.randn(own.shape, generator=generator) * 0.1)
        model.eval().save_pretrained(tmp_path / "model", **kwargs)
        return model, tmp_path / "model"

    return build


@pytest.mark.parametrize(("family", "shards"), [("llama", "10KB"), ("gpt2", "5GB"), ("qwen3", "5GB")])
def test_saved_and_loaded_with_its_llm(family, shards, saved, batch):
    """In parts, with tied embeddings (GPT-2's), and by plain transformers."""
    model, folder = saved(family, max_shard_size=shards)
    assert (len(list((folder / "llm").glob("*.safetensors"))) > 1) == (shards == "10KB")
    loaded = LayAlignForConditionalGeneration.from_pretrained(folder)
    assert loaded.config.train_llm and loaded.config.llm_name_or_path == str(folder.parent / "base")
    alone = AutoModelForCausalLM.from_pretrained(folder / "llm")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        ids = batch["input_ids"]
        torch.testing.assert_close(alone(ids).logits, model.llm(ids).logits)
        answers = [one.generate(**batch, max_new_tokens=4, do_sample=False) for one in (model, loaded)]
    assert torch.equal(*answers)
    # And so once more: what was loaded is a whole model.
    loaded.save_pretrained(folder.parent / "again")
    again = LayAlignForConditionalGeneration.from_pretrained(folder.parent / "again")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_an_llm_that_is_trained_is_fp32(saved, batch):
    model, folder = saved(dtype=torch.bfloat16)
    assert {own.dtype for own in model.llm.parameters()} == {torch.float32}
    assert {own.dtype for own in model.encoder.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, batch)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    half = LayAlignForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.llm.dtype == torch.bfloat16
    assert json.loads((folder / "llm" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_llm_is_named(damage, saved):
    _, folder = saved()
    file = folder / "llm" / "model.safetensors"
    if damage == "gone":
        (folder / "llm" / "config.json").unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        config = json.loads((folder / "llm" / "config.json").read_text())
        (folder / "llm" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="llm"):
        LayAlignForConditionalGeneration.from_pretrained(folder)


def test_dropout_of_an_llm_that_is_trained(make_encoder, make_llm):
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm("gpt2"), train_llm=True).train()
    dropouts = [module for module in model.llm.modules() if isinstance(module, nn.Dropout)]
    assert dropouts and all(module.training for module in dropouts)
    assert not any(module.training for module in model.encoder.modules())
    model.train_only(["adapter", "aligner", "gates"]).train()
    assert not any(module.training for module in dropouts)
    assert {name for name, own in model.named_parameters() if own.requires_grad} == {
        name for name, _ in model.trained_parameters() if not name.startswith("llm.") or "fusion_gate" in name
    }


def test_an_llm_alone_reads_packed_rows(make_llm, uneven):
    model = LayAlignForConditionalGeneration.from_bases(None, make_llm(), train_llm=True).train()
    assert_same(step(model, packed(uneven)), step(model, uneven))


def test_an_llm_alone(make_llm, make_encoder, batch, tmp_path):
    llm = make_llm()
    model = LayAlignForConditionalGeneration.from_bases(None, llm, train_llm=True).eval()
    whole = {"encoder_input_ids": batch["encoder_input_ids"], "input_ids": batch["input_ids"]}
    with torch.no_grad():
        bos = torch.full((3, 1), llm.config.bos_token_id)
        expected = llm(torch.cat([bos, batch["input_ids"]], 1)).logits
        torch.testing.assert_close(model(**whole).logits, expected)
        assert model(**batch, labels=batch["input_ids"]).loss > 0
        ids = model.generate(**whole, max_new_tokens=4, do_sample=False)
        plain = llm.generate(torch.cat([bos, batch["input_ids"]], 1), max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, plain[:, 8:])
    model.save_pretrained(tmp_path / "model")
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.encoder is None
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for settings, message in (
        ({}, "nothing would join the encoder to the LLM, and without lora or train_llm nothing would be trained"),
        ({"adapter": "mlp", "train_llm": True}, "names two bases|needs encoder_config"),
    ):
        with pytest.raises(ValueError, match=message):
            LayAlignForConditionalGeneration.from_bases(None, make_llm(), **settings)
    with pytest.raises(ValueError, match="an LLM alone: it takes no encoder"):
        LayAlignForConditionalGeneration.from_bases(
            make_encoder(), make_llm(), adapter=None, aligner=None, train_llm=True
        )
