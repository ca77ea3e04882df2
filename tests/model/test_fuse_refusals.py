"""What `layalign.fuse` and a fused LLM refuse, and that a refusal changes nothing."""

import inspect

import pytest
import torch
import transformers

import layalign
from layalign import LayAlignForConditionalGeneration, families
from layalign.fusion import FusionMask, fused_attention

OUTSIDE = {
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
CLASSES = {"xglm": "XGLM", "bloom": "Bloom", "falcon": "Falcon"}
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
STATES = torch.ones(2, 4, 24)


@pytest.mark.parametrize("family", OUTSIDE)
@torch.no_grad()
def test_families_that_do_not_go_through_the_interface(family):
    """None may run with the cross path silently missing; the LLM answers as before afterwards."""
    settings = OUTSIDE[family] | {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    llm = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(
        getattr(transformers, f"{CLASSES[family]}Config")(**settings)
    ).eval()
    expected, before = llm(IDS).logits, sorted(vars(llm))
    with pytest.raises((ValueError, RuntimeError), match=r"attention|project"):
        layalign.fuse(llm, cross_size=24)
        llm(IDS, cross_states=STATES)
    if "forward" in vars(llm):
        layalign.unfuse(llm)
    assert torch.equal(llm(IDS).logits, expected)
    assert sorted(vars(llm)) == before


SETTINGS = {
    "layers": ({"layers": [0, 2]}, r"layers: got \[0, 2\], takes distinct indices from 0 to 1"),
    "no layers": ({"layers": []}, "at least one"),
    "a layer twice": ({"layers": [1, 1]}, "distinct"),
    "gate": ({"gate": "vector"}, "gate: got 'vector', takes one of"),
    "backend": ({"backend": "cuda"}, "backend: got 'cuda'"),
    "cross_size": ({"cross_size": 0}, "cross_size: got 0, takes the width"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings(case, make_llm):
    settings, message = SETTINGS[case]
    llm = make_llm()
    with pytest.raises(ValueError, match=message):
        layalign.fuse(llm, **settings)
    assert "forward" not in vars(llm) and llm.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in llm.parameters())


def test_what_is_no_free_llm(make_llm, make_encoder, make_model):
    llm = make_llm()
    layalign.fuse(llm)
    with pytest.raises(ValueError, match="LlamaForCausalLM is fused already"):
        layalign.fuse(llm)
    with pytest.raises(ValueError, match=r"is fused already; layalign\.unfuse"):
        LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)
    layalign.unfuse(llm)
    with pytest.raises(ValueError, match="a LlamaForCausalLM that is not fused"):
        layalign.unfuse(llm)
    LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)  # nothing of the refusal is left
    model = make_model()
    for part in (model, model.llm):
        with pytest.raises(ValueError, match=r"part of a LayAlign model"):
            layalign.fuse(part)
    for wrong in (make_encoder(), make_encoder("bert"), torch.nn.Linear(2, 2), "name"):
        with pytest.raises(ValueError, match="takes a causal LM of transformers"):
            layalign.fuse(wrong)


CALLS = {
    "width": ({"cross_states": torch.ones(2, 4, 32)}, r"cross_states: got shape \(2, 4, 32\), takes \(B, T, 24\)"),
    "numbers": ({"cross_states": STATES.long()}, "cross_states: got torch.int64"),
    "no tensor": ({"cross_states": [1, 2]}, "cross_states: got a list of 2"),
    "layers": ({"cross_states": [STATES] * 3}, "cross_states: got a list of 3"),
    "rows": ({"cross_states": STATES[:1]}, "cross_states: got 1 rows, takes one for each of the 2 rows"),
    "mask": ({"cross_mask": torch.ones(2, 5)}, r"cross_mask: got \(2, 5\), takes \(2, 4\)"),
    "mask alone": ({"cross_states": None, "cross_mask": torch.ones(2, 4)}, "a mask without cross_states"),
    "packed": ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "cu_seq_lens_q: packed sequences"),
    "weights": ({"output_attentions": True}, "output_attentions: the fused attention makes no weights"),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(case, make_llm):
    given, message = CALLS[case]
    llm = make_llm()
    layalign.fuse(llm, cross_size=24)
    with pytest.raises(ValueError, match=message):
        llm(IDS, **{"cross_states": STATES} | given)


def test_packing_by_positions_and_its_like_are_refused(make_llm):
    llm = make_llm()
    fusion = layalign.fuse(llm, cross_size=24)
    with pytest.raises(ValueError, match="packed by position_ids"):
        llm(IDS[:1], cross_states=STATES[:1], position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)
    with pytest.raises(ValueError, match="assistant_model: a draft model would not see"):
        llm.generate(IDS, cross_states=STATES, assistant_model=llm)
    with pytest.raises(ValueError, match="cross_states: got 2 rows, takes one for each of the 1 rows"):
        llm.generate(IDS[:1], cross_states=STATES)
    with pytest.raises(ValueError, match="None: they bring theirs"):
        llm(IDS, cross_states=fusion(STATES), cross_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="not used by the model: \\['cross_state'\\]"):
        llm.generate(IDS, cross_state=STATES)
    llm.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attention implementation was set to 'sdpa', which drops"):
        llm(IDS, cross_states=STATES)


def test_training_that_cannot_work(make_llm):
    llm = make_llm().train()
    layalign.fuse(llm, cross_size=24)
    llm.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        llm(IDS, cross_states=STATES)
    dropping = make_llm("gpt2").train()
    layalign.fuse(dropping, cross_size=24)
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1 in training mode"):
        dropping(IDS, cross_states=STATES)
    with pytest.raises(ValueError, match=r"attention dropout of 0\.1 in training mode"):
        dropping(IDS)  # the bare LLM would drop
    dropping.eval()(IDS, cross_states=STATES)


def test_a_family_whose_generate_loses_the_states(make_llm, monkeypatch):
    llm = make_llm()

    def prepare(self, input_ids, cross_states=None, **kwargs):
        return {"input_ids": input_ids}

    monkeypatch.setattr(type(llm), "prepare_inputs_for_generation", prepare)
    layalign.fuse(llm, cross_size=24)
    with pytest.raises(RuntimeError, match="did not hand the cross states on"):
        llm.generate(IDS, cross_states=STATES, max_new_tokens=2, pad_token_id=0)


def test_signatures_say_what_is_taken(make_llm):
    """transformers' Trainer keeps the columns that it finds there."""
    llm = make_llm()
    before = list(inspect.signature(llm.forward).parameters)
    layalign.fuse(llm)
    for name in ("forward", "generate"):
        assert {"cross_states", "cross_mask"} <= set(inspect.signature(getattr(llm, name)).parameters)
    assert [name for name in inspect.signature(llm.forward).parameters if "cross" not in name] == before


OLD = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}


def test_a_family_that_would_be_misread_is_refused_before_any_call():
    """In a call, others' calls on the same LLM would see what is tried, and a compiled or offloaded one would try nothing."""
    torch.manual_seed(0)
    llm = transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**OLD)).eval()
    expected, before = llm(IDS).logits, sorted(vars(llm))
    with pytest.raises(ValueError, match=r"CodeGenAttention: LayAlign would make other keys|attention interface"):
        layalign.fuse(llm, cross_size=24)
    assert torch.equal(llm(IDS).logits, expected) and sorted(vars(llm)) == before


def test_calls_try_nothing(monkeypatch, make_encoder):
    """Of a family that no test has seen, once, where the cross-attention is put on it."""
    tried = []
    check = families.check
    monkeypatch.setattr(families, "check", lambda *given: tried.append(given) or check(*given))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = transformers.ArceeForCausalLM(
        transformers.ArceeConfig(vocab_size=60, bos_token_id=1, num_key_value_heads=2, **sizes)
    ).eval()
    layalign.fuse(llm, cross_size=24)
    assert len(tried) == 1
    llm(IDS, cross_states=STATES)
    layalign.unfuse(llm)
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm).eval()
    assert len(tried) == 2
    model(encoder_input_ids=IDS, input_ids=IDS)
    assert len(tried) == 2


def test_weights_that_are_not_at_hand_are_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr(families.logger, "warning_once", said.append)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        llm = transformers.ArceeForCausalLM(
            transformers.ArceeConfig(vocab_size=60, bos_token_id=1, num_key_value_heads=2, **sizes)
        )
    layalign.fuse(llm, cross_size=24)
    assert len(said) == 1 and "ArceeAttention: no test of LayAlign has seen it" in said[0]


@pytest.mark.parametrize("name", ["block_indices", "position_bias"])
def test_arguments_that_say_what_is_seen(name):
    """MiniMax-M3 hands over the blocks that a query reads."""
    q = torch.randn(1, 2, 3, 16)
    mask = FusionMask(None, 0, None)
    with pytest.raises(ValueError, match=f"Linear hands {name} to its attention function"):
        fused_attention(torch.nn.Linear(1, 1), q, q, q, mask, **{name: torch.zeros(1)})


def test_only_the_language_model_of_one_that_reads_pictures_too():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=sizes | {"vocab_size": 60, "head_dim": 16, "num_key_value_heads": 2},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
    )
    llm = transformers.Gemma3ForConditionalGeneration(config).eval()
    before = llm.config.vision_config._attn_implementation
    layalign.fuse(llm, cross_size=24)
    assert llm.config.vision_config._attn_implementation == before != "layalign"
    assert llm(IDS, cross_states=STATES).logits.isfinite().all()
    layalign.unfuse(llm)
    assert llm.config.text_config._attn_implementation != "layalign"


class Eight(torch.nn.Module):
    """A linear layer in 8 bits that computes in its input's dtype, as bitsandbytes' does."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("scale", layer.weight.detach().abs().amax() / 127)
        self.weight = torch.nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_a_quantised_llm_that_computes_in_bf16(make_llm):
    llm = make_llm("mistral").to(torch.bfloat16)
    for layer in llm.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Eight(getattr(layer.self_attn, name)))
    layalign.fuse(llm, cross_size=24)
    assert llm(IDS, cross_states=STATES).logits.dtype == torch.bfloat16
