"""A pickled model is a model of its own with the same answers, or what cannot be pickled says what to do instead."""

import copy
import io
import pickle

import pytest
import torch

from layalign import LayAlignForConditionalGeneration
from layalign.spreading import spread
from tests.tiny_models import MAP

SETTINGS = {
    "llama": {"gate": "dynamic", "adapter": "gelu"},
    "gpt2": {"gate": "head", "aligner": "mlp"},
    "gemma2": {"lora": {"rank": 2}},
    "qwen3": {"aligner": None},
    "phi3": {"train_llm": True},
}


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state(model):
    """What of a model is neither weight nor setting: modes, hooks, what is trained and what is one tensor."""
    own = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return (
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [own.index(parameter) for parameter in own],
    )


@pytest.mark.parametrize("way", [lambda m: pickle.loads(pickle.dumps(m)), saved_by_torch], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("family", SETTINGS)
def test_a_pickled_model_answers_alike_and_is_of_its_own(family, way, make_model, batch):
    model = make_model(family, **SETTINGS[family])
    labelled = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)  # after which transformers' hooks are on the LLM too
    tokens = model.generate(**batch, max_new_tokens=3, cache_implementation="static")
    twin = way(model)
    assert type(twin) is type(model) and twin.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, expected.logits)
        found = twin(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(found, expected.hidden_states, strict=True))
    assert torch.equal(twin.generate(**batch, max_new_tokens=3, cache_implementation="static"), tokens)
    assert state(twin) == state(model)
    assert not {id(own) for own in model.parameters()} & {id(own) for own in twin.parameters()}
    twin.train()(**labelled).loss.backward()
    torch.optim.SGD([own for own in twin.parameters() if own.requires_grad], lr=0.5).step()
    with torch.no_grad():
        assert not torch.equal(twin.eval()(**batch).logits, expected.logits)
        assert torch.equal(model(**batch).logits, expected.logits)


def test_a_model_on_anothers_llm_is_pickled_alone(make_model, make_encoder, batch):
    first = make_model("llama", gate="head")
    second = LayAlignForConditionalGeneration.from_bases(make_encoder(), first.llm, llm_layers=[1]).eval()
    with torch.no_grad():
        for model in (first, second):
            assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, model(**batch).logits)
    pickle.loads(pickle.dumps(second)).train_only(["llm"])  # of an LLM that no other model answers with


def test_what_cannot_be_pickled_says_what_to_do(make_model, batch, tmp_path):
    model = make_model()
    expected = model(**batch).logits
    spread(model, device_map=MAP, offload_folder=tmp_path)
    with pytest.raises(pickle.PicklingError, match="offloaded cannot be pickled; save it by save_pretrained and load"):
        pickle.dumps(model)
    assert torch.equal(model(**batch).logits, expected)
    partition = make_model()
    partition.llm.lm_head.weight.ds_id = 0  # ZeRO-3's mark
    with pytest.raises(pickle.PicklingError, match="several processes hold together cannot be pickled; save it by"):
        saved_by_torch(partition)
    assert torch.equal(copy.deepcopy(make_model())(**batch).logits, expected)
