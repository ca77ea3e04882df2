"""`layalign.nn.AdaptiveFusionAttention`: the operator as a layer."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

import layalign
from layalign.nn import AdaptiveFusionAttention, FusionCache

ROTARY = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4))


def rotary(query, key, positions):
    return apply_rotary_pos_emb(query, key, *ROTARY(query, positions))


@pytest.fixture
def make():
    """settings -> a layer of width 32 with 4 heads on 2, rotated, its gate open."""

    def build(**settings):
        torch.manual_seed(31)
        layer = AdaptiveFusionAttention(32, 4, **{"num_kv_heads": 2, "cross_dim": 12} | settings)
        layer.rotary = rotary
        with torch.no_grad():
            for parameter in layer.gate.parameters():
                parameter.normal_()
        return layer

    return build


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(32)
    hidden, states = torch.randn(2, 7, 32, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return hidden, states, torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])


def slow(layer, hidden, states, cross_mask, key_mask=None):
    """The formula, from the layer's projections."""
    heads = [projection(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for projection, x in (
        (layer.q_proj, hidden), (layer.k_proj, hidden), (layer.v_proj, hidden),
        (layer.k_proj, layer.cross_proj(states)), (layer.v_proj, layer.cross_proj(states)))]  # fmt: skip
    group = layer.num_heads // layer.num_kv_heads
    query, key, value, cross_key, cross_value = heads
    query, key = rotary(query, key, torch.arange(hidden.shape[1])[None])
    key, value, cross_key, cross_value = (x.repeat_interleave(group, 1) for x in (key, value, cross_key, cross_value))
    count, scale = hidden.shape[1], layer.head_dim**-0.5
    visible = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None].bool()
    own = (query @ key.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ value
    cross = (query @ cross_key.mT * scale).masked_fill(cross_mask[:, None, None] == 0, -torch.inf).softmax(-1)
    gate = layer.gate(hidden)
    gate = gate.view(1, -1, 1) if gate.dim() == 1 else gate
    return layer.o_proj((own + gate[..., None] * (cross @ cross_value)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gate", ["scalar", "head", "dynamic"])
def test_outputs_and_gradients_are_the_formulas(gate, make, inputs):
    layer = make(gate=gate)
    hidden, states, mask = inputs
    key_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    out, expected = layer(hidden, states, mask, key_mask=key_mask), slow(layer, *inputs, key_mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    found = torch.autograd.grad(out[:, 2:].square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(expected[:, 2:].square().sum(), list(layer.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_decoding_with_any_cache_is_the_whole_sequence(window, masked, make, inputs):
    layer = make(window=window, layer_idx=1, gate="dynamic")
    hidden, states, mask = inputs
    key_mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    if not masked:
        key_mask[:] = 1
    expected = layer(hidden, states, mask, key_mask=key_mask)

    def read(count):
        return key_mask[:, :count] if masked else None

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = LlamaConfig(**sizes)
    if window is not None:
        sliding.sliding_window, sliding.layer_types = window, ["sliding_attention"] * 2
    calls = []
    layer.cross_proj.register_forward_hook(lambda *_: calls.append(1))
    for cache in (FusionCache(), DynamicCache(), DynamicCache(config=sliding), StaticCache(sliding, max_cache_len=9)):
        own = isinstance(cache, FusionCache)
        prepared = layer.project_cross(states, mask)
        rest = None if own else prepared
        parts = [layer(hidden[:, :4], prepared, key_mask=read(4), cache=cache)]
        parts += [layer(hidden[:, i : i + 1], rest, key_mask=read(i + 1), cache=cache) for i in range(4, 7)]
        real = key_mask.bool()
        torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-5, rtol=0)
    assert len(calls) == 4


@torch.no_grad()
def test_two_layers_share_a_cache_and_beams_reorder_it(make, inputs):
    layers = [make(layer_idx=0), make(layer_idx=1, gate="head")]
    hidden, states, mask = inputs
    expected = layers[1](layers[0](hidden, states, mask), states, mask)
    cache = FusionCache()
    layers[1](layers[0](hidden[:, :4], states, mask, cache=cache), states, mask, cache=cache)
    swapped = torch.tensor([1, 0, 1])
    cache.reorder(swapped)
    assert cache.get_seq_length(1) == 4
    out = layers[1](layers[0](hidden[swapped, 4:], cache=cache), cache=cache)
    torch.testing.assert_close(out, expected[swapped, 4:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_of_other_layers(make, inputs):
    """Those of torch's layer are copied, those of an LLM's are used as they are; the gate starts closed."""
    hidden, states, mask = inputs
    for bias in (True, False):
        theirs = torch.nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
        torch.nn.init.normal_(theirs.out_proj.weight, std=0.2)
        if bias:
            torch.nn.init.normal_(theirs.in_proj_bias)
            torch.nn.init.normal_(theirs.out_proj.bias)
        mine = AdaptiveFusionAttention.from_multihead(theirs, cross_dim=12, causal=False)
        expected = theirs(hidden, hidden, hidden, need_weights=False)[0]
        for given in ((), (states, mask)):
            torch.testing.assert_close(mine(hidden, *given), expected, atol=1e-5, rtol=0)
    attention = LlamaAttention(
        LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"), 0
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    layer = make(projections={name: getattr(attention, name) for name in names})
    assert layer.k_proj is attention.k_proj
    layer.gate.value.zero_()
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = attention(hidden, ROTARY(hidden, torch.arange(7)[None]), causal)[0]
    torch.testing.assert_close(layer(hidden, states, mask), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="add_zero_attn"):
        AdaptiveFusionAttention.from_multihead(torch.nn.MultiheadAttention(32, 4, add_zero_attn=True))


@torch.no_grad()
def test_halves_and_autocast(make, inputs):
    hidden, states, mask = inputs
    layer = make()
    expected = layer(hidden, states, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(hidden, states, mask).float(), expected, atol=0.05, rtol=0)
    layer.rotary = lambda q, k, p: tuple(x.to(q.dtype) for x in rotary(q.float(), k.float(), p))
    layer.to(torch.bfloat16)
    out = layer(hidden.bfloat16(), states.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0)


SETTINGS = {
    "heads": ((32, 0), {}, "num_heads: got 0"),
    "groups": ((32, 4), {"num_kv_heads": 3}, "num_kv_heads: got 3, takes a divisor of num_heads, 4"),
    "width": ((30, 4), {}, "embed_dim: got 30, takes a multiple of num_heads"),
    "gate": ((32, 4), {"gate": "none"}, "gate: got 'none'"),
    "argument": ((32, 4), {"dropout": 0.1}, r"operator: got \['dropout'\], takes some of"),
    "projection": ((32, 4), {"projections": {"query": None}}, r"projections: got \['query'\]"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_wrong_settings(case):
    sizes, settings, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        AdaptiveFusionAttention(*sizes, **settings)


def test_wrong_calls(make, inputs):
    layer, (hidden, states, mask) = make(), inputs
    with pytest.raises(ValueError, match=r"hidden_states: got shape \(2, 7, 16\)"):
        layer(hidden[..., :16])
    with pytest.raises(ValueError, match=r"cross_states: got shape \(2, 7, 32\), takes \(B, T, 12\)"):
        layer(hidden, hidden)
    with pytest.raises(ValueError, match="a mask without cross_states"):
        layer(hidden, None, mask)
    with pytest.raises(ValueError, match="they bring theirs"):
        layer(hidden, layer.project_cross(states), mask)
    with pytest.raises(ValueError, match="cross_mask"):
        layer(hidden, states, mask[:, :4])
    cache = FusionCache()
    layer(hidden, states, mask, cache=cache)
    with pytest.raises(ValueError, match="with others in the cache"):
        layer(hidden[:, :1], states, mask, cache=cache)


def test_the_module_is_an_attribute_of_the_package(monkeypatch):
    monkeypatch.delitem(vars(layalign), "nn", raising=False)
    assert layalign.nn.AdaptiveFusionAttention is AdaptiveFusionAttention
    assert {"nn", "fuse", "unfuse"} <= set(layalign.__all__)
