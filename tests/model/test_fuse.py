"""`layalign.fuse`: any LLM with cross states of the caller's own; `unfuse` gives the bare LLM back."""

import copy
import inspect
import threading

import pytest
import torch
import transformers

import layalign
from layalign.fusing import _configurations
from layalign.fusion import FusionMask, fused_attention
from layalign.own_states import OwnCrossStates
from tests.model.conftest import LLMS, builder
from tests.model.llm_cells import build
from tests.model.llm_families import JOINED

# Beside those of the other tests: sinks, layers that keep their arguments to themselves, norms of whole heads, learned positions.
MORE = {name: JOINED[name] for name in ("gpt_oss", "stablelm", "nemotron", "opt", "cohere2", "mixtral")}
FAMILIES = [*LLMS, *MORE]
EAGER = ("gemma2", "gpt_oss")  # where transformers starts with its own formula, which rounds otherwise
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WIDTH = 24


@pytest.fixture
def make_llm():
    usual = builder(LLMS, "llama", seed=11)
    return lambda name="llama": build(MORE[name]) if name in MORE else usual(name)


@pytest.fixture
def inputs():
    """Text padded on the left, cross states with padding anywhere."""
    generator = torch.Generator().manual_seed(21)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    return {
        "input_ids": torch.randint(3, 60, (3, 6), generator=generator),
        "attention_mask": mask,
        "cross_states": torch.randn(3, 5, WIDTH, generator=generator),
        "cross_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]),
    }


@pytest.fixture
def fused(make_llm):
    """(family, settings) -> a fused LLM whose gates are open, and its Fusion."""

    def make(family="llama", **settings):
        llm = make_llm(family)
        fusion = layalign.fuse(llm, **{"cross_size": WIDTH} | settings)
        generator = torch.Generator().manual_seed(22)
        with torch.no_grad():
            for parameter in fusion.parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return llm, fusion

    return make


def text_of(inputs):
    return {name: value for name, value in inputs.items() if "cross" not in name}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_closed_gates_and_unfused_are_the_bare_llm_bit_for_bit(family, make_llm, inputs):
    llm = make_llm(family)
    expected, real = llm(**text_of(inputs)).logits, inputs["attention_mask"].bool()
    tolerance = 1e-5 if family in EAGER else 0
    layalign.fuse(llm, cross_size=WIDTH)
    for given in (inputs, text_of(inputs)):
        torch.testing.assert_close(llm(**given).logits[real], expected[real], atol=tolerance, rtol=0)
    layalign.unfuse(llm)
    assert torch.equal(llm(**text_of(inputs)).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_layer_and_every_way_of_generating_reads_the_states(family, fused, inputs):
    llm, fusion = fused(family, gate="head")
    base = llm(**inputs).logits
    for gate in fusion.gates:
        value = gate.value.clone()
        gate.value.zero_()
        assert (llm(**inputs).logits - base).abs().max() > 1e-4
        gate.value.copy_(value)
    expected = llm.generate(**inputs, **GREEDY)
    if family != "gpt2":  # which repeats its last token, as initialised
        assert not torch.equal(expected, llm.generate(**text_of(inputs), **GREEDY))
    for way in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2, "num_return_sequences": 2}):
        ids = llm.generate(**inputs, **GREEDY, **way)
        if "num_beams" not in way:
            assert torch.equal(ids, expected), way
    row = {name: value[1:2] for name, value in inputs.items()}
    row["cross_states"], row["cross_mask"] = row["cross_states"][:, [1, 2, 4]], None
    assert torch.equal(llm.generate(**row, **GREEDY), expected[1:2])
    beams = llm.generate(**row, **GREEDY, num_beams=2, num_return_sequences=2)
    assert torch.equal(beams, ids[2:4])  # those of the whole batch, padded


def test_a_static_caches_mask_is_as_wide_at_every_step(fused, inputs, monkeypatch):
    """One that grows is a graph more at each step where steps are compiled."""
    llm, _ = fused()
    widths = []
    llm.model.register_forward_pre_hook(lambda *call: widths.append(call[-1]["attention_mask"].shape), with_kwargs=True)
    llm.generate(**inputs, **GREEDY, cache_implementation="static")
    assert len(widths) == GREEDY["max_new_tokens"] and len(set(widths)) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("gate", ["scalar", "head", "dynamic"])
@torch.no_grad()
def test_open_gates_are_the_formula(family, gate, fused, inputs, make_llm):
    """Written from the modules of the bare LLM: o_proj is linear, so each layer's output moves by o_proj(gate * cross)."""
    llm, fusion = fused(family, gate=gate, layers=[1])
    got = llm(**inputs).logits
    bare = make_llm(family)
    attention = bare.model.layers[1].self_attn
    rotate = inspect.getmodule(type(attention)).apply_rotary_pos_emb
    states = fusion.project(inputs["cross_states"])

    def heads(projected, norm=None):
        by_head = projected.unflatten(-1, (-1, attention.head_dim))
        return (by_head if norm is None else norm(by_head)).transpose(1, 2)

    def add_cross(module, args, kwargs, output):
        hidden = kwargs["hidden_states"]
        query = heads(module.q_proj(hidden), getattr(module, "q_norm", None))
        query, _ = rotate(query, query, *kwargs["position_embeddings"])
        key = heads(module.k_proj(states), getattr(module, "k_norm", None)).repeat_interleave(2, dim=1)
        value = heads(module.v_proj(states)).repeat_interleave(2, dim=1)
        scores = query @ key.transpose(2, 3) * module.scaling
        scores = scores.masked_fill(inputs["cross_mask"][:, None, None] == 0, -torch.inf)
        cross = scores.softmax(-1) @ value
        own = fusion.gates[0]
        number = own.linear(hidden).transpose(1, 2) if gate == "dynamic" else own.value.view(1, -1, 1)
        added = (cross * number[..., None]).transpose(1, 2).flatten(2)
        return (output[0] + torch.nn.functional.linear(added, module.o_proj.weight), *output[1:])

    attention.register_forward_hook(add_cross, with_kwargs=True)
    expected = bare(**text_of(inputs)).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=0)
    assert (got - make_llm(family)(**text_of(inputs)).logits)[real].abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unfuse_leaves_nothing(implementation, make_llm, inputs, tmp_path):
    llm = make_llm()
    llm.set_attn_implementation(implementation)
    llm.lm_head.weight.requires_grad_(False)

    def state():
        hooks = [(m._forward_pre_hooks.copy(), m._forward_hooks.copy(), sorted(vars(m))) for m in llm.modules()]
        flags = [(name, own.requires_grad, own.data_ptr()) for name, own in llm.named_parameters()]
        implementations = [config._attn_implementation for config in _configurations(llm)]
        return hooks, flags, implementations, str(inspect.signature(llm.forward)), list(llm.state_dict()), llm.training

    before = state()
    fusion = layalign.fuse(llm, cross_size=WIDTH, gate="dynamic")
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    assert list(llm.state_dict()) == before[4]
    llm.save_pretrained(tmp_path)
    llm(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in fusion.gates.parameters())
    assert layalign.unfuse(llm) is llm
    assert state() == before
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    with torch.no_grad():
        assert torch.equal(reloaded(**text_of(inputs)).logits, llm(**text_of(inputs)).logits)
    layalign.fuse(llm, freeze=False)
    assert [own.requires_grad for own in llm.parameters()] == [flag for _, flag, _ in before[1]]


def test_training_moves_the_trained_part_alone_with_checkpointing_too(make_llm, inputs):
    gradients, losses = {}, []
    for checkpointing in (False, True):
        llm = make_llm().train()
        if checkpointing:
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        fusion = layalign.fuse(llm, cross_size=WIDTH)
        with torch.no_grad():
            for gate in fusion.gates:
                gate.value.fill_(0.3)
        before = [parameter.clone() for parameter in llm.parameters()]
        optimizer = torch.optim.AdamW(fusion.parameters(), lr=0.03)
        for step in range(8):
            loss = llm(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
            loss.backward()
            if step == 0:
                gradients[checkpointing] = [parameter.grad.clone() for parameter in fusion.parameters()]
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(old, new) for old, new in zip(before, llm.parameters(), strict=True))
    assert losses[7] < losses[0] - 0.05
    assert losses[:8] == pytest.approx(losses[8:], abs=1e-5)
    for plain, checkpointed in zip(gradients[False], gradients[True], strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_keys_are_made_once_and_shared_step_by_step(fused, inputs):
    llm, fusion = fused()
    made = []
    fusion.project.register_forward_hook(lambda *_: made.append(1))
    expected = llm.generate(**inputs, **GREEDY, num_beams=1)
    assert len(made) == 1
    prepared = fusion(inputs["cross_states"], inputs["cross_mask"])
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
    for step in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -1 if step else 0 :]
        new = ids[:, -1:] if step else ids
        out = llm(
            new,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            cross_states=prepared,
            use_cache=True,
        )
        cache = out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
    assert torch.equal(ids, expected)
    assert (len(made), prepared.uses) == (2, 6)


@torch.no_grad()
def test_states_of_their_own_for_each_layer(fused, inputs):
    llm, _ = fused()
    same = llm(**inputs | {"cross_states": [inputs["cross_states"]] * 2}).logits
    torch.testing.assert_close(same, llm(**inputs).logits, atol=0, rtol=0)
    other = llm(**inputs | {"cross_states": [inputs["cross_states"], inputs["cross_states"] + 1]}).logits
    assert (other - same).abs().max() > 1e-4


@torch.no_grad()
def test_threads_and_two_llms_do_not_mix(fused, inputs):
    (llm, _), (other, _) = fused(), fused("qwen3", layers=[0])
    asked = [inputs | {"cross_states": inputs["cross_states"] * scale} for scale in (1.0, -2.0, 3.0)]
    expected = [(llm.generate(**given, **GREEDY), other.generate(**given, **GREEDY)) for given in asked]
    assert not torch.equal(expected[0][0], expected[1][0])
    found = [None] * 3

    def answer(index):
        found[index] = llm.generate(**asked[index], **GREEDY), other.generate(**asked[index], **GREEDY)

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(a, b) for pair, own in zip(expected, found, strict=True) for a, b in zip(pair, own, strict=True)
    )


@torch.no_grad()
def test_saved_weights_and_copies(fused, inputs, tmp_path, make_llm):
    llm, fusion = fused(gate="head")
    expected = llm(**inputs).logits
    fusion.save(tmp_path / "fusion.safetensors")
    other = make_llm()
    layalign.fuse(other, cross_size=WIDTH, gate="head").load(tmp_path / "fusion.safetensors")
    assert torch.equal(other(**inputs).logits, expected)
    for settings in ({"gate": "scalar"}, {"layers": [1], "gate": "head"}, {"cross_size": None, "gate": "head"}):
        wrong = layalign.fuse(make_llm(), **{"cross_size": WIDTH} | settings)
        with pytest.raises(ValueError, match="does not fit this Fusion"):
            wrong.load(tmp_path / "fusion.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "fusion.safetensors").read_bytes()[:-9])
    for name in ("cut", "none"):
        with pytest.raises(ValueError, match="missing, damaged"):
            fusion.load(tmp_path / name)
    twin = copy.deepcopy(llm)
    layalign.unfuse(llm)
    assert torch.equal(twin(**inputs).logits, expected)
    assert torch.equal(layalign.unfuse(twin)(**text_of(inputs)).logits, llm(**text_of(inputs)).logits)


@torch.no_grad()
def test_what_others_wrap_around_an_llm(fused, inputs):
    """PEFT calls forward past the module's hooks; accelerate replaces it."""
    peft, accelerate = pytest.importorskip("peft"), pytest.importorskip("accelerate")
    llm, _ = fused()
    expected = llm(**inputs).logits
    ids = llm.generate(**inputs, **GREEDY)
    adapted = peft.get_peft_model(llm, peft.LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(adapted(**inputs).logits, expected)
    assert torch.equal(adapted.generate(**inputs, **GREEDY), ids)
    base = adapted.unload()
    accelerate.cpu_offload(base, execution_device="cpu")
    assert torch.equal(base(**inputs).logits, expected)
    with pytest.raises(ValueError, match="forward of this LlamaForCausalLM was replaced after fuse"):
        layalign.unfuse(base)
    accelerate.hooks.remove_hook_from_module(base, recurse=True)
    layalign.unfuse(base)
    accelerate.cpu_offload(base, execution_device="cpu")
    again = layalign.fuse(base, cross_size=WIDTH)  # weights on the meta device between calls
    torch.testing.assert_close(base(**inputs).logits, base(**text_of(inputs)).logits, atol=0, rtol=0)
    again.gates[0].value.fill_(1)
    assert (base(**inputs).logits - base(**text_of(inputs)).logits).abs().max() > 1e-4


@torch.no_grad()
def test_compiled_without_a_graph_break(fused, inputs):
    llm, _ = fused()
    expected = llm(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(llm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, expected)


def test_states_and_gates_follow_layers_on_other_devices(fused, inputs):
    """Layers on "meta", where there is no memory, and what the Fusion has on the CPU."""
    llm, fusion = fused(gate="head")
    states = OwnCrossStates(fusion(inputs["cross_states"], inputs["cross_mask"]), fusion)
    query, key = torch.zeros(3, 4, 6, 8, device="meta"), torch.zeros(3, 2, 6, 8, device="meta")
    mask = FusionMask(inputs["attention_mask"].bool(), 0, None, 0)
    out, _ = fused_attention(llm.model.layers[1].self_attn, query, key, key, mask, fusion=states)
    assert (out.device.type, out.shape) == ("meta", (3, 6, 4, 8))


@torch.no_grad()
def test_half_precision(fused, inputs):
    llm, _ = fused()
    expected = llm(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(llm(**inputs).logits.float(), expected, atol=0.02, rtol=0)
    half, fusion = fused()
    half.to(torch.bfloat16)
    assert fusion.project.weight.dtype == torch.float32
    torch.testing.assert_close(half(**inputs).logits.float(), expected, atol=0.02, rtol=0)
