"""Packed rows: the loss and the gradients of padded ones, and nothing of one sequence in another."""

import pytest
import torch
import transformers

from layalign import LayAlignForConditionalGeneration, label_loss, packing
from layalign.sequence import Lengths
from tests.model.packed_rows import LENGTHS, assert_same, packed, step

CASES = [
    *(
        {"llm": family}
        for family in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite"]
    ),
    *({"llm": family} for family in ["gpt2", "gpt_neox"]),
    *({"encoder": family} for family in ["xlmr", "bert", "m2m100", "qwen2", "xglm"]),
    {"llm": "gemma2", "encoder": "xlmr", "gate": "head"},
    {"gate": "dynamic"},
    {"aligner": "mlp", "llm": "gpt2"},
    {"encoder_states": "mean"},
    {"adapter": None},
    {"adapter": "linear", "aligner": None},
    {"llm": "gemma3", "aligner": None},
    {"llm": "qwen3", "train_llm": True},
    {"llm": "phi3", "train_llm": True},
    {"lora": {"rank": 2}},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["chunked", "whole"])
def test_loss_and_gradients_are_those_of_padded_rows(case, training, make_model, uneven, monkeypatch):
    if "lora" in case:
        pytest.importorskip("peft")
    monkeypatch.setattr(label_loss, "CPU_LOGITS", 3 * 60)  # three label positions at a time
    monkeypatch.setattr(packing, "CPU_CALL_TOKENS", 3)
    model = make_model(**case)
    expected = step(model, uneven)
    model.train(training)
    assert_same(step(model, packed(uneven)), expected)
    assert_same(step(model, uneven), expected)


def test_logits_are_those_of_each_example_alone(make_model, uneven, alone):
    model = make_model("mistral")
    row = packed(uneven)
    del row["labels"]
    with torch.no_grad():
        out = model(**row)
        for index in range(len(LENGTHS)):
            single = alone(uneven, index)
            single.pop("labels")
            begin, end = out.cu_seqlens[index : index + 2].tolist()
            torch.testing.assert_close(out.logits[0, begin:end], model(**single).logits[0], atol=1e-5, rtol=0)
        assert end == out.logits.shape[1]


@pytest.mark.parametrize("settings", [{"lora": {"rank": 2}}, {"train_llm": True}], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["with an encoder", "an LLM alone"])
def test_lora_and_the_whole_llm_get_the_same_gradients(settings, alone, make_llm, make_encoder, uneven, monkeypatch):
    """A trained output layer makes its logits once more in the backward pass."""
    monkeypatch.setattr(label_loss, "CPU_LOGITS", 3 * 60)
    torch.manual_seed(8)
    model = LayAlignForConditionalGeneration.from_bases(None if alone else make_encoder(), make_llm(), **settings)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if "lora" in name or "fusion_gate" in name:
                parameter.normal_(std=0.3)
    model.eval()
    expected = step(model, uneven)
    model.train()
    assert_same(step(model, packed(uneven)), expected)
    assert_same(step(model, uneven), expected)


def test_checkpointing_changes_nothing(make_model, uneven):
    model = make_model("gemma2").train()
    expected = step(model, packed(uneven))
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
        model.gradient_checkpointing_enable()
    )
    assert_same(step(model, packed(uneven)), expected, 1e-7)


def test_under_autocast_the_difference_is_rounding(make_model, uneven):
    """Against fp32, packed bf16 is as near as padded bf16 is."""
    model = make_model("qwen3").train()
    exact = step(model, uneven)
    with torch.autocast("cpu", torch.bfloat16):
        of_padded, of_packed = step(model, uneven), step(model, packed(uneven))
    for right, one, other in zip(exact, of_padded, of_packed, strict=True):
        spread = (one - right).norm().item()
        assert (other - right).norm().item() <= 2 * spread + 1e-2 * right.norm().item()


@pytest.mark.parametrize("case", [{}, {"llm": "gemma2"}, {"gate": "dynamic"}, {"aligner": None}], ids=str)
@pytest.mark.parametrize("where", ["llm", "encoder"])
def test_nan_in_one_sequence_reaches_no_other(case, where, make_model, uneven):
    """The embedding of one token is NaN, and only the third example has it."""
    model = make_model(**case)
    odd = uneven["encoder_input_ids"] if where == "encoder" else uneven["input_ids"]
    token = 49 if where == "encoder" else 59
    odd[odd == token] = 5
    clean = packed(uneven)
    odd[2, 1] = token
    spoilt = packed(uneven)
    for batch in (clean, spoilt):
        del batch["labels"]
    base = model.encoder if where == "encoder" else model.llm
    head = model.llm.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # not the input embedding
    with torch.no_grad():
        base.get_input_embeddings().weight[token] = torch.nan
        expected = model(**clean)
        out = model(**spoilt)
    begin, end = out.cu_seqlens[2:4].tolist()
    assert out.logits[0, begin:end].isnan().any()
    for part in (slice(begin), slice(end, None)):
        assert torch.equal(out.logits[0, part], expected.logits[0, part])


def test_gradients_of_a_sequence_without_labels_are_zero(make_model, uneven):
    """Nor does a sequence's loss reach another one's embeddings."""
    model = make_model("gemma3")
    batch = packed(uneven)
    ends = batch["cu_seqlens"].tolist()
    batch["labels"][0, : ends[2]] = -100
    batch["labels"][0, ends[3] :] = -100
    seen = []
    model.llm.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(**batch)
    row = seen[-1]
    (gradient,) = torch.autograd.grad(out.loss, row)
    begin, end = out.cu_seqlens[2:4].tolist()
    assert gradient[0, begin:end].abs().sum() > 0
    assert gradient[0, :begin].abs().sum() == 0 and gradient[0, end:].abs().sum() == 0


def test_lengths_may_be_told(make_model, uneven):
    model = make_model()
    told = Lengths([q for q, _, _ in LENGTHS], [t for _, t, _ in LENGTHS])
    assert torch.equal(model(**packed(uneven), lengths=told).loss, model(**packed(uneven)).loss)


def test_empty_questions_texts_and_labels(make_model):
    """An empty question is a prompt alone, and a row without a label has the loss 0 and gradients that are 0."""
    model = make_model().train()
    batch = {
        "encoder_input_ids": torch.tensor([[5, 6, 7]]),
        "encoder_cu_seqlens": torch.tensor([0, 0, 3, 3], dtype=torch.int32),
        "input_ids": torch.tensor([[8, 9, 10]]),
        "cu_seqlens": torch.tensor([0, 2, 2, 3], dtype=torch.int32),
    }
    with torch.no_grad():
        out = model(**batch)
    assert out.cu_seqlens.tolist() == [0, 4, 9, 12]
    assert out.logits.isfinite().all()
    found = step(model, batch | {"labels": torch.full((1, 3), -100)})
    assert all(part.abs().sum() == 0 for part in found)
    with torch.no_grad():
        out = model(torch.tensor([[8]]), encoder_input_ids=torch.zeros(1, 0, dtype=torch.long), cu_seqlens=torch.tensor([0, 1]),
                    encoder_cu_seqlens=torch.tensor([0, 0]))  # fmt: skip
    assert out.logits.isfinite().all()


def test_what_is_first_in_its_sequence_is_predicted_by_nothing(make_model, uneven, monkeypatch):
    """Without bos and adapter a sequence's first token has no position before it; the one in the row is another sequence's."""
    model = make_model(adapter=None)
    model.config.get_text_config().bos_token_id = None
    model.llm.config.bos_token_id = None
    uneven["labels"] = uneven["input_ids"].masked_fill(uneven["attention_mask"] == 0, -100)
    batch = packed(uneven)
    out = model(**batch)
    assert (out.labels != -100).sum() == batch["labels"].numel() - len(LENGTHS)


def wrong(batch):
    """(what to change, what is said)"""
    ends, questions = batch["cu_seqlens"], batch["encoder_cu_seqlens"]
    return [
        ({"cu_seqlens": None}, "cu_seqlens is missing"),
        ({"encoder_cu_seqlens": None}, "encoder_cu_seqlens is missing"),
        ({"input_ids": None, "labels": None}, "input_ids is missing"),
        ({"cu_seqlens": ends[:-1]}, r"same n as of the encoder's \(5\), got \(5,\)"),
        ({"cu_seqlens": ends.float()}, "got .* of torch.float32"),
        ({"cu_seqlens": ends + 1}, "must start at 0"),
        ({"cu_seqlens": ends.flip(0)}, "must start at 0, never fall"),
        ({"encoder_cu_seqlens": questions.clamp(max=20)}, "end at 27, the tokens of encoder_input_ids"),
        ({"input_ids": batch["input_ids"].repeat(2, 1)}, r"must be one row, \(1, tokens\), got \(2, 33\)"),
        ({"labels": batch["labels"][:, 1:]}, "labels must have the shape"),
        ({"input_ids": batch["input_ids"] + 100}, "the vocabulary has 60"),
        ({"encoder_input_ids": batch["encoder_input_ids"] - 100}, "the vocabulary has 50"),
        ({"attention_mask": torch.ones(1, 33)}, "do not give masks"),
        ({"use_cache": True}, "no cache"),
        ({"lengths": Lengths([1], [1])}, "must start at 0, never fall"),
        ({"encoder_cu_seqlens": questions[:1], "cu_seqlens": ends[:1]}, "must start at 0"),
    ]


@pytest.mark.parametrize("number", range(16))
def test_malformed_inputs_are_refused(number, make_model, uneven):
    batch = packed(uneven)
    change, message = wrong(batch)[number]
    with pytest.raises(ValueError, match=message):
        make_model()(**batch | change)


def test_settings_about_padding_are_refused(make_model, uneven):
    for setting in ({"published_training": True}, {"mask_cross_padding": False}):
        with pytest.raises(ValueError, match="packed rows have none"):
            make_model(**setting)(**packed(uneven))


def test_too_long_for_the_encoder(make_model, uneven):
    model = make_model(encoder="bert")
    model.encoder_limit = 10
    with pytest.raises(ValueError, match="has 11 tokens in a sequence, the encoder takes 10"):
        model(**packed(uneven))


def test_an_llm_that_reads_across_sequences_is_refused(make_encoder, make_llm, uneven):
    """A convolution in a layer, as hybrids have it, and positions that go on."""
    llm = make_llm()

    def shifted(module, args, kwargs, output):
        return output + output.roll(1, dims=1)

    llm.model.layers[0].mlp.register_forward_hook(shifted, with_kwargs=True)
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)
    with pytest.raises(ValueError, match="does not keep the sequences of a packed row apart"):
        model(**packed(uneven))

    llm = make_llm("gpt2")
    forward = llm.transformer.forward
    llm.transformer.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)
    with pytest.raises(ValueError, match="positions that go on"):
        model(**packed(uneven))


def test_a_hybrid_of_attention_and_recurrence_is_refused(make_encoder, uneven):
    config = transformers.FalconH1Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    llm = transformers.FalconH1ForCausalLM(config).eval()
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm)
    model(**uneven)  # padded rows are no trouble
    with pytest.raises(ValueError, match="FalconH1ForCausalLM does not keep the sequences"):
        model(**packed(uneven))


def test_generation_afterwards(make_model, uneven, alone):
    """A packed step leaves the model as it was, also where it had no use of LayAlign's attention."""
    for case in ({}, {"aligner": None}):
        model = make_model(**case)
        prompt = {
            key: value[:, :4] if key == "input_ids" else value
            for key, value in alone(uneven, 0).items()
            if key != "labels"
        }
        arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(**prompt, **arguments)
        model.train()
        model(**packed(uneven)).loss.backward()
        assert torch.equal(model.eval().generate(**prompt, **arguments), expected)


@pytest.mark.parametrize("call_tokens", [0, 3, 1000])
def test_groups_of_like_length_are_the_cheapest(call_tokens):
    """Against all ways to cut the sorted lengths."""
    lengths = [7, 1, 3, 0, 12, 3, 2, 7]
    groups = packing.alike(lengths, call_tokens)
    assert sorted(index for group in groups for index in group.tolist()) == [0, 1, 2, 4, 5, 6, 7]
    cost = sum(call_tokens + len(group) * max(lengths[index] for index in group) for group in groups)
    ordered = sorted(length for length in lengths if length)
    ways = []
    for cuts in range(2 ** (len(ordered) - 1)):
        ends = [place + 1 for place in range(len(ordered) - 1) if cuts >> place & 1] + [len(ordered)]
        begins = [0, *ends[:-1]]
        ways.append(sum(call_tokens + (b - a) * ordered[b - 1] for a, b in zip(begins, ends, strict=True)))
    assert cost == min(ways)
