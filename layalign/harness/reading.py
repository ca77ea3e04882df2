"""Answers and log-likelihoods where each text comes with what the LLM reads beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature, StoppingCriteriaList

from layalign.generation.logits import label_loglikelihoods, watched
from layalign.generation.stopping import EndsWith
from layalign.generation.texts import Answerer


class Read(NamedTuple):
    """What is read of one request: text by the encoder, prompt by the LLM (None: nothing), and their language if it is known."""

    text: str
    prompt: str | None
    lang: str | None


class ReadingAnswerer(Answerer):
    """An `Answerer` of one batch of `Read`; either all have a prompt or none, either all have a language or none."""

    def written(self, reads: Sequence[Read], until: Sequence[str]) -> list[str]:
        """What the model writes, as it is, to the end of sequence or a little beyond one of the texts `until`."""
        arguments: dict[str, Any] = dict(self._arguments)
        if until:
            arguments["stopping_criteria"] = StoppingCriteriaList([EndsWith(self.tokenizer, until)])
        with torch.inference_mode():
            rows = watched(self.model, **self._of(reads), **arguments).cpu()
        return [self._written(row) for row in rows]

    def scored(self, reads: Sequence[Read], said: Sequence[str], together: bool) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token is the likeliest) of one continuation each.

        Args:
            reads: see above.
            said: the continuations.
            together: prompt and continuation are one text, from which its tokens are made; else the continuation's are made as those of
                a training target, without white space before it.
        """
        pairs = [self._pair(read.prompt, text, together) for read, text in zip(reads, said, strict=True)]
        width = max(len(prompt) + len(target) for prompt, target in pairs)
        lengths = torch.tensor([[len(prompt) + len(target)] for prompt, target in pairs])
        batch = self._of([read._replace(prompt=None) for read in reads])
        device = self.model.device
        batch["input_ids"] = torch.tensor(
            [[self._pad] * (width - len(prompt) - len(target)) + prompt + target for prompt, target in pairs],
            device=device,
        )
        batch["attention_mask"] = (torch.arange(width) >= width - lengths).long().to(device)
        batch["labels"] = torch.tensor([[-100] * (width - len(target)) + target for _, target in pairs], device=device)
        with torch.inference_mode():
            out = self.model(**batch, only_scored=True)
        sums = label_loglikelihoods(out.logits, out.labels).tolist()
        greedy = ((out.logits.argmax(-1) == out.labels) | (out.labels == -100)).all(1).tolist()
        return list(zip(sums, greedy, strict=True))

    def _of(self, reads: Sequence[Read]) -> BatchFeature:
        prompts = None if reads[0].prompt is None else [str(read.prompt) for read in reads]
        langs = None if reads[0].lang is None else [str(read.lang) for read in reads]
        texts = [read.text for read in reads]
        self.check(texts, "encoder_input, text {} of a batch".format)
        batch = self.processor(texts, prompts, lang=langs, encoder_max_length=self.encoder_max_length)
        return batch.to(self.model.device)

    def _pair(self, prompt: str | None, said: str, together: bool) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the continuation, of which there is at least one."""
        if together and prompt is not None:
            # A tokenizer joins white space to the word after it: so have it the harness' own pairs.
            cut = len(prompt.rstrip())
            prompt, said = prompt[:cut], prompt[cut:] + said
            whole, length = self._ids(prompt + said), len(self._ids(prompt))
            length = min(length, len(whole) - 1)
            return whole[:length], whole[length:]
        target = self._ids(said.lstrip() or said)
        return [] if prompt is None else self._ids(prompt), target

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
