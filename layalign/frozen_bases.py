"""FrozenBases: an encoder and an LLM in one PreTrainedModel, and what transformers asks of any model, answered by these two."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, SupportsIndex

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from layalign import fusion, limits, loading, sharing
from layalign.adapters import check_adapters
from layalign.arguments import NO_CODE
from layalign.configuration import LayAlignConfig
from layalign.offloading import execution_device
from layalign.pickling import picklable_state
from layalign.trained_parts import TrainedParts


class FrozenBases(TrainedParts):
    """Two pretrained bases, frozen until something of them is trained with the trained part.

    Args:
        config: settings; its configurations become those of the bases.
        encoder, llm: the bases, used as they are; None: of the configuration, with random weights.

    Attributes:
        encoder_limit, llm_limit: the most tokens that a base with learned positions reads; None: any number.
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
        if config.lacks_bases:
            raise ValueError(
                "LayAlignConfig needs encoder_config and llm_config; LayAlignForConditionalGeneration.from_bases sets both"
            )
        if llm is not None:
            fusion.check_free(llm)
        super().__init__(config)
        self.encoder: Any = None
        self.encoder_limit: int | None = None
        if config.encoder_config is not None:
            self.encoder = loading.build_encoder(config.encoder_config) if encoder is None else encoder
            config.encoder_config = self.encoder.config
            self.encoder.requires_grad_(False)
            # A first call would, under a lock that torch.compile cannot trace.
            maybe_install_capturing_hooks(self.encoder)
            self.encoder_limit = limits.position_limit(self.encoder)
            takes_cache = "use_cache" in inspect.signature(self.encoder.forward).parameters
            self._encoder_arguments = {"use_cache": False} if takes_cache else {}
        self.llm = (
            AutoModelForCausalLM.from_config(config.llm_config, **NO_CODE) if llm is None else sharing.own_modules(llm)
        )
        if config.train_llm and sharing.is_shared(self.llm):
            raise ValueError(sharing.TRAINED)
        config.llm_config = self.llm.config
        width, read = config.get_text_config().hidden_size, self.llm.get_input_embeddings().weight.shape[-1]
        if config.encoder_config is not None and read != width:  # opt-350m
            raise ValueError(
                f"llm: {type(self.llm).__name__} reads embeddings of width {read} and its layers have {width}; LayAlign joins LLMs where "
                "both are one"
            )
        self.llm.requires_grad_(False)
        self.llm_limit = limits.position_limit(self.llm)
        bases = [base for base in (self.encoder, self.llm) if base is not None]
        self._no_split_modules = sorted({name for base in bases for name in base._no_split_modules or []})
        self.generation_config = self.llm.generation_config
        # transformers takes it from the class's name, and its Trainer then counts label tokens as if the first column had nothing before
        # it. A label there is predicted by the beginning of sequence or the soft prompts, unless there are neither.
        first_is_predicted = config.adapter is not None or config.get_text_config().bos_token_id is not None
        self.loss_type = None if first_is_predicted else "ForCausalLM"

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's. PEFT leaves `peft_config` here, and merges adapters by `.data`, without a trace in what was folded before."""
        super().__setattr__(name, value)
        if name == "peft_config" and (aligner := self._modules.get("aligner")) is not None:
            aligner.forget_folded()

    def encoder_states(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
        """The encoder's output with all its hidden states; without gradients, unless it is trained.

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
        with nullcontext() if self.config.train_encoder else torch.no_grad():
            return self.encoder(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, **self._encoder_arguments
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenBases:
        """A model of its own, where a pickle is refused too."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """For pickle.

        Raises:
            pickle.PicklingError: where `save_pretrained` is the way, see `layalign.pickling`.
        """
        make, arguments, _, *rest = super().__reduce_ex__(protocol)
        return make, arguments, picklable_state(self), *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle."""
        super().__setstate__(state)
        if self.encoder is not None:
            maybe_install_capturing_hooks(self.encoder)

    def init_weights(self) -> None:
        """Nothing to do: the bases bring their weights, and the trained part was initialised where it was made."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The bases tie their own weights."""

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the adapter's output already requires gradients."""

    @property
    def device(self) -> torch.device:
        """Where inputs belong: with the first parameter, or, where that is offloaded, where accelerate's hooks bring it."""
        device = super().device
        return device if device.type != "meta" else execution_device(self) or device

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.llm.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.llm.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.llm.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Another size of the LLM's vocabulary, where the LLM is trained and saved with the model. Arguments as in transformers.

        Raises:
            ValueError: a frozen LLM, of which new tokens' embeddings would be neither trained nor saved.
        """
        embeddings = self.llm.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        wanted = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == embeddings.num_embeddings:
            return embeddings
        if not self.config.train_llm:
            raise ValueError(
                f"resize_token_embeddings: got {wanted} tokens, the frozen LLM has {embeddings.num_embeddings}, and new embeddings would "
                "be neither trained nor saved with it; resize and save the LLM and build on that (from_bases), or train it (train_llm=True)"
            )
        return self.llm.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _ask_for_states(self, arguments: dict[str, Any]) -> None:
        """Leave in a call's arguments what the LLM is asked for beside logits.

        Raises:
            ValueError: attention weights of an LLM whose attention is LayAlign's, or a misspelt input of the encoder, which an LLM would
                take and not look at.
        """
        if unknown := [name for name in arguments if name.startswith("encoder_")]:
            raise ValueError(
                f"{unknown[0]}: no such input; takes encoder_input_ids, encoder_attention_mask and encoder_cu_seqlens"
            )
        for name in ("output_hidden_states", "output_attentions"):
            asked = arguments.pop(name, None)
            if asked if asked is not None else getattr(self.config, name):
                arguments[name] = True
        if (
            "output_attentions" in arguments
            and self.llm.config.get_text_config(decoder=True)._attn_implementation == fusion.NAME
        ):
            raise ValueError(
                "output_attentions: the fused attention never makes the attention weights; leave it out (layalign analyze measures what "
                "the cross-attention adds)"
            )

    def train(self, mode: bool = True) -> FrozenBases:
        """Training mode for the trained part. An encoder that is frozen stays in eval mode, and dropout in a frozen LLM stays off: the
        LLM's own flag must follow `mode`, as gradient checkpointing looks at it.

        Raises:
            ValueError: adapters on the LLM that came after the model was made.
        """
        super().train(mode)
        if hasattr(self, "llm"):
            if mode:
                check_adapters(self, saving=False)
            if self.encoder is not None:
                self.encoder.train(mode and any(own.requires_grad for own in self.encoder.parameters()))
            self._dropout(mode)
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
            if part == "encoder_config" and self.encoder is not None:
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
