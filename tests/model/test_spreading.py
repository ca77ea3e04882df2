"""The LLM's layers on several devices. Here is one, so that layers lie on the disk beside it: hooks put them in place for each call."""

import pytest
import torch

from layalign import fusion
from layalign.generation.texts import Answerer
from layalign.loading import load_model
from layalign.outputs import CrossInputs
from layalign.spreading import spread

TEXTS = ["what is 3 plus 4", "how many apples and apples and apples is 12 na 13", "what"]


def test_answers_are_the_same(model_folder, loaded, tmp_path):
    model, processor = load_model(model_folder, device="cpu")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread(model, device_map=places, offload_folder=tmp_path)
    assert next(model.llm.model.layers[1].parameters()).is_meta, "it is not in memory"
    for answerer in (Answerer(model, processor, max_new_tokens=6), Answerer(*loaded, max_new_tokens=6)):
        found = answerer(TEXTS), answerer.loglikelihoods(TEXTS, [["7", "so 12"]] * 3)
        if answerer.model is model:
            spread_over = found
    assert spread_over[0] == found[0]
    for ours, theirs in zip(spread_over[1], found[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_cross_states_follow_the_layers():
    """Layers on "meta", where there is no memory, and what all layers share on the CPU."""

    def there(*shape, device="meta"):
        return torch.zeros(*shape, device=device)

    states = fusion.CrossStates(
        CrossInputs(there(2, 1, 2, 5, 8, device="cpu"), there(2, 1, 2, 5, 8, device="cpu"), torch.ones(2, 5) > 0),
        [0],
        "torch",
    )
    states.mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    module = torch.nn.Module()
    module.layer_idx, module.fusion_gate = 0, lambda _: there(1)
    mask = fusion.FusionMask(torch.ones(2, 4) > 0, 0, None, 0)
    out, _ = fusion.fused_attention(
        module, there(2, 4, 4, 8), there(2, 2, 4, 8), there(2, 2, 4, 8), mask, fusion=states
    )
    assert out.device.type == "meta"
    assert out.shape == (2, 4, 4, 8)


def test_ways_that_there_are(model_folder, loaded):
    model, _ = load_model(model_folder, devices="auto")
    assert model.device == loaded[0].device, "without a GPU all is on the CPU"
    for arguments, message in (
        ({"devices": "all"}, "devices: got 'all', takes auto, balanced"),
        ({"devices": "auto", "device": "cpu"}, "got 'auto' and device 'cpu', takes one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(model_folder, **arguments)
    with pytest.raises(ValueError, match="does not fit into the memory"):
        spread(model, device_map={"": "disk"})
