"""What LayAlign takes from transformers, piece by piece: where a new version changes one, its test here says which, and whose it is."""

import inspect
from dataclasses import fields

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import AttentionInterface, GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.utils import GenerationMixin as Mixin
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from layalign import compatibility, fusion

TINY = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def parameters(function):
    return set(inspect.signature(function).parameters)


@pytest.fixture
def recorded():
    """An LLM whose attention and mask functions are ours, and what transformers called them with."""
    attention, masks = [], []

    def attend(module, query, key, value, attention_mask, **kwargs):
        attention.append((module, query, key, value, attention_mask, kwargs))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    def mask(*args, **kwargs):
        masks.append((args, kwargs))
        return fusion.fusion_mask(*args, **kwargs)

    AttentionInterface.register("recorded", attend)
    AttentionMaskInterface.register("recorded", mask)
    llm = LlamaForCausalLM(TINY).eval()
    llm.set_attn_implementation("recorded")
    return llm, attention, masks


def test_this_version_is_one_that_is_supported():
    from importlib.metadata import requires

    (line,) = [line for line in requires("layalign") if line.startswith("transformers")]
    assert compatibility.VERSION in SpecifierSet(line.removeprefix("transformers")), transformers.__version__


def test_attention_functions_are_called_as_ours_takes_it(recorded):
    """layalign/fusion.py: fused_attention, and CrossStates by keyword through every layer."""
    llm, calls, _ = recorded
    ids = torch.tensor([[3, 4, 5]])
    marker = object()
    with torch.no_grad():
        llm(input_ids=ids, fusion=marker)
    assert [call[0].layer_idx for call in calls] == [0, 1]
    _, query, key, value, mask, kwargs = calls[0]
    assert query.shape == (1, 2, 3, 8)
    assert key.shape == value.shape == (1, TINY.num_key_value_heads, 3, 8)
    assert isinstance(mask, fusion.FusionMask), "the mask function registered under the same name was not used"
    assert kwargs["fusion"] is marker, "keyword arguments of the LLM no longer reach its attention"
    assert "scaling" in kwargs


def test_mask_functions_are_called_as_ours_takes_it(recorded):
    """layalign/fusion.py: fusion_mask keeps the padding mask and where queries begin, also behind a cache."""
    llm, calls, masks = recorded
    ids, mask = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 1, 1, 1]])
    with torch.no_grad():
        out = llm(input_ids=ids, attention_mask=mask, use_cache=True)
        cache = getattr(out, compatibility.CACHE)
        step = {compatibility.CACHE: cache, "use_cache": True}
        llm(input_ids=ids[:, -1:], attention_mask=torch.tensor([[0, 1, 1, 1, 1]]), **step)
    unknown = {name for _, kwargs in masks for name in kwargs} - parameters(fusion.fusion_mask) - {"dtype", "device"}
    assert not {name for name in unknown if "offset" in name or "length" in name}, unknown
    first, last = calls[0][4], calls[-1][4]
    assert first.key_mask.tolist() == [[False, True, True, True]]
    assert last.key_mask.tolist() == [[False, True, True, True, True]]
    assert (int(first.query_start), int(last.query_start)) == (0, 4)


def test_windows_can_be_read_off_mask_functions():
    """layalign/fusion.py: _window looks into the closure of transformers' sliding window."""
    assert fusion._window(causal_mask_function, None, None) is None
    assert fusion._window(sliding_window_causal_mask_function(7), None, None) == 7
    with pytest.raises(ValueError, match="does not cover"):
        fusion._window(sliding_window_overlay(7), None, None)
    for create in (create_causal_mask, create_sliding_window_causal_mask):
        assert {"config", "attention_mask"} <= parameters(create)


def test_generate_has_the_places_that_ours_fills():
    """layalign/generation/mixin.py, layalign/fusing.py."""
    assert "create_masks_for_generate" in inspect.getsource(inspect.getmodule(Mixin)), (
        "generate asks models for no masks"
    )
    for name in ("init_continuous_batching", "prepare_inputs_for_generation", "generate"):
        assert callable(getattr(Mixin, name, None)), f"GenerationMixin.{name} is gone"
    assert "inputs_embeds" in parameters(GenerationMixin.prepare_inputs_for_generation)
    assert compatibility.CACHE in parameters(GenerationMixin.prepare_inputs_for_generation)


def test_the_cache_has_one_of_the_names_that_are_known():
    """layalign/compatibility.py."""
    names = {field.name for field in fields(CausalLMOutputWithPast)}
    assert names & {"cache", "past_key_values"} == {compatibility.CACHE}
    assert (compatibility.CACHE == "cache") == (Version("5.24") <= compatibility.VERSION)
    assert compatibility.CACHE in parameters(LlamaForCausalLM.forward)


def test_models_have_the_places_that_ours_fills():
    """layalign/frozen_bases.py, layalign/trained_parts.py."""
    for name in (
        "set_attn_implementation",
        "_set_gradient_checkpointing",
        "enable_input_require_grads",
        "init_weights",
        "tie_weights",
        "get_decoder",
        "save_pretrained",
        "resize_token_embeddings",
    ):
        assert callable(getattr(PreTrainedModel, name, None)), f"PreTrainedModel.{name} is gone"
    assert {"enable", "gradient_checkpointing_func"} <= parameters(PreTrainedModel._set_gradient_checkpointing)
    assert TINY.get_text_config(decoder=True) is TINY
    llm = LlamaForCausalLM(TINY)
    llm.set_attn_implementation(fusion.NAME)
    assert TINY._attn_implementation == fusion.NAME or llm.config._attn_implementation == fusion.NAME


def test_attention_modules_carry_what_projections_are_read_by():
    """layalign/projections.py, layalign/families.py."""
    found = [module for module in LlamaForCausalLM(TINY).modules() if type(module).__name__ == "LlamaAttention"]
    assert [module.layer_idx for module in found] == [0, 1]
    for name in ("k_proj", "v_proj", "head_dim"):
        assert hasattr(found[0], name), f"LlamaAttention.{name} is gone"


def test_loading_takes_what_ours_passes_on():
    """layalign/loading.py: weights that a checkpoint lacks are told, dtype goes by that name."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    for name in ("output_loading_info", "dtype", "device_map", "quantization_config"):
        assert name in source, f"from_pretrained takes {name} no more"


def test_the_trainer_counts_labels_as_the_loss_does():
    """layalign/frozen_bases.py sets loss_type: transformers' Trainer divides by the labels it counts."""
    trainer = pytest.importorskip("transformers.trainer", reason="accelerate is missing").Trainer
    assert callable(getattr(trainer, "get_batch_samples", None)), "Trainer.get_batch_samples is gone"
    assert "loss_type" in inspect.getsource(PreTrainedModel.loss_function.fget) or hasattr(PreTrainedModel, "loss_type")
