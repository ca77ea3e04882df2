"""accelerate's hooks on the whole model: weights on the CPU or on disk, brought for each call."""

import pytest
import torch
from safetensors.torch import load_file

from layalign import LayAlignForConditionalGeneration

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def to_cpu(model, folder):
    return accelerate.cpu_offload(model, CPU)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, CPU)


def in_parts(model, folder):
    places = {"encoder": "cpu", "adapter": "disk", "aligner": "disk", "llm": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def trained_part(model, folder):
    """Of a linear aligner whose layers' projections are at hand, so that they would be folded."""
    accelerate.cpu_offload(model.adapter, CPU)
    accelerate.cpu_offload(model.aligner, CPU)
    return model


def spread(model, folder):
    whole = model._no_split_modules
    places = accelerate.infer_auto_device_map(model, {"cpu": 60_000, "disk": 10**9}, no_split_module_classes=whole)
    assert {"cpu", "disk"} <= set(places.values()) and len(places) > 4
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    ("offload", "family", "settings"),
    [
        (to_cpu, "gemma2", {"encoder_states": "mean", "adapter": "linear"}),
        (to_disk, "gpt2", {"gate": "dynamic"}),
        (in_parts, "llama", {}),
        (trained_part, "phi3", {}),
        (spread, "qwen3", {"aligner": "mlp"}),
    ],
)
def test_offloaded_it_answers_the_same(offload, family, settings, make_model, batch, uneven, tmp_path):
    """But for rounding: nothing is folded of weights that come and go."""
    plain, model = (make_model(family, **settings) for _ in range(2))
    packed = {"encoder_input_ids": torch.tensor([[5, 6, 7]]), "encoder_cu_seqlens": torch.tensor([0, 1, 3])}
    packed |= {"input_ids": torch.tensor([[8, 9, 5, 4]]), "cu_seqlens": torch.tensor([0, 3, 4])}
    model = offload(model, tmp_path / "weights")
    meta = [name for name, own in model.named_parameters() if own.device.type == "meta"]
    assert any(name.startswith("adapter") for name in meta) and any(name.startswith("aligner") for name in meta)
    assert model.device == CPU
    with torch.no_grad():
        for call in (batch, packed, uneven, uneven | {"skip_logits": True}):
            found, expected = model(**call), plain(**call)
            assert found.keys() == expected.keys()
            for name in {"loss", "logits"} & expected.keys():
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
        for way in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            found, expected = (one.generate(**batch, **way, max_new_tokens=4) for one in (model, plain))
            assert torch.equal(found, expected)
    if plain.config.gate != "dynamic":
        assert torch.equal(model.gates(), plain.gates())
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == dict(plain.trained_parameters()).keys()
    assert all(torch.equal(saved[name], own) for name, own in plain.trained_parameters())
    assert meta == [name for name, own in model.named_parameters() if own.device.type == "meta"]


def test_what_folds_is_offloaded_and_comes_back(make_model, batch, tmp_path):
    """Folded weights are not kept of weights that have left, and a second model of an offloaded LLM reads the same store."""
    model, plain = make_model(), make_model()
    with torch.no_grad():
        expected = plain(**batch).logits
        assert torch.equal(model(**batch).logits, expected) and model.aligner._kept is not None
        model = to_disk(model, tmp_path)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
        assert model.aligner._kept is None
        second = LayAlignForConditionalGeneration.from_bases(plain.encoder, model.llm, llm_layers=[0]).eval()
        stores = [one.llm.lm_head._hf_hook.weights_map for one in (model, second)]
        assert stores[0] is stores[1] is not None
        alone = make_model(llm_layers=[0])
        second.load_state_dict(alone.trained_state_dict(), strict=False)
        torch.testing.assert_close(second(**batch).logits, alone(**batch).logits, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)
