"""Trainer callbacks of the real runs."""

import json
import time
from pathlib import Path

import torch
from transformers import TrainerCallback


class StepLog(TrainerCallback):
    """Adds a JSON line to `path` at every log: stage, step, loss, learning_rate, and the wall seconds since the last.

    A resumed run writes the steps after its checkpoint again; the seconds of all lines add up to the time spent.
    """

    def __init__(self, path):
        self.path = Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        now = time.monotonic()
        line = {"stage": Path(args.output_dir).name, "step": state.global_step, "loss": logs["loss"]}
        line |= {"learning_rate": logs.get("learning_rate"), "seconds": round(now - self.last, 3)}
        self.last = now
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StartAtEmbeddings(TrainerCallback):
    """Before the first step of `stage`, makes the adapter's output resemble token embeddings; see `fit_adapter`.

    batch: what a LayAlignProcessor makes of some texts of the training data.
    """

    def __init__(self, stage, batch):
        self.stage, self.batch = stage, batch

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and Path(args.output_dir).name == self.stage and model.adapter is not None:
            fit_adapter(model, self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"])


@torch.no_grad()
def fit_adapter(model, encoder_input_ids, encoder_attention_mask):
    """Let the adapter's first layer standardise each dimension of a batch's encoder states, and scale and shift its last
    so that their soft prompts have mean 0 and, on average over dimensions, the standard deviation of the LLM's embeddings.

    The last states of multilingual-e5 are nearly one vector with small differences: left as they are, the soft prompts
    of all texts start out alike, a quarter as varied as token embeddings.
    """
    device = next(model.adapter.parameters()).device
    ids, mask = encoder_input_ids.to(device), encoder_attention_mask.to(device)

    def soft_prompts():
        soft, soft_mask, _, _ = model.encode(ids, mask)
        return soft[soft_mask].float()

    last = model.adapter.linear2
    states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
    first = last if model.adapter.linear1 is None else model.adapter.linear1
    first.weight /= states.std(0)
    first.bias -= first.weight @ states.mean(0)
    embeddings = model.llm.get_input_embeddings().weight.float()
    last.weight *= embeddings.std() / soft_prompts().std(0).mean()
    last.bias -= soft_prompts().mean(0)
