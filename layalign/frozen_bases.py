"""FrozenBases: an encoder and an LLM in one PreTrainedModel, and what transformers asks of any model, answered by these two."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from layalign import fusion, loading
from layalign.configuration import LayAlignConfig


class FrozenBases(PreTrainedModel):
    """Two pretrained bases, of which nothing is trained.

    Args:
        config: settings; its configurations become those of the bases.
        encoder, llm: the bases, used as they are; None: of the configuration, with random weights.

    Attributes:
        encoder_limit: the most tokens that an encoder with learned positions reads; None: any number.
    """

    config_class = LayAlignConfig
    base_model_prefix = "layalign"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = None
    input_modalities = ("text",)

    def __init__(
        self, config: LayAlignConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None
    ):
        if config.encoder_config is None or config.llm_config is None:
            raise ValueError(
                "LayAlignConfig needs encoder_config and llm_config; LayAlignForConditionalGeneration.from_bases sets both"
            )
        super().__init__(config)
        self.encoder = loading.build_encoder(config.encoder_config) if encoder is None else encoder
        self.llm = AutoModelForCausalLM.from_config(config.llm_config) if llm is None else llm
        config.encoder_config, config.llm_config = self.encoder.config, self.llm.config
        self._no_split_modules = sorted({*(self.encoder._no_split_modules or []), *(self.llm._no_split_modules or [])})
        self.encoder.requires_grad_(False)
        self.llm.requires_grad_(False)
        self.encoder_limit = loading.encoder_limit(self.encoder)
        takes_cache = "use_cache" in inspect.signature(self.encoder.forward).parameters
        self._encoder_arguments = {"use_cache": False} if takes_cache else {}
        self.generation_config = self.llm.generation_config

    @torch.no_grad()
    def encoder_states(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """The encoder's output with all its hidden states.

        Args:
            ids: (B, T) long.
            mask: (B, T) bool, True = real token; None where all are, which transformers would look for itself and wait for a GPU.

        Raises:
            ValueError: more tokens than `encoder_limit`.
        """
        if self.encoder_limit is not None and ids.shape[1] > self.encoder_limit:
            raise ValueError(
                f"encoder_input_ids has {ids.shape[1]} tokens in a row, the encoder takes {self.encoder_limit}; the processor's "
                f"encoder_max_length={self.encoder_limit} cuts what is longer"
            )
        mask = None if mask is None else mask.long()
        return self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, **self._encoder_arguments)

    def init_weights(self) -> None:
        """Nothing to do: the bases bring their weights, and the trained part was initialised where it was made."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The bases tie their own weights."""

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the adapter's output already requires gradients."""

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.llm.set_input_embeddings(value)

    def train(self, mode: bool = True) -> FrozenBases:
        """Training mode for the trained part. The encoder stays in eval mode, and dropout in the frozen LLM stays off: the LLM's
        own flag must follow `mode`, as gradient checkpointing looks at it."""
        super().train(mode)
        if hasattr(self, "encoder") and hasattr(self, "llm"):
            self.encoder.eval()
            for module in self.llm.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs: Any) -> None:
        """Set the encoder's attention implementation (a name, or {"encoder_config": name}).

        Raises:
            ValueError: an implementation for the LLM, whose attention is LayAlign's own wherever there is an aligner.
        """
        wanted = (
            attn_implementation if isinstance(attn_implementation, dict) else {"encoder_config": attn_implementation}
        )
        for part, name in wanted.items():
            if part == "encoder_config":
                self.encoder.set_attn_implementation(name, **kwargs)
            elif part == "llm_config" and (not self.config.fused_layers or name == fusion.NAME):
                self.llm.set_attn_implementation(name, **kwargs)
            else:
                raise ValueError(
                    f"{part!r}: {name!r} would drop the cross-attention; choose the fused operator's backend by config.attention_backend, "
                    'and the encoder\'s attention by {"encoder_config": name}'
                )

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs: Any
    ) -> None:
        """Checkpoint the LLM's layers (transformers' enable and disable methods end here).

        Raises:
            ValueError: reentrant checkpointing, which cannot work: all layers share the aligner's output.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "gradient checkpointing needs use_reentrant=False: all LLM layers share the aligner's output"
            )
        self.llm._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
