"""`transformers.pipeline("layalign-generation", model=...)`: texts in, texts out. Importing this module registers the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from layalign.auto_classes import TASK
from layalign.generation.texts import Answerer
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.prompts import DEFAULT_PROMPT

Given = dict[str, Any]


class LayAlignPipeline(Pipeline):
    """Answers questions in any language the encoder knows, batched, as `layalign generate` does.

        pipe = transformers.pipeline("layalign-generation", model=folder)     # after `from layalign import LayAlignPipeline`
        pipe = LayAlignPipeline(model, processor)
        pipe("Tom hat ...", max_new_tokens=64)                                # [{"generated_text": ...}], one a returned sequence
        pipe(["...", "..."], batch_size=8)                                    # a list of those
        for answer in pipe((line for line in file), batch_size=8): ...        # generators and datasets: as they are answered

    Made or called with `batch_size`, `prompt` (see `layalign.prompts.chosen_prompt`; the processor's by default), `lang`
    (the texts' language, for encoders and prompts that are told it), `streamer` (one text at a time) and any argument of generate.
    Greedy unless they or a `generation_config` among them say otherwise; `max_new_tokens` is 256 likewise.

    Args:
        model: a LayAlignForConditionalGeneration.
        processor: its LayAlignProcessor.
        kwargs: transformers' arguments of a pipeline, and those above.

    Raises:
        ValueError: a model or processor that is not LayAlign's, text that is empty or no str, and what `generate` and
            `Answerer` refuse.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(
        self, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor | None = None, **kwargs: Any
    ):
        if not isinstance(model, LayAlignForConditionalGeneration):
            raise ValueError(f"model: got a {type(model).__name__}, takes a LayAlignForConditionalGeneration")
        if not isinstance(processor, LayAlignProcessor):
            raise ValueError(
                f"processor: got {type(processor).__name__}, takes the model's LayAlignProcessor (both tokenizers)"
            )
        super().__init__(model, processor=processor, **{"task": TASK, **kwargs})
        self.model.eval()

    def _sanitize_parameters(self, **arguments: Any) -> tuple[Given, Given, Given]:
        return {}, arguments, {}

    def __call__(self, inputs: Any, **arguments: Any) -> Any:
        """Answers to a text, to a sequence of texts, or, as they are made, to those of a generator or dataset."""
        sequence = isinstance(inputs, Sequence) and not isinstance(inputs, str)
        inputs = list(inputs) if sequence else inputs
        return super().__call__(inputs, **arguments) if inputs or not sequence else []

    def preprocess(self, text: str) -> Given:
        """A batch of one text."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text: got {text!r}, takes a text that is not empty")
        return {"text": [text]}

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: Given,
        forward_params: Given,
        postprocess_params: Given,
    ) -> Iterator[Any]:
        """Batches of texts, which the processor pads: transformers' own would be padded by one of the two tokenizers."""
        # A dataset may have __len__ and __getitem__ alone.
        items = (inputs[index] for index in range(len(inputs))) if hasattr(inputs, "__len__") else iter(inputs)
        while batch := [self.preprocess(text, **preprocess_params)["text"][0] for text in islice(items, batch_size)]:
            for answers in self.forward({"text": batch}, **forward_params)["answers"]:
                yield self.postprocess({"answers": [answers]}, **postprocess_params)

    def _forward(
        self,
        inputs: Given,
        prompt: str | None = DEFAULT_PROMPT,
        streamer: Any = None,
        lang: str | None = None,
        **arguments: Any,
    ) -> Given:
        texts = inputs["text"]
        answerer = Answerer(self.model, self.processor, batch_size=len(texts), prompt=prompt, **arguments)
        return {"answers": answerer.sequences(texts, streamer, None if lang is None else [lang] * len(texts))}

    def postprocess(self, outputs: Given) -> list[dict[str, str]]:
        """[{"generated_text": answer}], one a returned sequence."""
        (answers,) = outputs["answers"]
        return [{"generated_text": answer} for answer in answers]


PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)  # the stand-in, which would be warned about
PIPELINE_REGISTRY.register_pipeline(TASK, LayAlignPipeline, pt_model=LayAlignForConditionalGeneration, type="text")
