"""What `layalign.fuse` and a fused LLM refuse, and that a refusal changes nothing."""

import inspect

import pytest
import torch
import transformers

import layalign
from layalign import LayAlignForConditionalGeneration

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
