"""LLM families beyond the table: what the swap reaches, a family of one's own, arguments that a layer keeps, learned positions."""

import threading

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb

from layalign import LayAlignForConditionalGeneration, families
from layalign.families import KeyValueLayout
from layalign.projections import attention_modules
from tests.model.llm_cells import batch_of, build, encoder, joined, near, row_of
from tests.model.llm_families import JOINED
from tests.model.slow_model import slow_logits


def gates(model):
    return [own for name, own in model.trained_parameters() if "fusion_gate" in name]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "stablelm"])
@torch.no_grad()
def test_cross_attention_reaches_every_layer(family):
    """Each layer's gate alone changes the logits, and with all gates at 0 the aligner has no influence at all."""
    model, batch = joined(encoder(), build(JOINED[family])), batch_of()
    for gate in gates(model):
        gate.zero_()
    closed = model(**batch)
    model.aligner.project.bias.add_(1)
    assert torch.equal(model(**batch).logits, closed.logits)
    for gate in gates(model):
        gate.fill_(0.5)
        assert (model(**batch).logits - closed.logits)[closed.attention_mask].abs().max() > 1e-3
        gate.zero_()


class OddAttention(nn.Module):
    """Names of its own, keys that are normed and scaled, and values before keys."""

    def __init__(self, attention: LlamaAttention):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = attention.config, attention.layer_idx, attention.head_dim
        self.wq, self.wk, self.wv, self.wo = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.ln = LlamaRMSNorm(self.head_dim)
        nn.init.uniform_(self.ln.weight, 0.5, 1.5)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        query, key, value = (
            made(hidden_states).unflatten(-1, (-1, self.head_dim)) for made in (self.wq, self.wk, self.wv)
        )
        query, key, value = query.transpose(1, 2), 3 * self.ln(key).transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.wo(out.flatten(2)), weights


def odd_llm():
    llm = build(JOINED["llama"])
    for layer in llm.model.layers:
        layer.self_attn = OddAttention(layer.self_attn)
    return llm


def tripled(attention, keys, values):
    return 3 * keys, values


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(families, "_LAYOUTS", dict(families._LAYOUTS))


def test_a_family_of_ones_own(registry):
    batch = batch_of()
    with pytest.raises(ValueError, match=r"OddAttention: no k_proj/v_proj.*families.register"):
        joined(encoder(), odd_llm())
    for wrong in (KeyValueLayout(("wk", "wv")), KeyValueLayout(("wk", "wv"), key_norm="ln")):
        families.register(OddAttention, wrong)
        with pytest.raises(ValueError, match="OddAttention: LayAlign would make other keys"):
            families.check(odd_llm())
        with pytest.raises(ValueError, match="OddAttention: LayAlign would make other keys"), torch.no_grad():
            joined(encoder(), odd_llm())(**batch)
    families.register("OddAttention", KeyValueLayout(("wv", "wk"), key_norm="ln", adjust=tripled))
    with pytest.raises(ValueError, match=r"other (keys|values)"):
        families.check(odd_llm())
    families.register("OddAttention", KeyValueLayout(("wk", "wv"), key_norm="ln", adjust=tripled))
    llm = odd_llm().train()
    families.check(llm)
    assert llm.training and llm.config._attn_implementation == "sdpa"
    model = joined(encoder(), llm)
    with torch.no_grad():
        out = model(**batch)
        assert near(out.logits[out.attention_mask], slow_logits(model, batch)[out.attention_mask])
    wanted = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **wanted), model.generate(**batch, **wanted, use_cache=False))


def test_wrong_layouts_are_refused(registry):
    with pytest.raises(ValueError, match="order: got 'mixed', takes one of apart, joined, by_head"):
        KeyValueLayout(order="mixed")
    for names, order in ((("k",), "apart"), ("qkv", "joined"), (("k", "v"), "by_head")):
        with pytest.raises(ValueError, match=f"names: order '{order}' takes"):
            KeyValueLayout(names, order)
    for attention, layout in ((OddAttention, "wk"), (OddAttention, KeyValueLayout), (3, KeyValueLayout())):
        with pytest.raises(ValueError, match="takes a"):
            families.register(attention, layout)
    families.register(OddAttention, KeyValueLayout(("wk", "wx")))
    with pytest.raises(ValueError, match="OddAttention has no wx"):
        joined(encoder(), odd_llm())


def test_a_class_that_only_looks_known_is_refused():
    """Its modules have Llama's names; a factor is in its code alone."""

    class ScaledAttention(LlamaAttention):
        def forward(self, *args, **kwargs):
            kept, self.v_proj.forward = self.v_proj.forward, lambda x: 2 * nn.functional.linear(x, self.v_proj.weight)
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.v_proj.forward = kept

    llm = build(JOINED["llama"])
    for attention in attention_modules(llm).values():
        attention.__class__ = ScaledAttention
    with pytest.raises(ValueError, match="ScaledAttention: LayAlign would make other values"), torch.no_grad():
        joined(encoder(), llm)(**batch_of())


def gradients(model, batch):
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()(**batch, labels=labels).loss.backward()
    return [own.grad.clone() for _, own in model.trained_parameters()]


@pytest.mark.parametrize("gate", ["scalar", "dynamic"])
def test_a_layer_that_keeps_its_arguments(gate):
    """StableLM's: with checkpointing its gradients are the same, and two forward passes before a backward see their own states."""
    torch.manual_seed(4)
    model = LayAlignForConditionalGeneration.from_bases(encoder(), build(JOINED["stablelm"]), gate=gate)
    with torch.no_grad():
        for own in gates(model):
            own.normal_()
    batch = batch_of()
    expected = gradients(model, batch)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # its name from 5.23 on
    enable()
    for one, other in zip(gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(one, other)
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = model(**batch, labels=labels).loss
    other = {"encoder_input_ids": batch["encoder_input_ids"].flip(1), "input_ids": batch["input_ids"]}
    model(**other)
    first.backward()
    for (_, own), gradient in zip(model.trained_parameters(), expected, strict=True):
        torch.testing.assert_close(own.grad, gradient)


@torch.no_grad()
def test_a_layer_that_keeps_its_arguments_in_two_threads():
    model, batch = joined(encoder(), build(JOINED["stablelm"])), batch_of()
    rows = [row_of(batch, index) for index in (0, 1)]
    expected, found = [model(**row).logits for row in rows], [[], []]

    def run(index):
        with torch.no_grad():
            found[index] += [model(**rows[index]).logits for _ in range(20)]

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(found[index]) == 20 and all(torch.equal(one, expected[index]) for one in found[index])


# With a bos token, 6 soft prompts and a boundary before 7 tokens of text a row of `batch_of` has 15 at most.
@pytest.mark.parametrize(
    ("family", "setting"),
    [("gpt2", "n_positions"), ("opt", "max_position_embeddings"), ("biogpt", "max_position_embeddings")],
)
@torch.no_grad()
def test_no_more_tokens_than_the_llm_has_positions(family, setting):
    kind, config, settings = JOINED[family]
    batch = batch_of()
    row = {"encoder_input_ids": batch["encoder_input_ids"][:1], "input_ids": batch["input_ids"][:1]}
    model = joined(encoder(), build((kind, config, settings | {setting: 15})))
    assert model.llm_limit == 15 and joined(encoder(), build(JOINED["llama"])).llm_limit is None
    assert model(**row).logits.shape[1] == 15
    wanted = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(**row, **wanted, max_new_tokens=1).shape == (1, 1), "the last token is not read"
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(
            ValueError, match="max_new_tokens: got 2 after 15 tokens, the LLM takes 15 in all; at most 1"
        ):
            model.generate(**row, **wanted, **cache, max_new_tokens=2)
    longer = row | {"input_ids": torch.cat([row["input_ids"], row["input_ids"][:, :1]], 1)}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"the LLM would read 16 tokens in a row .* it takes 15"):
            call(**longer)
    ends = {"encoder_cu_seqlens": torch.tensor([0, 6]), "cu_seqlens": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match="the LLM would read 16 tokens"):
        model(**longer, **ends)
    # Padding counts for nothing, nor does what other sequences of a packed row read.
    padded = longer | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])}
    assert model(**padded).logits.shape[1] == 14
    two = {name: torch.cat([row[name], row[name]], 1) for name in row}
    ends = {"encoder_cu_seqlens": torch.tensor([0, 6, 12]), "cu_seqlens": torch.tensor([0, 7, 14])}
    assert model(**two, **ends).logits.shape[1] == 30
    out = model(**row, use_cache=True)
    cross = model.encode(row["encoder_input_ids"]).cross()
    with pytest.raises(ValueError, match="the LLM would read 16 tokens"):
        model(input_ids=row["input_ids"][:, :1], past_key_values=out.past_key_values, cross=cross)
