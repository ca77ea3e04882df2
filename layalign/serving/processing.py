"""QuestionProcessor: from a question to token ids for vLLM's two halves, by LayAlign's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import MultiModalEncDecInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    ProcessorInputs,
)

from layalign.processor import LayAlignProcessor
from layalign.serving.placeholders import decoder_ids
from layalign.serving.requests import MODALITY, EncoderPrompt
from layalign.serving.settings import checked_reading, longest_question

# What of a request the model gets: the encoder's ids.
ENCODER_IDS = "encoder_ids"
# Shortest sequence beside the soft prompts: beginning of sequence, boundary, and a new token.
BESIDE = 3


class QuestionItems(ProcessorBatchItems[Mapping[str, Any]]):
    """Questions, {"text", "prompt" or "prompt_ids"}."""

    def __init__(self, data: Sequence[Mapping[str, Any]]):
        super().__init__(data, MODALITY)


class QuestionParser(MultiModalDataParser):
    """vLLM's parser of what is not text, which here is what the encoder reads."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {MODALITY: QuestionItems}


class QuestionInfo(BaseProcessingInfo):
    """How long questions may be, and by whom they are read."""

    @cached_property
    def processor(self) -> LayAlignProcessor:
        """LayAlign's own, from the model's folder."""
        config = self.ctx.model_config
        return LayAlignProcessor.from_pretrained(
            config.model, **({"revision": config.revision} if config.revision else {})
        )

    @cached_property
    def longest(self) -> int:
        """The most tokens of a question: one each stands in the LLM's sequence."""
        return longest_question(self.get_hf_config(), self.ctx.model_config.max_model_len - BESIDE)

    def get_data_parser(self) -> MultiModalDataParser:
        """One that knows questions alone."""
        return QuestionParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """A question a request."""
        return {MODALITY: 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The longest question."""
        return {MODALITY: min(self.longest, seq_len - BESIDE)}


class QuestionDummies(BaseDummyInputsBuilder[QuestionInfo]):
    """The longest question, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text for the LLM."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Mapping[str, Any]:
        """Ids, as no text is known to have that many."""
        longest = min(self.info.longest, seq_len - BESIDE)
        item = {"encoder_ids": [0] * longest, "prompt_ids": []}
        return {MODALITY: [item] * mm_counts.get(MODALITY, 0)}


class QuestionProcessor(EncDecMultiModalProcessor[QuestionInfo]):
    """Reads a request: encoder ids for `embed_multimodal`, and token ids for the LLM, the soft prompts' places among them."""

    # The beginning of sequence is among what `apply` gives.
    skip_decoder_start_token = True

    def create_encoder_prompt(self, prompt: list[int], mm_items: Any) -> list[int]:
        """Not called: `apply` does it all."""
        raise NotImplementedError

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {ENCODER_IDS: MultiModalFieldConfig.batched(MODALITY)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        return []

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> MultiModalEncDecInput:
        """A request as the engine takes it.

        Raises:
            VLLMValidationError: a question or prompt that is too long, or what the processor refuses.
        """
        item = inputs.mm_data_items[MODALITY].get(0)
        # The request's own before the server's (--mm-processor-kwargs).
        read, text = self._ids(item, self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs))
        if len(read) > self.info.longest:
            raise VLLMValidationError(
                f"prompt: the question has {len(read)} tokens of the encoder's, this model takes {self.info.longest}; shorten it",
                parameter="prompt",
            )
        config = self.info.get_hf_config().get_text_config()
        bos = config.bos_token_id
        whole = decoder_ids(read, text, bos[0] if isinstance(bos, list) else bos, config.vocab_size)
        room = self.info.ctx.model_config.max_model_len
        if len(whole) >= room:
            raise VLLMValidationError(
                f"prompt: {len(read)} soft prompts and {len(text)} tokens of text are {len(whole)} in all, which leaves no new token of "
                f"the {room} that this model reads; shorten the question",
                parameter="prompt",
            )
        fields = self._get_mm_fields_config(None, None)
        features = BatchFeature({ENCODER_IDS: torch.tensor([read])})
        return MultiModalEncDecInput(
            type="multimodal",
            prompt_token_ids=whole,
            encoder_prompt_token_ids=EncoderPrompt(len(read), whole),
            encoder_prompt=item.get("text", ""),  # what a client that asks for an echo gets
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(features, fields),
            mm_hashes={MODALITY: [hashlib.sha256(repr(read).encode()).hexdigest()]},
            mm_placeholders={MODALITY: [PlaceholderRange(offset=0, length=len(read))]},
        )

    def _ids(self, item: Mapping[str, Any], reading: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """What the encoder reads, and the text for the LLM; `reading`: see `checked_reading`."""
        if "encoder_ids" in item:
            return item["encoder_ids"], item["prompt_ids"]
        try:
            arguments = checked_reading(reading)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from error
        try:
            given = {} if "prompt" not in item else {"prompt": item["prompt"]}
            made = self.info.processor(item["text"], **given, **arguments)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from error
        read = made["encoder_input_ids"][0].tolist()
        if "prompt_ids" in item:
            return read, item["prompt_ids"]
        return read, made["input_ids"][0].tolist() if "input_ids" in made else []
