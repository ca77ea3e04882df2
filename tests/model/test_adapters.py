"""PEFT from both sides: an LLM that comes with an adapter, and adapters on the whole model."""

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from layalign import LayAlignForConditionalGeneration

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 33, 2, 17]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> the folder of a tiny LLM, "encoder" -> that of an encoder."""
    from tests.model.conftest import ENCODERS, LLMS, builder

    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "gpt2", "phi3"):
        builder(LLMS, "llama", seed=11)(family).save_pretrained(folder / family)
    builder(ENCODERS, "mt5", seed=12)("mt5").save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def llm(folders):
    return lambda family="llama": AutoModelForCausalLM.from_pretrained(folders / family).eval()


def config(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "init_lora_weights": False, **settings})


def add(llm, settings, name="default"):
    """`add_adapter`, or what it does where transformers asks for a newer PEFT than there is."""
    try:
        llm.add_adapter(settings, name)
    except ValueError as error:
        assert "version of PEFT you are using" in str(error)
        peft.inject_adapter_in_model(settings, llm, name)


def build(folders, llm, **settings):
    return LayAlignForConditionalGeneration.from_bases(folders / "encoder", llm, **settings)


@pytest.mark.parametrize("wrapped", [False, True], ids=["add_adapter", "PeftModel"])
@pytest.mark.parametrize(
    ("family", "settings", "tensors", "found"),
    [
        ("llama", {}, 8, {"alpha": 6, "targets": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}, 28, {"alpha": 12}),
        ("gpt2", {"target_modules": ["c_fc", "c_attn"]}, 8, {"targets": ["c_attn", "c_fc"]}),
        (
            "phi3",
            {"target_modules": ["qkv_proj"], "layers_to_transform": [1]},
            2,
            {"targets": ["model.layers.1.self_attn.qkv_proj"]},
        ),
    ],
)
def test_an_llms_adapter_is_trained_and_saved_with_the_part(
    wrapped, family, settings, tensors, found, folders, llm, batch, tmp_path
):
    given = llm(family)
    if wrapped:
        given = peft.get_peft_model(given, config(**settings)).eval()
    else:
        add(given, config(**settings))
        given.eval()
    with torch.no_grad():
        expected = given(IDS).logits
        model = build(folders, given).eval()
        torch.testing.assert_close(model.llm(IDS).logits, expected, atol=1e-6, rtol=1e-6)
        assert (expected - llm(family)(IDS).logits).abs().max() > 1e-3
    assert model.config.lora == model.config.lora | {"rank": 4, "dropout": 0.1} | found
    lora = {name: own for name, own in model.trained_parameters() if ".lora_" in name}
    assert len(lora) == tensors and all(own.requires_grad and own.dtype == torch.float32 for own in lora.values())
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(own.grad is not None for own in lora.values())
    assert {name for name, own in model.named_parameters() if own.grad is not None} == {
        name for name, _ in model.trained_parameters()
    }
    model.eval().save_pretrained(tmp_path)
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        merged = loaded.merge_lora()
        torch.testing.assert_close(merged.llm(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "has model.layers.0.self_attn.q_proj; LayAlign takes up one plain LoRA"),
        ({"lora_bias": True}, "has model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "has model.embed_tokens"),
        ({"rank_pattern": {"v_proj": 2}}, "has several ranks or scales"),
        ({"bias": "all"}, "has bias"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"alora_invocation_tokens": [5, 6]}, "has model.layers.0.self_attn.q_proj"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which has changed the LLM's own weights"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights='olora'"),
    ],
)
def test_what_has_no_setting_is_refused_and_left_as_it_was(settings, match, folders, llm):
    given = llm()
    adapted = peft.get_peft_model(given, config(**settings)).eval()
    before = adapted(IDS).logits
    with pytest.raises(ValueError, match=match):
        build(folders, adapted)
    assert torch.equal(adapted(IDS).logits, before)


def test_refused_where_an_adapter_would_be_lost(folders, llm, tmp_path, make_model):
    with pytest.raises(ValueError, match="llm: got a PeftModel of PREFIX_TUNING; LayAlign takes up one plain LoRA"):
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        build(folders, peft.get_peft_model(llm(), prefix))
    two = llm()
    add(two, config(), "one")
    add(two, config(), "two")
    with pytest.raises(ValueError, match=r"has several adapters \(one, two\)"):
        build(folders, two)
    one = llm()
    add(one, config())
    before = one.eval()(IDS).logits
    with pytest.raises(ValueError, match=r"has adapters already \(default\)"):
        build(folders, one, lora={"rank": 2})
    with pytest.raises(ValueError, match="llm_layers must be distinct indices"):
        build(folders, one, llm_layers=[7])
    assert torch.equal(one.eval()(IDS).logits, before) and list(one.peft_config) == ["default"]
    model = build(folders, folders / "llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has adapters already \(default\)"):
        LayAlignForConditionalGeneration.from_pretrained(tmp_path, llm=one)
    add(model.llm, config(), "later")
    for call in (model.train, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"the LLM has adapters \(later\) that this model does not train or save"):
            call()


LLM_LAYERS = r".*llm\..*\.(q_proj|v_proj)"
PART = ["adapter", "aligner", "fusion_gate"]


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_peft_on_the_whole_model_trains_and_saves_the_part(task, make_model, batch, tmp_path):
    bare = make_model()
    with torch.no_grad():
        expected, tokens = bare(**batch).logits, bare.generate(**batch, max_new_tokens=5)
    settings = config(target_modules=LLM_LAYERS, modules_to_save=PART, task_type=task, init_lora_weights=True)
    model = peft.get_peft_model(copy.deepcopy(bare), settings).eval()
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
    optimizer = torch.optim.SGD([own for own in model.parameters() if own.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        assert all((own.grad is not None) == own.requires_grad for own in model.parameters() if own.requires_grad)
        optimizer.step()
    names = {name for name, own in model.named_parameters() if own.requires_grad}
    assert len(names) == len(list(bare.trained_parameters())) + 2 * 2 * 2
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    with torch.no_grad():
        found = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, found) and not torch.allclose(found, expected, atol=1e-3)
        with pytest.raises(ValueError, match="save the PeftModel"):
            loaded.get_base_model().save_pretrained(tmp_path / "inner")
        # Merged, the LLM is no longer the base that the model refers to: it is saved with it.
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, found, atol=1e-5, rtol=1e-4)
        merged.train_only(["adapter", "aligner", "gates", "llm"])
        merged.save_pretrained(tmp_path / "merged")
        again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "merged", encoder=bare.encoder)
        torch.testing.assert_close(again(**batch).logits, found, atol=1e-5, rtol=1e-4)


def test_what_peft_freezes_is_told(make_model):
    model = peft.get_peft_model(make_model(), config(target_modules=LLM_LAYERS))
    with pytest.warns(UserWarning, match=r'modules_to_save=\["adapter", "aligner", "fusion_gate"\]'):
        model.train()
    model = peft.get_peft_model(make_model(encoder="qwen2"), config(modules_to_save=PART, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="adapters on the encoder, which runs without gradient"):
        model.train()
