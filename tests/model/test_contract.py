"""What users of transformers ask of any model: outputs as tuples and with states, embeddings, sizes, label counts."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from layalign import LayAlignConfig, LayAlignForConditionalGeneration
from layalign.parts import is_trained


@pytest.fixture
def labelled(batch):
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_return_dict_gives_tuples(make_model, labelled, batch):
    model = make_model()
    out = model(**labelled, use_cache=True)
    for found in (model(**labelled, use_cache=True, return_dict=False),):
        assert isinstance(found, tuple) and len(found) == len(out)
        assert found[0] == out.loss and torch.equal(found[1], out.logits)
    model.config.return_dict = False
    assert torch.equal(model(**batch)[0], model(**batch, return_dict=True).logits)
    assert torch.equal(  # which asks for an output by name
        model.generate(**batch, max_new_tokens=3), make_model().generate(**batch, max_new_tokens=3)
    )


def test_hidden_states_are_the_llms(make_model, labelled, batch):
    model = make_model("gemma2")
    for call in (batch, labelled, labelled | {"skip_logits": True}):
        assert model(**call).hidden_states is None
        states = model(**call, output_hidden_states=True).hidden_states
        assert len(states) == 3 and {tuple(state.shape) for state in states} == {(3, 13, 32)}
    out = model(**batch, output_hidden_states=True)
    head = model.get_output_embeddings()(out.hidden_states[-1]) / 30
    torch.testing.assert_close(torch.tanh(head) * 30, out.logits)
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
    found = model.generate(**batch, **settings, output_hidden_states=True, output_logits=True, output_scores=True)
    assert len(found.hidden_states) == len(found.logits) == len(found.scores) == 3
    torch.testing.assert_close(found.logits[0], out.logits[:, -1])


def test_attention_weights_are_refused_where_there_are_none(make_model, make_encoder, make_llm, batch):
    for call in (make_model(), make_model().generate):
        with pytest.raises(ValueError, match="output_attentions: the fused attention never makes"):
            call(**batch, output_attentions=True)
    llm = make_llm()
    llm.set_attn_implementation("eager")
    soft_prompts_alone = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm, aligner=None).eval()
    weights = soft_prompts_alone(**batch, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (3, 4, 13, 13)


def test_logits_lie_on_their_labels_whatever_the_padding(make_model, labelled, alone):
    """Holes and padding on either side, packed rows, and the compatible mode, whose labels are shifted."""
    model = make_model()
    out = model(**labelled)
    for row in range(3):
        single = alone(labelled, row)
        expected = model(**single).logits[0]
        real = labelled["labels"][row] != -100
        torch.testing.assert_close(out.logits[row, real], expected, atol=1e-5, rtol=1e-4)
        assert not out.logits[row, ~real].any()
        whole = model(**{name: value for name, value in single.items() if name != "labels"}).logits[0]
        torch.testing.assert_close(whole[-len(expected) - 1 : -1], expected, atol=1e-5, rtol=1e-4)
    packed = {"encoder_input_ids": torch.tensor([[5, 6, 7]]), "encoder_cu_seqlens": torch.tensor([0, 1, 3])}
    packed |= {"input_ids": torch.tensor([[8, 9, 5, 4]]), "cu_seqlens": torch.tensor([0, 3, 4])}
    packed["labels"] = torch.tensor([[-100, 9, 5, 4]])
    found = model(**packed)
    assert found.logits.shape == (1, 4, 60) and torch.equal(found.labels, packed["labels"])
    first = {"encoder_input_ids": packed["encoder_input_ids"][:, :1], "input_ids": packed["input_ids"][:, :3]}
    expected = model(**first, labels=packed["labels"][:, :3]).logits
    torch.testing.assert_close(found.logits[:, :3], expected, atol=1e-5, rtol=1e-4)
    published = make_model(published_training=True, mask_cross_padding=False)
    found = published(**labelled)
    real = found.labels != -100
    loss = torch.nn.functional.cross_entropy(found.logits[real], labelled["labels"][real])
    torch.testing.assert_close(found.loss, loss)


@pytest.mark.parametrize(
    ("settings", "bos", "counted"),
    [({}, 1, 17), ({}, None, 17), ({"adapter": None}, 1, 17), ({"adapter": None}, None, 14)],
)
def test_trainer_counts_the_labels_that_are_predicted(settings, bos, counted, make_encoder, make_llm, batch, tmp_path):
    """The label in the first column too, unless nothing stands before it: neither a beginning of sequence nor soft prompts."""
    llm = make_llm()
    llm.config.bos_token_id = bos
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm, **settings)
    real = torch.arange(7) < torch.tensor([[7], [6], [4]])
    labels = batch["input_ids"].masked_fill(~real, -100)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    found = Trainer(model, arguments)._get_num_items_in_batch([{"labels": labels}], torch.device("cpu"))
    out = model(**batch | {"attention_mask": real}, labels=labels)
    assert found == counted == (out.labels != -100).sum()


def test_embeddings_are_the_llms_and_keep_their_number_while_it_is_frozen(make_encoder, make_llm, batch, tmp_path):
    model = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm()).eval()
    boundary = model.adapter.boundary.clone()
    embeddings = model.get_input_embeddings()
    assert model.resize_token_embeddings() is model.resize_token_embeddings(60) is embeddings
    for wanted in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=r"resize_token_embeddings: got (70|64) tokens, the frozen LLM has 60"):
            model.resize_token_embeddings(**wanted)
    head = torch.nn.Linear(32, 60, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.llm.lm_head is head

    trained = LayAlignForConditionalGeneration.from_bases(make_encoder(), make_llm(), train_llm=True)
    assert trained.resize_token_embeddings(70).weight.shape == (70, 32)
    assert trained.llm.config.vocab_size == trained.config.llm_config.vocab_size == 70
    assert trained(**batch).logits.shape[-1] == 70 and trained.adapter.boundary.shape == boundary.shape
    new = batch | {"input_ids": torch.full_like(batch["input_ids"], 69)}
    trained(**new, labels=new["input_ids"]).loss.backward()
    assert (
        trained.get_input_embeddings().weight.grad[69].any() and trained.get_output_embeddings().weight.grad[69].any()
    )
    trained.save_pretrained(tmp_path)
    loaded = LayAlignForConditionalGeneration.from_pretrained(tmp_path, encoder=trained.encoder)
    with torch.no_grad():
        assert torch.equal(loaded(**new).logits, trained.eval()(**new).logits)
    with pytest.raises(ValueError, match=r"load_state_dict: the trained LLM is not among the weights, it is in llm/"):
        part = {name: value for name, value in trained.trained_state_dict().items() if is_trained(name)}
        trained.load_state_dict(part, strict=False)


def test_sizes_dtype_and_settings(make_model, tmp_path):
    model = make_model()
    assert model.num_parameters(only_trainable=True) == model.num_trained_parameters
    assert model.num_parameters() == sum(own.numel() for own in model.parameters())
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert LayAlignConfig.from_pretrained(tmp_path).adapter == "mlp"
    missing, unexpected = model.load_state_dict({**model.trained_state_dict()}, strict=False)
    assert missing == unexpected == []
    part = {name: value for name, value in model.trained_state_dict().items() if "boundary" not in name}
    assert model.load_state_dict(part, strict=False).missing_keys == ["adapter.boundary"]
