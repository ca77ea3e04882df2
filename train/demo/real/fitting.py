"""Where the adapter begins: soft prompts as varied as the LLM's token embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BatchFeature, TrainerCallback

from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.data.sources import read_sources
from layalign.train.recipe import Recipe

FITTED_ON = 64


class FitAdapter(TrainerCallback):
    """Before the first step of `stage`, makes the adapter's output resemble token embeddings; see `fit_adapter`.

    Args:
        stage: name of the stage.
        batch: what a LayAlignProcessor makes of some texts of the training data.
    """

    def __init__(self, stage: str, batch: BatchFeature):
        self.stage, self.batch = stage, batch

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and Path(args.output_dir).name == self.stage and model.adapter is not None:
            fit_adapter(model, self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"])


def fitting(recipe: Recipe) -> list[TrainerCallback]:
    """What fits the adapter to the embeddings before the first step of a recipe; nothing where it starts from trained weights."""
    if recipe.init_from is not None:
        return []
    first, stage = next(iter(recipe.stages.items()))
    rows, _ = read_sources(stage.data, recipe.data_root)
    assert recipe.encoder is not None
    processor = LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)
    texts = [row["source"] for row in rows[:: -(-len(rows) // FITTED_ON)]]
    return [FitAdapter(first, processor(texts, prompt=None, encoder_max_length=stage.source_max_length))]


@torch.no_grad()
def fit_adapter(
    model: LayAlignForConditionalGeneration, encoder_input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor
) -> None:
    """Let the adapter's first layer standardise each dimension of a batch's encoder states, and scale and shift its last
    so that their soft prompts have mean 0 and, on average over dimensions, the standard deviation of the LLM's embeddings.

    The last states of multilingual-e5 are nearly one vector with small differences: left as they are, the soft prompts
    of all texts start out alike, a quarter as varied as token embeddings.

    Args:
        model: with an adapter, which is changed.
        encoder_input_ids, encoder_attention_mask: (texts, tokens) integers, padded.
    """
    adapter = model.adapter
    assert adapter is not None
    device = next(adapter.parameters()).device
    ids, mask = encoder_input_ids.to(device), encoder_attention_mask.to(device)

    def soft_prompts() -> torch.Tensor:
        soft, soft_mask, *_ = model.encode(ids, mask)
        assert soft is not None
        return soft[soft_mask].float()

    last = adapter.linear2
    states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
    first = last if adapter.linear1 is None else adapter.linear1
    first.weight /= states.std(0)
    first.bias.sub_(first.weight @ states.mean(0))
    embeddings = model.llm.get_input_embeddings().weight.float()
    last.weight *= embeddings.std() / soft_prompts().std(0).mean()
    last.bias.sub_(soft_prompts().mean(0))
