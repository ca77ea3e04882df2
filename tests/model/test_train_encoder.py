"""An encoder that is trained with the model, whole or its embeddings: gradients, saving and loading, what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from layalign import LayAlignConfig, LayAlignForConditionalGeneration, packing
from layalign.parts import part_of
from layalign.serving.settings import check_served
from tests.model.packed_rows import assert_same, packed, step

LANGBRIDGE = {"adapter": "linear", "aligner": None}
EVERY = {"encoder_layers": [0, 1, 2], "gate": "head"}


@pytest.fixture
def labelled(batch):
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def of_encoder(model):
    return {name: own for name, own in model.trained_parameters() if part_of(name) == "encoder"}


@pytest.mark.parametrize("settings", [LANGBRIDGE, EVERY], ids=["langbridge", "every part"])
def test_gradients_are_differences_of_losses(settings, make_model, labelled):
    """In fp64, for the encoder's embeddings, a weight within, and a norm; through adapter and aligner."""
    model = make_model(train_encoder=True, attention_backend="reference", **settings).double().train()
    model.encoder.eval()  # without dropout
    weights = of_encoder(model)

    def loss():
        logits = model(**labelled, skip_logits=False).logits  # the model's own loss is in fp32
        return F.cross_entropy(logits.flatten(0, 1), labelled["labels"].flatten())

    for ending in ("embed_tokens.weight", "block.1.layer.0.SelfAttention.q.weight", "final_layer_norm.weight"):
        own = next(value for name, value in weights.items() if name.endswith(ending))
        (gradient,) = torch.autograd.grad(loss(), [own])
        length, step = gradient.norm().item(), 3e-3
        with torch.no_grad():
            own += step * gradient / length
            above = loss().item()
            own -= 2 * step * gradient / length
            assert length == pytest.approx((above - loss().item()) / (2 * step), rel=2e-2), ending
            own += step * gradient / length


def test_packed_questions_have_the_same_gradients(make_model, uneven, monkeypatch):
    """In several calls of the encoder, as groups of like length are read."""
    monkeypatch.setattr(packing, "CPU_CALL_TOKENS", 0)
    model = make_model(train_encoder=True).eval()
    assert any("encoder." in name for name, _ in model.trained_parameters())
    assert_same(step(model, packed(uneven)), step(model, uneven))


def test_embeddings_alone(make_model, labelled):
    model = make_model(train_encoder="embeddings", **LANGBRIDGE).train()
    model(**labelled).loss.backward()
    (name,) = of_encoder(model)
    assert model.get_parameter(name) is model.encoder.get_input_embeddings().weight
    trained = {name for name, own in model.named_parameters() if own.grad is not None}
    assert trained == {name for name, _ in model.trained_parameters()}
    assert model.encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_frozen_encoder_gets_no_graph(make_model, labelled):
    model = make_model().train()
    assert not model.encoder_states(labelled["encoder_input_ids"], None).last_hidden_state.requires_grad
    assert not model.encoder.training and not of_encoder(model)
    assert not any(part_of(name) == "encoder" for name in model.trained_state_dict())
    model.train_only(["adapter", "encoder"]).train()
    assert model.config.train_encoder is True and model.encoder.training
    assert model.encoder_states(labelled["encoder_input_ids"], None).last_hidden_state.requires_grad
    model.train_only(["adapter"]).train()
    assert not model.encoder.training
    assert not model.encoder_states(labelled["encoder_input_ids"], None).last_hidden_state.requires_grad


@pytest.mark.parametrize("kind", [True, "embeddings"])
@pytest.mark.parametrize("encoder", ["mt5", "bert", "m2m100"])
def test_saved_and_loaded(kind, encoder, make_model, make_encoder, make_llm, batch, tmp_path):
    """Over the base that it was, which is known again; each weight is saved once."""
    model = make_model(encoder=encoder, train_encoder=kind, **LANGBRIDGE)
    before = model(**batch).logits
    with torch.no_grad():
        for own in of_encoder(model).values():
            own.mul_(1.5)
    expected = model(**batch).logits
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {name for name in weights if name.startswith("encoder.")} == of_encoder(model).keys()
    again = LayAlignForConditionalGeneration.from_pretrained(
        tmp_path / "model", encoder=make_encoder(encoder), llm=make_llm()
    )
    assert torch.equal(again(**batch).logits, expected)
    assert again.config.train_encoder == kind
    again.save_pretrained(tmp_path / "again")
    third = LayAlignForConditionalGeneration.from_pretrained(
        tmp_path / "again", encoder=make_encoder(encoder), llm=make_llm()
    )
    assert torch.equal(third(**batch).logits, expected)
    assert next(third.encoder.parameters()).dtype == torch.float32
    halves = {"encoder": make_encoder(encoder).to(torch.bfloat16), "llm": make_llm().to(torch.bfloat16)}
    half = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model", **halves, dtype="bfloat16")
    assert {own.dtype for own in half.parameters()} == {torch.bfloat16}


def test_another_base_is_noticed(make_model, make_encoder, make_llm, tmp_path):
    """By what the encoder was before it was trained."""
    model = make_model(train_encoder=True)
    with torch.no_grad():
        for own in of_encoder(model).values():
            own.mul_(1.5)
    model.save_pretrained(tmp_path)
    other = make_encoder()
    with torch.no_grad():
        for own in other.parameters():
            own.add_(0.1)
    with pytest.raises(ValueError, match=r"encoder .* is not the one trained with"):
        LayAlignForConditionalGeneration.from_pretrained(tmp_path, encoder=other, llm=make_llm())


WRONG = [
    ({"train_encoder": "all"}, "train_encoder must be true, false or 'embeddings', got 'all'"),
    ({"train_encoder": 1}, "train_encoder must be true, false or 'embeddings', got 1"),
    ({"train_encoder": True, "quantization": {"encoder": "4bit"}}, "a quantised encoder is only ever frozen"),
    (
        {"train_encoder": True, "adapter": None, "aligner": None, "train_llm": True},
        "adapter and aligner are both None, and an LLM alone has no encoder",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError) as caught:
        LayAlignConfig(**settings)
    assert message in str(caught.value)


def test_vllm_serves_none(make_model):
    with pytest.raises(ValueError, match="vLLM: this model's encoder is trained with it"):
        check_served(make_model(train_encoder=True).config)
