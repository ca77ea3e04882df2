"""Trainer callbacks of the real run."""

import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class TimeBudget(TrainerCallback):
    """Stops each stage after its seconds: {stage: seconds}."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = time.monotonic() + self.seconds[Path(args.output_dir).name]

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self.ends:
            control.should_training_stop = control.should_log = True


class StartAtEmbeddings(TrainerCallback):
    """Before the first step of `stage`, makes the adapter's output resemble token embeddings; see `fit_adapter`.

    batch: what a LayAlignProcessor makes of some texts of the training data.
    """

    def __init__(self, stage, batch):
        self.stage, self.batch = stage, batch

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and Path(args.output_dir).name == self.stage:
            fit_adapter(model, self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"])


@torch.no_grad()
def fit_adapter(model, encoder_input_ids, encoder_attention_mask):
    """Scale and shift the adapter's last layer so that a batch's soft prompts have mean 0 and, on average over their
    dimensions, the standard deviation of the LLM's embeddings.

    The last states of multilingual-e5 are nearly one vector with small differences: left as they are, the soft prompts
    of all texts start out alike, a quarter as varied as token embeddings.
    """
    device = next(model.adapter.parameters()).device
    ids, mask = encoder_input_ids.to(device), encoder_attention_mask.to(device)

    def soft_prompts():
        soft, soft_mask, _, _ = model.encode(ids, mask)
        return soft[soft_mask].float()

    embeddings = model.llm.get_input_embeddings().weight.float()
    last = model.adapter.linear2
    last.weight *= embeddings.std() / soft_prompts().std(0).mean()
    last.bias -= soft_prompts().mean(0)
