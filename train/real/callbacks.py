"""Trainer callbacks of the real runs."""

import json
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

    batch: what a LayAlignProcessor makes of some texts of the training data. standardise: as in `fit_adapter`.
    """

    def __init__(self, stage, batch, standardise=False):
        self.stage, self.batch, self.standardise = stage, batch, standardise

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0 and Path(args.output_dir).name == self.stage and model.adapter is not None:
            fit_adapter(model, self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"], self.standardise)


@torch.no_grad()
def fit_adapter(model, encoder_input_ids, encoder_attention_mask, standardise=False):
    """Scale and shift the adapter's last layer so that a batch's soft prompts have mean 0 and, on average over their
    dimensions, the standard deviation of the LLM's embeddings.

    The last states of multilingual-e5 are nearly one vector with small differences: left as they are, the soft prompts
    of all texts start out alike, a quarter as varied as token embeddings. With `standardise`, the first layer takes off
    the batch's mean state and divides by the deviation of each dimension before all else.
    """
    device = next(model.adapter.parameters()).device
    ids, mask = encoder_input_ids.to(device), encoder_attention_mask.to(device)

    def soft_prompts():
        soft, soft_mask, _, _ = model.encode(ids, mask)
        return soft[soft_mask].float()

    last = model.adapter.linear2
    if standardise:
        states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
        first = last if model.adapter.linear1 is None else model.adapter.linear1
        first.weight /= states.std(0)
        first.bias -= first.weight @ states.mean(0)
    embeddings = model.llm.get_input_embeddings().weight.float()
    last.weight *= embeddings.std() / soft_prompts().std(0).mean()
    last.bias -= soft_prompts().mean(0)
