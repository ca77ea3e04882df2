"""Settings, training behaviour, checkpointing, generation and save/load of the model."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor, TextStreamer

from layalign import LayAlignConfig, LayAlignForConditionalGeneration, LayAlignProcessor


@pytest.fixture
def labelled(batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return batch | {"labels": labels}


def enable_checkpointing(model, **kwargs):
    """transformers renamed the method in 5.2x."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.trained_parameters()}


def test_loss_equals_a_plain_computation(make_model, labelled, alone):
    """Against full logits of each row alone and a hand-written cross-entropy over its shifted labels."""
    model = make_model()
    total, count = 0.0, 0
    for row in range(3):
        single = alone(labelled, row)
        labels = single.pop("labels")[0]
        logits = model(**single).logits[0, -len(labels) - 1 :].double().log_softmax(-1)
        for position, label in enumerate(labels.tolist()):
            if label != -100:
                total, count = total - logits[position, label].item(), count + 1
    out = model(**labelled)
    assert out.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert torch.equal(out.labels, labelled["labels"].masked_fill(labelled["attention_mask"] == 0, -100))
    assert (out.labels != -100).sum() == count
    narrow = model(**labelled, only_scored=True)
    assert narrow.logits.shape[:2] == narrow.labels.shape and narrow.loss == out.loss
    assert narrow.logits.shape[1] < out.attention_mask.shape[1], "logits were computed where no label is"
    for logits, targets in ((out.logits, out.labels), (narrow.logits, narrow.labels)):
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert found.item() == pytest.approx(total / count, rel=1e-5)


def test_token_weighted_accumulation_equals_the_large_batch(make_model, labelled):
    model = make_model()
    model(**labelled).loss.backward()
    large = gradients(model)
    model.zero_grad()
    tokens = int((labelled["labels"] != -100).sum())
    for row in range(3):
        part = {key: value[row : row + 1] for key, value in labelled.items()}
        model(**part, num_items_in_batch=tokens).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, large[name], atol=1e-6, rtol=1e-4)


def test_only_the_trained_part_requires_gradients(make_model, labelled):
    model = make_model().train()
    model(**labelled).loss.backward()
    trained = {name for name, _ in model.trained_parameters()}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for _, parameter in model.trained_parameters()
    )
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
    assert not any(module.training for module in model.encoder.modules())


def test_first_step_moves_the_gates(make_encoder, make_llm, labelled):
    """Gates start at 0, and their gradient must not be 0 there."""
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm())
    assert torch.equal(model.gates(), torch.zeros(2, 1))
    model(**labelled).loss.backward()
    assert all(
        parameter.grad.abs().item() > 0 for name, parameter in model.trained_parameters() if "fusion_gate" in name
    )


OPT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "llm",
    [
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, bos_token_id=1, n_embd=32, n_layer=2, n_head=4)
        ),
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**OPT, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.4, attention_dropout=0.1)
        ),
        lambda: transformers.BioGptForCausalLM(transformers.BioGptConfig(**OPT, intermediate_size=48)),
    ],
    ids=["gpt2", "opt", "biogpt"],
)
def test_training_does_not_depend_on_dropout_of_the_frozen_bases(llm, make_encoder, labelled):
    """OPT and BioGPT drop by a function, which looks at the module's own flag."""
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm()).train()
    assert model(**labelled).loss.item() == model(**labelled).loss.item() == model.eval()(**labelled).loss.item()
    model.train_only(["llm"]).train()  # trained itself, it drops as it always has
    assert len({model(**labelled).loss.item() for _ in range(4)}) > 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(family, make_model, labelled):
    model = make_model(family).train()
    model(**labelled).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    enable_checkpointing(model)
    calls = []
    mlp = next(module for name, module in model.llm.named_modules() if name.endswith(("layers.0.mlp", "h.0.mlp")))
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**labelled).loss.backward()
    assert len(calls) == 2, "the layer was not computed again: checkpointing was off"
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused(make_model):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        enable_checkpointing(make_model(), use_reentrant=True)


def test_two_forwards_before_a_backward(make_model, labelled):
    """Cross states travel with the call: a second forward must not disturb the first one's backward."""
    model = make_model()
    other = {key: value.flip(0) for key, value in labelled.items()}
    other["encoder_input_ids"] = other["encoder_input_ids"] * 0 + 7
    model(**labelled).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    first = model(**labelled).loss
    model(**other)
    first.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name])


def test_bf16_autocast_keeps_fp32_masters(make_model, labelled):
    model = make_model()
    exact = model(**labelled).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**labelled).loss
    loss.backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for _, parameter in model.trained_parameters())
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert loss.item() != exact.item()


SETTINGS = [
    {"adapter": "linear", "aligner": None, "llm_input": {"task": False}},
    {"adapter": "mlp", "aligner": None},
    {"adapter": None},
    {"aligner": "mlp"},
    {"gate": "head"},
    {"gate": "dynamic"},
    {"gate": None},
    {"adapter_width": 40},
    {"adapter": "gelu", "adapter_width": 40},
    {"aligner_width": 24},
    {"encoder_states": "last"},
    {"encoder_states": "mean"},
    {"encoder_states": [0, 2]},
    {"encoder_layers": [1, 2]},
    {"llm_layers": [1]},
    {"attention_backend": "reference"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
def test_every_setting_trains_saves_and_loads(settings, make_model, make_encoder, make_llm, labelled, tmp_path):
    model = make_model("qwen3", **settings)
    model.train()
    model(**labelled).loss.backward()
    assert all(parameter.grad is not None for _, parameter in model.trained_parameters())
    model.eval()
    model.save_pretrained(tmp_path / "model")
    again = LayAlignForConditionalGeneration.from_pretrained(
        tmp_path / "model", encoder=make_encoder(), llm=make_llm("qwen3")
    )
    prompt = {key: value for key, value in labelled.items() if key != "labels"}
    assert torch.equal(again(**prompt).logits, model(**prompt).logits)
    assert again.config.to_diff_dict().items() >= {k: v for k, v in settings.items() if k != "llm_input"}.items()
    ids = model.generate(**labelled, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, again.generate(**labelled, max_new_tokens=4, do_sample=False))


def test_saved_folder_holds_the_trained_part_only(make_model, make_encoder, make_llm, tmp_path):
    encoder, llm = tmp_path / "encoder", tmp_path / "llm"
    make_encoder().save_pretrained(encoder)
    make_llm().save_pretrained(llm)
    model = LayAlignForConditionalGeneration.from_bases(encoder, llm)
    model.save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < 4 * model.num_trained_parameters + 4096
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["encoder_name_or_path"] == str(encoder)
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "model"), LayAlignConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "model"), LayAlignForConditionalGeneration)
    half = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_generate_modes(make_model, batch, words):
    model = make_model("mistral")
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    beams = model.generate(
        **batch, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=None
    )
    assert beams.shape == (6, 6)
    best = model.generate(
        **batch, max_new_tokens=6, num_beams=1, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert torch.equal(best.sequences, greedy)
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert sampled.shape == (9, 6)
    torch.manual_seed(0)
    assert torch.equal(
        sampled, model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    )
    streamed = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            streamed.append(text)

    tokenizer = words([f"w{i}" for i in range(56)])
    single = {key: value[:1] for key, value in batch.items()}
    ids = model.generate(**single, max_new_tokens=6, do_sample=False, eos_token_id=None, streamer=Collect(tokenizer))
    assert "".join(streamed).split() == tokenizer.decode(ids[0]).split()
    without_prompt = {key: value for key, value in batch.items() if key.startswith("encoder")}
    assert model.generate(**without_prompt, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (3, 3)


def test_beam_search_in_a_batch_equals_alone(make_model, batch, alone):
    """Beams are expanded, reordered and must keep their own example's cross states."""
    model = make_model()
    arguments = {"max_new_tokens": 7, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **arguments)
    for row in range(3):
        assert torch.equal(together[row : row + 1], model.generate(**alone(batch, row), **arguments))


def test_cross_states_are_computed_once_per_input(make_model, batch):
    model = make_model()
    calls = []
    model.aligner.register_forward_hook(lambda *_: calls.append("aligner"))
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    model.generate(**batch, max_new_tokens=8, num_beams=2, do_sample=False, eos_token_id=None)
    assert sorted(calls) == ["aligner", "encoder"]


def test_a_replaced_attention_implementation_is_noticed(make_model, batch):
    model = make_model()
    model.llm.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="drops the cross-attention"):
        model(**batch)
    with pytest.raises(ValueError, match="attention_backend"):
        model.set_attn_implementation({"llm_config": "sdpa"})
    model.set_attn_implementation("eager")
    assert model.encoder.config._attn_implementation == "eager"


def test_joining_keeps_the_encoders_own_attention(make_encoder, make_llm):
    """transformers sets a composite's implementation on its parts too; with None an encoder drops its padding mask silently."""
    encoder = make_encoder()
    before = encoder.encoder.config._attn_implementation
    model = LayAlignForConditionalGeneration.from_bases(encoder, make_llm())
    assert before is not None
    assert model.encoder.config._attn_implementation == before


def test_processor_round_trip(words, make_model, make_encoder, make_llm, tmp_path):
    llm_words = words([f"w{i}" for i in range(56)])
    encoder_words = words([f"e{i}" for i in range(46)], eos=True)
    processor = LayAlignProcessor(llm_words, encoder_words, prompt_template="w1 w2 {text} w3")
    batch = processor(["e1 e2 e3", "e4"], target=["w5 w6", "w7"])
    assert batch["encoder_input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 3, 3, 3, 7, 9, 10, 2], [0, 0, 0, 5, 6, 3, 7, 11, 2]]
    assert batch["labels"].tolist() == [[-100] * 6 + [9, 10, 2], [-100] * 7 + [11, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [9, 6]
    bare = processor(["e1", "e2"], prompt=None)
    assert set(bare) == {"encoder_input_ids", "encoder_attention_mask"}
    assert processor("e1", prompt="w9", target="w8", padding_side="right")["labels"].tolist() == [[-100, 12, 2]]
    cut = processor("e1 e2 e3", target="w5", max_length=4, encoder_max_length=2)
    assert cut["input_ids"].tolist() == [[3, 7, 9, 2]]
    assert cut["encoder_input_ids"].shape == (1, 2)

    model = make_model()
    right = processor(["e1 e2 e3", "e4"], target=["w5 w6", "w7"], padding_side="right")
    assert model(**batch).loss.item() == pytest.approx(model(**right).loss.item(), rel=1e-6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for again in (LayAlignProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, LayAlignProcessor)
        assert again.prompt_template == processor.prompt_template
        for key, value in again(["e1 e2 e3", "e4"], target=["w5 w6", "w7"]).items():
            assert torch.equal(value, batch[key])


def test_without_cache_and_aligner_the_prompt_is_not_lost(make_model, batch):
    model = make_model(aligner=None)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **arguments), model.generate(**batch, **arguments, use_cache=False))
