"""ServedLayAlign: vLLM's own LLM with cross-attention beside its attention, and LayAlign's encoder side before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.multimodal import MULTIMODAL_REGISTRY

from layalign.serving.attention import CrossFusedAttention, attention_layers
from layalign.serving.encoder_side import EncoderSide
from layalign.serving.placeholders import digits
from layalign.serving.processing import QuestionDummies, QuestionInfo, QuestionProcessor
from layalign.serving.settings import check_served, llm_place


@MULTIMODAL_REGISTRY.register_processor(QuestionProcessor, info=QuestionInfo, dummy_inputs=QuestionDummies)
class ServedLayAlign(nn.Module, SupportsMultiModal):
    """A LayAlign model in vLLM.

    A request's encoder output is one tensor (T, Dl + 2 L kv): soft prompts, then keys and values of each fused layer, this process's
    heads of them. It is made once, in the step that reads the prompt, in which the LLM gets the soft prompts and the paged cross
    cache the rest; every later step reads that cache.

    Args:
        vllm_config: vLLM's settings.
        prefix: of names of layers.

    Raises:
        ValueError: a model that cannot be served, with the reason.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        check_served(config)
        if vllm_config.quant_config is not None:
            raise ValueError("vLLM: quantization: LayAlign serves unquantised LLMs there")
        text = config.get_text_config()
        self.vocabulary, self.width = text.vocab_size, text.hidden_size
        self.has_bos = text.bos_token_id is not None
        path = model_config.model
        llm, revision = llm_place(path, config, model_config.revision)
        self.secondary_weights = [DefaultModelLoader.Source(llm, revision, prefix="llm.")]
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]
        self.llm = init_vllm_registered_model(vllm_config, prefix="llm", hf_config=text, architectures=[architecture])
        self.fused: list[CrossFusedAttention] = []
        self.modules_of_layers = attention_layers(self.llm)
        for layer in config.fused_layers:
            attention = self.modules_of_layers[layer]
            attention.attn = CrossFusedAttention(attention.attn, config.gate, vllm_config.cache_config)
            self.fused.append(attention.attn)
        at_once = vllm_config.scheduler_config.max_num_batched_tokens
        self.encoder_side = EncoderSide(config, path, model_config.dtype, at_once)

    def get_language_model(self) -> nn.Module:
        """The LLM."""
        return self.llm

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> torch.Tensor:
        """The LLM's embeddings (tokens, Dl); soft prompts come to their places in `forward`."""
        return self.llm.embed_input_ids(input_ids)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """The encoder outputs of questions, each (T, Dl + 2 L kv).

        Args:
            kwargs: `encoder_ids`, the encoder's ids of each question.
        """
        rows = [row.flatten() for row in kwargs["encoder_ids"]]
        outputs = self.encoder_side(rows)
        for row, output in zip(rows, outputs, strict=True):
            # vLLM hands on these very tensors.
            output.digits = digits(row.tolist(), self.vocabulary)
        return outputs

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states (tokens, Dl) of a step.

        Args:
            input_ids, positions: (tokens,), the batch's requests one after the other.
            intermediate_tensors, inputs_embeds, kwargs: not used.
            encoder_outputs: of the requests whose prompts this step reads, in any order.
        """
        embeddings = self.llm.embed_input_ids(input_ids)
        if encoder_outputs:
            embeddings = self._read_questions(input_ids, positions, embeddings, encoder_outputs)
        return self.llm(input_ids, positions, None, inputs_embeds=embeddings)

    def _read_questions(self, input_ids, positions, embeddings, encoder_outputs):
        """Soft prompts to their places in the embeddings, cross keys and values to the cache."""
        first = int(self.has_bos)
        # A prompt is read whole, from its first token on; padding stands behind all requests. What begins here and belongs to no output
        # is a request without a question: it must not end the engine, which serves the others.
        ids, places, waiting, ordered = input_ids.tolist(), positions.tolist(), list(encoder_outputs), []
        for start in (start + first for start, place in enumerate(places) if place == 0):
            found = (i for i, one in enumerate(waiting) if _stands_at(one, ids, places, start))
            index = next(found, None)
            if index is None:
                continue
            output = waiting.pop(index)
            ordered.append(output)
            end = start + len(output)
            embeddings[start:end] = output[:, : self.width]
            embeddings[end] = self.encoder_side.adapter.boundary
        if waiting:
            raise RuntimeError("vLLM handed over encoder outputs of other requests than those whose prompts it reads")
        together = torch.cat(ordered)[:, self.width :]
        for attention, (keys, values) in zip(self.fused, self.encoder_side.by_layer(together), strict=True):
            attention.write(keys, values)
        return embeddings

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The LLM's."""
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The trained part of the model's own folder, the LLM of where it is.

        Args:
            weights: (name, tensor), those of the LLM as transformers calls them behind `llm.`, after the trained part.

        Returns:
            The names of all parameters.

        Raises:
            ValueError: weights that are missing or do not fit.
        """
        trained: dict[str, torch.Tensor] = {}

        def of_llm():
            for name, tensor in weights:
                if name.startswith("llm.") and ".fusion_gate." not in name:
                    yield name.removeprefix("llm."), tensor
                else:
                    trained[name] = tensor

        loaded = self.llm.load_weights(of_llm())
        for layer, attention in zip(self.config.fused_layers, self.fused, strict=True):
            name = next(
                (name for name in trained if f".{layer}." in name and name.endswith(".fusion_gate.value")), None
            )
            if name is None or trained[name].shape != attention.gate.shape:
                raise ValueError(f"the trained part has no gate of layer {layer} that fits")
            attention.gate.data.copy_(trained.pop(name))
        self.encoder_side.load_trained(trained)
        self.encoder_side.take_projections([self.modules_of_layers[layer] for layer in self.config.fused_layers])
        own = {name for name, _ in self.named_parameters() if ".gate" in name or not name.startswith("llm.")}
        return {f"llm.{name}" for name in loaded} | own


def _stands_at(output: Any, ids: list[int], places: list[int], start: int) -> bool:
    """Whether soft prompts that begin at `start` are this output's: by its digits, and by room for them and the boundary in one row."""
    end = start + len(output)
    return (
        ids[start : start + len(output.digits)] == output.digits
        and end < len(places)
        and places[end] - places[start] == len(output)
    )
