"""LayAlign's side of transformers' generate: the inputs of the first step, cross states shared by beams, what cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from layalign import compatibility, fusion
from layalign.limits import check_new_tokens
from layalign.sequence import Lengths, check_label_shape, measure

UNSUPPORTED = {
    "inputs_embeds": "they are made from encoder_input_ids and input_ids; give these",
    "assistant_model": "a draft model would see neither the encoder's output nor the prompt; use prompt_lookup_num_tokens instead",
    "assistant_early_exit": "the first layers cannot draft alone; use prompt_lookup_num_tokens instead",
    "guidance_scale": "the run without the prompt that it compares with would still see the encoder's output; leave it out",
    "cu_seqlens": "packed rows are for training; give each question a row, padded",
    "encoder_cu_seqlens": "packed rows are for training; give each question a row, padded",
    "position_ids": "they follow from the question's length; leave it out",
    "min_length": "what the LLM reads counts in it, whose length depends on the question; min_new_tokens says how much is written",
    "prefill_chunk_size": "the first step reads embeddings, which transformers does not cut into chunks; leave it out",
}
_SAYING_NOTHING = {"guidance_scale": 1, "min_length": 0}
NO_PAGES = "transformers' paged cache packs requests into one row and drops their cross states"


def chosen_setting(name: str, given: Mapping[str, Any], own: GenerationConfig | None = None) -> Any:
    """A setting of a call of generate: its own argument, that of the `generation_config` given, or the model's own; None where none has
    one."""
    chosen = given.get(name, getattr(given.get("generation_config"), name, None))
    return getattr(own, name, None) if chosen is None else chosen


class LayAlignGenerationMixin(GenerationMixin):
    """`generate` for a model with `encode` and `assemble`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: None = None,
        *,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        lengths: Lengths | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """Generate from the encoder's tokens and, where given, a prompt.

        Arguments of transformers' generate apply: sampling, beams, `num_return_sequences`, streamers, dynamic, static and sliding
        caches. Encoder, adapter and aligner run once per input, whatever the number of tokens, beams and samples.

        Args:
            inputs: not taken; transformers would read it as input_ids.
            encoder_input_ids: (B, T) long.
            encoder_attention_mask: (B, T), True or 1 = real token; None = all real.
            input_ids: (B, M) long, the prompt; leave out for the translation stage.
            attention_mask: (B, M), likewise.
            labels: (B, M) long; tokens of input_ids with a label are a training batch's targets, and not read.
            lengths: as in `forward`.
            kwargs: transformers' arguments of generate. A filled cache (`past_key_values`, or `cache`) goes on where the same call with
                less of input_ids ended: the question is the same, and input_ids begin with those and their answer.

        Returns:
            (B, new) long, new tokens only, or transformers' generate output with `return_dict_in_generate=True`.

        Raises:
            ValueError: before anything is computed, for what cannot work: assistant models, guidance, chunked prefill, a paged cache;
                more tokens than the LLM has positions for; prompt lookup (`prompt_lookup_num_tokens`, which looks in the text
                generated so far) with more than one row.
        """
        if inputs is not None or encoder_input_ids is None:
            raise ValueError(
                "generate takes encoder_input_ids (and input_ids for a prompt) as keywords; a LayAlignProcessor makes them, and "
                "layalign.LayAlignPipeline takes texts"
            )
        self._check_way_of_decoding(len(encoder_input_ids), kwargs)
        if labels is not None and input_ids is not None:
            check_label_shape(labels, input_ids)
            unanswered = labels == -100
            attention_mask = unanswered if attention_mask is None else unanswered & attention_mask.bool()
            lengths = None
        asked = (encoder_input_ids, encoder_attention_mask), (input_ids, attention_mask)
        length = self._setting("max_length", kwargs)
        if length is not None and self._setting("max_new_tokens", kwargs) is None:
            raise ValueError(
                f"max_length: got {length}; what the LLM reads has no ids here and its length depends on the question, so "
                "max_new_tokens says how much is written"
            )
        lengths = lengths or measure(*asked, None, False)
        encoded = self.encode(encoder_input_ids, encoder_attention_mask, lengths and lengths.encoder)
        assembled = self.assemble(encoded.soft, encoded.mask, input_ids, attention_mask, lengths=lengths)
        past = kwargs.get("past_key_values", kwargs.get("cache"))
        held, width = 0 if past is None else int(past.get_seq_length()), assembled.embeddings.shape[1]
        if held >= width:
            raise ValueError(
                f"past_key_values: holds {held} tokens, and the whole input has {width}; a cache goes on with the same question and a text "
                "(input_ids) that begins with what it holds"
            )
        check_new_tokens(self.llm_limit, assembled.embeddings.shape[1], self._setting("max_new_tokens", kwargs))
        # One argument that is no tensor: transformers repeats tensors for beams and samples, which share these.
        if (cross := encoded.cross(assembled.padding)) is not None:
            kwargs["cross"] = cross
        return super().generate(inputs_embeds=assembled.embeddings, attention_mask=assembled.mask.long(), **kwargs)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of a call of generate: its own argument, that of the configuration given, or the model's."""
        return chosen_setting(name, kwargs, self.generation_config)

    def _check_way_of_decoding(self, rows: int, kwargs: dict[str, Any]) -> None:
        def setting(name: str) -> Any:
            return self._setting(name, kwargs)

        for name, why in UNSUPPORTED.items():
            value = setting(name)
            if value is not None and not (name in _SAYING_NOTHING and value == _SAYING_NOTHING[name]):
                got = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
                raise ValueError(f"{name}: got {got}, which LayAlign does not support: {why}")
        if setting("cache_implementation") == "paged":
            raise ValueError(f"cache_implementation: got 'paged', takes 'dynamic' or 'static': {NO_PAGES}")
        if setting("prompt_lookup_num_tokens") is None:
            return
        samples = setting("num_return_sequences") or 1
        if rows * samples > 1:
            raise ValueError(
                f"prompt_lookup_num_tokens: takes one example and one sample at a time, got {rows} rows and "
                f"num_return_sequences={samples}; leave it out for a batch"
            )
        if "static" in (cache := setting("cache_implementation") or ""):
            raise ValueError(f"prompt_lookup_num_tokens: needs a dynamic cache, got cache_implementation={cache!r}")
        if not compatibility.can_look_up_prompts():
            raise ValueError(
                f"prompt_lookup_num_tokens: transformers {compatibility.VERSION} gives other answers with it than without; it needs "
                f"{compatibility.PROMPT_LOOKUP} or newer"
            )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """transformers calls this for static caches; a 4-D mask would bypass the fused attention."""
        return fusion.mask_of_cache(attention_mask, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Not supported; `generate_batch` and the continuous batching manager end here.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"continuous batching: {NO_PAGES}; examples/continuous_serving.py shows what to do instead")
