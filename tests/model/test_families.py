"""The attention swap on many LLM and encoder families: padding, batch, caches and beams change nothing."""

import pytest
import torch
import transformers

from layalign import LayAlignForConditionalGeneration

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "gpt2", "gpt_neox"]
ENCODERS = ["mt5", "bert", "m2m100", "qwen2", "xglm"]


@pytest.mark.parametrize(
    "families", [{"llm": family} for family in FAMILIES] + [{"encoder": encoder} for encoder in ENCODERS], ids=str
)
def test_padding_and_batch_change_no_logit(families, make_model, batch, alone):
    model = make_model(**families)
    with torch.no_grad():
        together = model(**batch)
        for row in range(3):
            single = model(**alone(batch, row)).logits[0]
            torch.testing.assert_close(together.logits[row, together.attention_mask[row]], single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_reaches_every_layer(family, make_model, batch):
    """Each layer's gate alone changes the logits, and with all gates at 0 the aligner has no influence at all."""
    model = make_model(family)
    gates = [parameter for name, parameter in model.trained_parameters() if "fusion_gate" in name]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
        closed = model(**batch)
        model.aligner.project.bias.add_(1)
        torch.testing.assert_close(model(**batch).logits, closed.logits, atol=0, rtol=0)
        assert len(gates) == 2
        for gate in gates:
            gate.fill_(0.5)
            difference = (model(**batch).logits - closed.logits)[closed.attention_mask].abs().max()
            assert difference > 1e-4
            gate.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_bare_llm(family, make_model, make_llm, batch):
    """At gate 0 the swapped LLM equals the untouched LLM on the same embeddings, sliding windows and soft caps included."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if "fusion_gate" in name:
                parameter.zero_()
        soft, soft_mask, *_ = model.encode(batch["encoder_input_ids"], batch["encoder_attention_mask"])
        embeddings, mask, *_ = model.assemble(soft, soft_mask, batch["input_ids"], batch["attention_mask"])
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
        bare = make_llm(family)
        bare.set_attn_implementation("eager")
        expected = bare(inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=position_ids).logits
        torch.testing.assert_close(model(**batch).logits[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_modes_agree(family, make_model, batch, alone):
    """Greedy ids: with and without cache, static cache, one beam of one, in a batch and alone."""
    model = make_model(family)
    arguments = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **arguments)
    assert expected.shape == (3, 9)
    assert torch.equal(expected, model.generate(**batch, **arguments, use_cache=False))
    assert torch.equal(expected, model.generate(**batch, **arguments, cache_implementation="static"))
    for row in range(3):
        assert torch.equal(expected[row : row + 1], model.generate(**alone(batch, row), **arguments))


@pytest.mark.parametrize("name", ["xglm", "bloom", "gptj", "stablelm", "gpt_oss", "llama4", "falcon"])
def test_families_that_cannot_be_joined_say_so(name, make_encoder, batch):
    """None of these may run with the cross path silently missing."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    experts = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
    }
    models = {
        "xglm": (
            "XGLMForCausalLM",
            "XGLMConfig",
            {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48, "vocab_size": 60},
        ),
        "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}),
        "gptj": (
            "GPTJForCausalLM",
            "GPTJConfig",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 60, "bos_token_id": 1},
        ),
        "stablelm": (
            "StableLmForCausalLM",
            "StableLmConfig",
            sizes | {"num_key_value_heads": 2, "intermediate_size": 48},
        ),
        "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", sizes | experts),
        "llama4": (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            sizes | experts | {"intermediate_size_mlp": 32, "attention_chunk_size": 4},
        ),
        "falcon": ("FalconForCausalLM", "FalconConfig", sizes),
    }
    model, config, settings = models[name]
    llm = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with pytest.raises((ValueError, RuntimeError), match=r"attention|project"):
        LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)(**batch)
