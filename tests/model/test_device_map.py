"""A device map: where the LLM's layers are then, that all else is where it reads its inputs, and that answers stay the same."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from layalign import LayAlignForConditionalGeneration
from layalign.spreading import gather_parts
from tests.tiny_models import MAP

MODELS = LayAlignForConditionalGeneration


def test_a_map_of_one_device_places_everything(pair, model_folder, ids, logits):
    for place in ("cpu", torch.device("cpu"), {"": "cpu"}, {"llm": "cpu", "encoder": "cpu"}, "auto", "sequential"):
        model = MODELS.from_pretrained(model_folder, device_map=place)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        with torch.no_grad():
            assert torch.equal(model(**ids).logits, logits)
    assert MODELS.from_bases(**pair, device_map="cpu").device.type == "cpu"


@pytest.mark.parametrize("names", ["of the LLM", "of the model"])
def test_layers_on_the_disk_give_the_same_logits(names, model_folder, ids, logits, tmp_path):
    places = MAP if names == "of the LLM" else {f"llm.{name}": place for name, place in MAP.items()}
    model = MODELS.from_pretrained(model_folder, device_map=places, offload_folder=tmp_path / "off")
    first, second = model.llm.model.layers
    assert second.self_attn.k_proj.weight.is_meta and not first.self_attn.k_proj.weight.is_meta
    assert model.hf_device_map["llm.model.layers.1"] == "disk"
    trained = {parameter.device.type for _, parameter in model.trained_parameters()}
    assert trained == {"cpu"}, "what is trained stays in memory"
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, logits, atol=1e-5, rtol=1e-5)
    generated = [
        one.generate(**ids, max_new_tokens=4, do_sample=False) for one in (model, MODELS.from_pretrained(model_folder))
    ]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(MODELS.from_pretrained(tmp_path / "again")(**ids).logits, logits)


def test_the_embeddings_on_the_disk_and_what_does_not_fit(pair, model_folder, ids, logits, tmp_path):
    places = MAP | {"model.embed_tokens": "disk"}
    given = {"device_map": places, "offload_folder": tmp_path / "off"}
    model = MODELS.from_pretrained(model_folder, **given)
    assert model.llm.get_input_embeddings().weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, logits, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    fresh = MODELS.from_bases(**pair, **given)
    torch.manual_seed(0)
    assert torch.equal(fresh.adapter.boundary, MODELS.from_bases(**pair).adapter.boundary)
    size = sum(parameter.nbytes for parameter in model.llm.parameters())
    split = MODELS.from_pretrained(
        model_folder, device_map="auto", max_memory={"cpu": int(size * 0.6)}, offload_folder=tmp_path / "auto"
    )
    assert "disk" in split.hf_device_map.values() and any(parameter.is_meta for parameter in split.llm.parameters())
    with torch.no_grad():
        torch.testing.assert_close(split(**ids).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"lora": {"rank": 2}}, {"train_llm": True}])
def test_what_lies_on_the_disk_answers_and_is_not_trained(settings, pair, ids, tmp_path):
    given = {"device_map": MAP, "offload_folder": tmp_path / "off"}
    with pytest.raises(ValueError, match="offloaded by its device_map, where they cannot be trained"):
        MODELS.from_bases(**pair, **settings, **given)
    model = MODELS.from_bases(**pair, **settings).eval()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    loaded = MODELS.from_pretrained(tmp_path / "model", **given)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, model(**ids).logits, atol=1e-5, rtol=1e-5)


def test_all_else_goes_where_the_llm_reads_its_inputs_and_gates_to_their_layers(make_encoder, make_llm):
    """Here is one device with memory, so that the others are "meta"."""
    llm = make_llm()
    for module in (llm.get_input_embeddings(), llm.model.layers[1].self_attn.k_proj):
        module._hf_hook = AlignDevicesHook(execution_device="meta")
    model = MODELS.from_bases(make_encoder(), llm)
    gates = [layer.self_attn.fusion_gate.value.device.type for layer in llm.model.layers]
    assert gates == ["cpu", "meta"]
    gather_parts(model)
    for part in (model.encoder, model.adapter, model.aligner):
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in llm.model.layers[0].mlp.parameters()} == {"cpu"}
