"""Settings of the paper's ablations and larger parts: no gate, wider adapter and aligner, and Table 10's counts of parameters."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, MT5Config

from layalign import LayAlignConfig, LayAlignForConditionalGeneration
from layalign.modules import Adapter
from layalign.parts import part_of
from layalign.projections import attention_modules
from layalign.published import write_published
from layalign.serving.settings import check_served
from tests.model.slow_model import slow_logits

SETTINGS = [
    {"gate": None},
    {"adapter_width": 40},
    {"aligner_width": 40},
    {"aligner_width": 8, "encoder_states": "mean"},
]


def named(settings):
    return ",".join(f"{key}={value}" for key, value in settings.items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_logits_are_the_slow_formulas(settings, family, make_model, batch, alone):
    """Folded where the aligner can be, and not."""
    model = make_model(family, **settings)
    one = alone(batch, 2)
    one["encoder_attention_mask"] = torch.ones_like(one["encoder_input_ids"])
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    expected = slow_logits(model, one)
    for fold in (True, False):
        model.config.fold_at_inference = fold
        with torch.no_grad():
            torch.testing.assert_close(model(**one).logits, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        folded = model.aligner.folded_weights(model._projections, torch.float32)
    assert (folded is None) == ("aligner_width" in settings)


def test_a_wider_aligners_gradients(make_model, batch):
    """Against the formula by torch's own operations."""
    model = make_model(aligner_width=20, aligner="linear").train()
    aligner, modules = model.aligner, attention_modules(model.llm)
    assert [tuple(layer.weight.shape) for layer in (aligner.inner, aligner.project)] == [(20, 24), (32, 20)]
    states = [torch.randn(2, 5, 24) for _ in model.config.mixed_states]
    mixed = torch.einsum("je,ebtd->jbtd", aligner.mix.weight, torch.stack(states))
    mixed = F.relu(mixed + aligner.mix.bias[:, None, None, None])
    streams = aligner.project(F.silu(aligner.inner(mixed)))
    expected = [(modules[i].k_proj(streams[2 * i]), modules[i].v_proj(streams[2 * i + 1])) for i in range(2)]
    made = aligner(states, model._projections, torch.float32)
    weights = [torch.randn_like(part) for part in made]
    parameters = dict(aligner.named_parameters())

    def gradients(keys, values):
        total = (keys * weights[0]).sum() + (values * weights[1]).sum()
        return torch.autograd.grad(total, list(parameters.values()))

    by_hand = [torch.stack(parts) for parts in zip(*expected, strict=True)]
    for part, wanted in zip(made, by_hand, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-4)
    for name, own, wanted in zip(parameters, gradients(*made), gradients(*by_hand), strict=True):
        assert wanted.abs().sum() > 0, name
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "activation"), [("mlp", F.relu), ("gelu", F.gelu)])
def test_a_wider_adapter(kind, activation):
    adapter = Adapter(kind, 6, 10, 17)
    state = torch.randn(2, 3, 6)
    assert adapter.linear1.weight.shape == (17, 6)
    expected = adapter.linear2(activation(adapter.linear1(state)))
    torch.testing.assert_close(adapter(state), expected)


def test_without_a_gate_the_cross_term_counts_whole(make_model, batch):
    """Nothing of a gate is trained or saved, and the first loss is not the bare LLM's."""
    model = make_model(gate=None)
    assert torch.equal(model.gates(), torch.ones(2, 1))
    assert {part_of(name) for name, _ in model.trained_parameters()} == {"adapter", "aligner"}
    assert not any("fusion_gate" in name for name in model.trained_state_dict())
    gated = make_model(gate="scalar")
    missing = gated.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all("fusion_gate" in name for name in missing)
    with torch.no_grad():
        for name, parameter in gated.trained_parameters():
            if "fusion_gate" in name:
                parameter.fill_(1.0)
        torch.testing.assert_close(model(**batch).logits, gated(**batch).logits)
    with pytest.raises(ValueError, match="this model has no gates; it has adapter, aligner"):
        model.train_only(["gates"])


WRONG = [
    ({"adapter_width": 0}, "adapter_width must be a positive whole number or None, got 0"),
    ({"aligner_width": True}, "aligner_width must be a positive whole number or None, got True"),
    ({"aligner_width": 2.5}, "aligner_width must be a positive whole number or None, got 2.5"),
    ({"adapter_width": 8, "adapter": "linear"}, "inside the adapter 'mlp' or 'gelu'; adapter is 'linear'"),
    ({"adapter_width": 8, "adapter": None}, "inside the adapter 'mlp' or 'gelu'; adapter is None"),
    ({"aligner_width": 8, "aligner": "mlp"}, "aligner_width: got 8, which is a width inside the aligner 'linear'"),
    ({"aligner_width": 8, "aligner": None}, "inside the aligner 'linear'; aligner is None"),
    ({"gate": "no"}, "gate must be one of ('scalar', 'head', 'dynamic', None), got 'no'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[named(settings) for settings, _ in WRONG])
def test_wrong_widths_are_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        LayAlignConfig(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["adapter", "aligner", "gate"])
def test_none_in_words(name):
    """As a command line says it: model.gate=none."""
    assert getattr(LayAlignConfig(**{name: "none"}), name) is None
    changed = LayAlignConfig()
    setattr(changed, name, "none")
    changed.checked()
    assert getattr(changed, name) is None


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=named)
def test_who_cannot_take_them_says_so(settings, make_model, tmp_path):
    model = make_model(**settings)
    with pytest.raises(ValueError, match="the published format holds"):
        write_published(tmp_path / "file.bin", model.config, model.encoder, model.llm, model.trained_state_dict())
    if model.config.gate is None:
        with pytest.raises(ValueError, match=r"vLLM: .* not served"):
            check_served(model.config)
    else:
        check_served(model.config)


# Table 10, in millions: adapter, aligner, all that is trained.
TABLE_10 = {
    "LayAlign": ({}, "25.18", "8.39", "33.57"),
    "LayAlign+": ({"aligner_width": 2048}, "25.18", "12.59", "37.77"),
    "MindMerger": ({"aligner": None}, "25.18", "0.00", "25.18"),
    "MindMerger+": ({"aligner": None, "adapter_width": 6144}, "37.76", "0.00", "37.76"),
}


@pytest.mark.parametrize("row", TABLE_10)
def test_parameters_of_table_10(row):
    """Over the shapes of mT5-xl and a 7B Llama, without a weight."""
    settings, *expected = TABLE_10[row]
    encoder = MT5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, vocab_size=250112)
    config = LayAlignConfig(encoder_config=encoder, llm_config=LlamaConfig(), **settings)
    with torch.device("meta"):
        model = LayAlignForConditionalGeneration(config)
    parts = {"adapter": 0, "aligner": 0, "gates": 0}
    for name, parameter in model.trained_parameters():
        parts[part_of(name)] += parameter.numel()
    assert parts["gates"] == (32 if model.aligner is not None else 0)
    millions = [f"{count / 1e6:.2f}" for count in (parts["adapter"], parts["aligner"], sum(parts.values()))]
    assert millions == expected
