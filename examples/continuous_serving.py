"""Serving while requests arrive: python examples/continuous_serving.py runs/demo/model < questions.txt

One thread decodes in rounds of a few tokens. Before each round, requests that came in join the batch and finished ones leave it;
what a request has written is appended to its prompt. An answer is that of `generate` alone, for no neighbour changes it.

What this does not support, or does not do well:
- transformers' own continuous batching (`generate_batch`, `cache_implementation="paged"`): its paged cache packs all requests into one
  row, where each would need its own cross keys and values, so LayAlign refuses it. `layalign serve` has paged caches, and HTTP, by vLLM.
- Keeping caches between rounds: every round encodes the questions and reads the prompts again. That costs one prefill a round;
  `tokens_per_round` weighs it against the time a new request waits.
- Sampling (greedy only), beams, streaming within a round, cancelling, several GPUs, sharing prefixes, limits on memory other than
  `max_batch`.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.loading import load_model


@dataclass
class Request:
    """One question, and what has been written so far of its answer."""

    text: str
    prompt: list[int]
    tokens_left: int
    future: Future = field(default_factory=Future)
    written: list[int] = field(default_factory=list)


class Server:
    """Answers texts from any number of threads; a context manager.

    Args:
        model, processor: as `layalign.loading.load_model` gives them.
        max_batch: the most requests in a round.
        tokens_per_round: tokens that a request gets before others may join.
    """

    def __init__(
        self,
        model: LayAlignForConditionalGeneration,
        processor: LayAlignProcessor,
        max_batch: int = 8,
        tokens_per_round: int = 16,
    ):
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.tokens_per_round = max_batch, tokens_per_round
        ends = model.generation_config.eos_token_id
        self.ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def submit(self, text: str, max_new_tokens: int = 64) -> Future:
        """A Future of the answer (str).

        Raises:
            ValueError: an empty text, one that the encoder cannot read as a whole, or no tokens.
        """
        if not text.strip() or max_new_tokens < 1:
            raise ValueError(f"got text {text!r} and max_new_tokens {max_new_tokens}, takes a text and a positive int")
        read, limit = self.processor(text), self.model.encoder_limit
        # Here, as a round that the model refuses is refused to all who are in it.
        if limit is not None and (count := read["encoder_input_ids"].shape[1]) > limit:
            raise ValueError(f"got a text of {count} tokens, the encoder takes {limit}")
        ids = read.get("input_ids")
        request = Request(text, [] if ids is None else ids[0].tolist(), max_new_tokens)
        self.waiting.put(request)
        return request.future

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        """What was submitted is still answered."""
        self.waiting.put(None)
        self.thread.join()

    def _serve(self) -> None:
        active: list[Request] = []
        closing = False
        while active or not closing:
            while not closing and len(active) < self.max_batch and (not active or not self.waiting.empty()):
                request = self.waiting.get()
                closing = request is None
                active += [] if request is None else [request]
            if not active:
                continue
            try:
                self._round(active)
            except Exception as error:  # the requests' owners must hear of it, and later requests be served
                for request in active:
                    if not request.future.done():
                        request.future.set_exception(error)
            active = [request for request in active if not request.future.done()]

    @torch.inference_mode()
    def _round(self, active: list[Request]) -> None:
        batch = self.processor([request.text for request in active], prompt=None)
        rows = [request.prompt + request.written for request in active]
        width = max(1, *map(len, rows))
        batch["input_ids"] = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        batch["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        tokens = min(self.tokens_per_round, max(request.tokens_left for request in active))
        ids = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(self.ends) or None,
            pad_token_id=0,
        )
        for request, row in zip(active, ids.tolist(), strict=True):
            row = row[: request.tokens_left]
            end = next((place for place, token in enumerate(row) if token in self.ends), None)
            request.written += row[:end]
            request.tokens_left -= len(row)
            if end is not None or not request.tokens_left:
                request.future.set_result(self.processor.decode(request.written, skip_special_tokens=True).strip())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answer lines of standard input as they arrive.")
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--tokens-per-round", type=int, default=16)
    arguments = parser.parse_args()
    with Server(*load_model(arguments.model), arguments.max_batch, arguments.tokens_per_round) as server:
        for line in filter(str.strip, sys.stdin):
            text = line.strip()
            server.submit(text).add_done_callback(lambda done, text=text: print(text, done.result(), sep="\n  "))


if __name__ == "__main__":
    main()
