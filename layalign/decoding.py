"""LayAlign's side of transformers' generate: the inputs of the first step, cross states shared by beams, what cannot work."""

import torch
from transformers import GenerationMixin

CROSS = ("cross_keys", "cross_values", "cross_mask")
UNSUPPORTED = {
    "inputs_embeds": "they are made from encoder_input_ids and input_ids; give these",
    "assistant_model": "a draft model would see neither the encoder's output nor the prompt; use prompt_lookup_num_tokens instead",
    "assistant_early_exit": "the first layers cannot draft alone; use prompt_lookup_num_tokens instead",
    "guidance_scale": "the run without the prompt that it compares with would still see the encoder's output; leave it out",
    "prefill_chunk_size": "the first step reads embeddings, which transformers does not cut into chunks; leave it out",
}
NO_PAGES = "transformers' paged cache packs requests into one row and drops their cross states"


class LayAlignGenerationMixin(GenerationMixin):
    """`generate` for a model with `encode` and `assemble`."""

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        *,
        encoder_input_ids=None,
        encoder_attention_mask=None,
        input_ids=None,
        attention_mask=None,
        labels=None,
        **kwargs,
    ):
        """Generate from the encoder's tokens and, where given, a prompt.

        Arguments of transformers' generate apply: sampling, beams, `num_return_sequences`, streamers, dynamic, static and sliding
        caches. Encoder, adapter and aligner run once per input, whatever the number of tokens, beams and samples.

        Args:
            encoder_input_ids, encoder_attention_mask: (B, T).
            input_ids, attention_mask: (B, M), the prompt; leave out for the translation stage.
            labels: ignored, so that a training batch can be passed as it is with its target cut off.

        Returns:
            (B, new) long, new tokens only, or transformers' generate output with `return_dict_in_generate=True`.

        Raises:
            ValueError: before anything is computed, for what cannot work: assistant models, guidance, chunked prefill, a paged cache;
                prompt lookup (`prompt_lookup_num_tokens`, which looks in the text generated so far) with more than one row.
        """
        if inputs is not None or encoder_input_ids is None:
            raise ValueError(
                "generate takes encoder_input_ids (and input_ids for a prompt) as keywords; a LayAlignProcessor makes them, and "
                "layalign.LayAlignPipeline takes texts"
            )
        self._check_way_of_decoding(len(encoder_input_ids), kwargs)
        soft, cross_mask, cross_keys, cross_values = self.encode(encoder_input_ids, encoder_attention_mask)
        inputs_embeds, mask, _ = self.assemble(soft, cross_mask, input_ids, attention_mask)
        if cross_keys is not None:
            kwargs |= dict(zip(CROSS, (cross_keys, cross_values, cross_mask), strict=True))
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=mask.long(), **kwargs)

    def _check_way_of_decoding(self, rows, kwargs):
        def setting(name):
            given = kwargs.get(name, getattr(kwargs.get("generation_config"), name, None))
            return getattr(self.generation_config, name, None) if given is None else given

        for name, why in UNSUPPORTED.items():
            value = setting(name)
            if value is not None and not (name == "guidance_scale" and value == 1):
                got = type(value).__name__ if name in ("inputs_embeds", "assistant_model") else repr(value)
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

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """transformers calls this for static caches; the fused attention takes the 2-D mask as it is, a 4-D one would bypass it."""
        return attention_mask

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams and samples of an example read its cross keys and values: the operator takes fewer rows of these than queries."""
        cross = {name: model_kwargs.pop(name) for name in CROSS if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | cross

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported; `generate_batch` and the continuous batching manager end here.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"continuous batching: {NO_PAGES}; examples/continuous_serving.py shows what to do instead")
