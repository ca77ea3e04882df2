"""LayAlignForConditionalGeneration: a frozen encoder and a frozen LLM, joined by adapter, layer-wise aligner and gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from layalign import fusion, saving, sequence
from layalign.configuration import LayAlignConfig
from layalign.frozen_bases import FrozenBases
from layalign.generation.mixin import LayAlignGenerationMixin
from layalign.kernels.dispatch import autocast_dtype
from layalign.loading import load_encoder, load_llm
from layalign.modules import Adapter, Gate, LayerwiseAligner
from layalign.outputs import Encoded, LayAlignOutput
from layalign.projections import attention_modules, key_value_projection, split_heads
from layalign.published import PublishedCheckpoint, write_published
from layalign.saving import Source, Weights
from layalign.sequence import Assembled, Lengths, Part


class LayAlignForConditionalGeneration(FrozenBases, LayAlignGenerationMixin):
    """LayAlign (arXiv 2502.11405) over any transformers encoder and LLM. Build it with `from_bases`, `from_pretrained` or
    `from_published`; only adapter, aligner and gates are trained and saved.

    Args:
        config: settings, with the configurations of both bases.
        encoder, llm: the bases as modules; None: with random weights.

    Raises:
        ValueError: an LLM that LayAlign cannot be joined to, or settings without bases.
    """

    def __init__(
        self, config: LayAlignConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None
    ):
        super().__init__(config, encoder, llm)
        text = config.get_text_config()
        encoder_size, llm_size = config.encoder_config.hidden_size, text.hidden_size
        layers = config.fused_layers
        self.adapter = Adapter(config.adapter, encoder_size, llm_size) if config.adapter else None
        self.aligner = None
        if self.adapter is not None:
            nn.init.normal_(self.adapter.boundary, std=self.llm.get_input_embeddings().weight.float().std().item())
        if config.aligner and layers:
            states, average = len(config.mixed_states), config.encoder_states == "mean"
            self.aligner = LayerwiseAligner(config.aligner, states, len(layers), encoder_size, llm_size, average)
            self._attach(layers, text)
        self._seen_fused = False
        self.post_init()
        self.train(self.training)

    def _attach(self, layers: list[int], text: Any) -> None:
        modules = attention_modules(self.llm)
        self._projections = [key_value_projection(modules[layer], text) for layer in layers]
        for layer in layers:
            gate = Gate(self.config.gate, text.num_attention_heads, text.hidden_size)
            modules[layer].fusion_gate = gate.to(self.device)
            if self.config.gate == "dynamic":
                modules[layer].register_forward_pre_hook(fusion.dynamic_gate_hook, with_kwargs=True)
        fusion.swap_attention(self.llm)

    @classmethod
    def from_bases(
        cls, encoder: Source, llm: Source, *, dtype: torch.dtype | None = None, **settings: Any
    ) -> LayAlignForConditionalGeneration:
        """Join two pretrained bases with a fresh trained part.

        Args:
            encoder: name, folder, `layalign:NAME` or module of the multilingual encoder.
            llm: the same for the causal LLM. A module is used as it is: its attention implementation is set to LayAlign's and
                gates are added to its attention modules.
            dtype: dtype of the bases (default: as stored). The trained part is made in fp32.
            settings: LayAlignConfig settings.

        Raises:
            ValueError: a base that cannot be loaded or whose attention cannot be swapped, or a wrong setting.
        """
        unknown = sorted(settings.keys() - LayAlignConfig.__annotations__.keys())
        if unknown:
            raise ValueError(
                f"unknown LayAlignConfig settings {unknown}; it takes {sorted(LayAlignConfig.__annotations__)}"
            )
        encoder_module, llm_module = load_encoder(encoder, dtype), load_llm(llm, dtype)
        config = LayAlignConfig(
            encoder_config=encoder_module.config,
            llm_config=llm_module.config,
            encoder_name_or_path=saving.reference(encoder, encoder_module),
            llm_name_or_path=saving.reference(llm, llm_module),
            **settings,
        )
        return cls(config, encoder_module, llm_module)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        encoder: Source | None = None,
        llm: Source | None = None,
        config: LayAlignConfig | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> LayAlignForConditionalGeneration:
        """Load a saved trained part and the bases it refers to.

        Args:
            path: folder or hub name written by `save_pretrained`.
            encoder, llm: other places (or modules) for the same bases.
            config: settings instead of the saved ones.
            dtype: dtype of the bases; the trained part takes it as well unless it is None.
            kwargs: what transformers passes along; unused.

        Raises:
            ValueError: no LayAlign model at `path`, a base that cannot be found or does not fit, weights that are damaged or do
                not fit.
        """
        saved = saving.read_saved(str(path), encoder, llm, config, dtype)
        model = cls(saved.config, saved.encoder, saved.llm)
        saving.load_trained_part(model, saved.trained, str(path))
        if dtype is not None:
            for _, parameter in model.trained_parameters():
                parameter.data = parameter.data.to(saved.llm.dtype)
        return model.eval()._folded_on_accelerator()

    @classmethod
    def from_published(
        cls,
        checkpoint: str | Path,
        *,
        encoder: Source,
        llm: Source,
        compatible: bool = False,
        check_bases: bool = True,
        **settings: Any,
    ) -> LayAlignForConditionalGeneration:
        """Load the authors' checkpoint onto its two bases.

        Args:
            checkpoint: path of `pytorch_model.bin`. Only tensors are read: a pickle with code in it is refused, unexecuted.
            encoder, llm: the bases it was trained on (names, folders or modules).
            compatible: reproduce the published code's quirks: no padding mask in the cross-attention, and what `published_training`
                in LayAlignConfig describes. Off, answers and losses do not depend on the batch.
            check_bases: compare the bases inside the checkpoint with the given ones.
            settings: of `from_bases`.

        Raises:
            ValueError: not such a checkpoint, a damaged or unsafe file, or bases that are not the ones in it.
        """
        published = PublishedCheckpoint.read(checkpoint)
        if compatible:
            settings |= {"mask_cross_padding": False, "published_training": True}
        model = cls.from_bases(
            encoder, llm, aligner=published.aligner, encoder_layers=published.encoder_layers, **settings
        )
        saving.load_trained_part(model, published.trained_part(model.llm, model.config), str(checkpoint))
        if check_bases:
            published.check_bases(model.encoder, model.llm)
        return model.eval()._folded_on_accelerator()

    def save_pretrained(self, save_directory: str | Path, *, state_dict: Weights | None = None, **kwargs: Any) -> None:
        """Write config.json and the trained part (safetensors); the bases are only referred to. Arguments as in transformers."""
        super().save_pretrained(save_directory, state_dict=self.trained_state_dict(state_dict), **kwargs)

    def save_published(self, path: str | Path) -> None:
        """Write the authors' format: the whole state dict, bases included. See `layalign.published.write_published`."""
        write_published(path, self.config, self.encoder, self.llm, self.trained_state_dict())

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of adapter, aligner and gates; every other parameter is frozen."""
        return saving.trained_parameters(self)

    def trained_state_dict(self, state_dict: Weights | None = None) -> Weights:
        """The trained part of a state dict (default: this model's)."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in state_dict.items() if saving.is_trained(name)}

    @property
    def num_trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.trained_parameters())

    def gates(self) -> torch.Tensor:
        """The gates of the fused layers: (L, 1) for "scalar", (L, Hq) for "head".

        Raises:
            ValueError: dynamic gates, which have no value apart from an input, or a model without an aligner.
        """
        if self.aligner is None or self.config.gate == "dynamic":
            raise ValueError(f"gates() needs an aligner and gate 'scalar' or 'head', got gate {self.config.gate!r}")
        modules = attention_modules(self.llm)
        return torch.stack([modules[layer].fusion_gate.value.detach().float() for layer in self.config.fused_layers])

    def encode(
        self,
        encoder_input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Encoded:
        """Everything the LLM needs from the encoder, once per input.

        Where much padding is left after squeezing, adapter and aligner run on the real tokens only, and the results are zeros at
        padding.

        Args:
            encoder_input_ids: (B, T) long.
            encoder_attention_mask: (B, T), True or 1 = real token, any pattern; None = all real.
            lengths: the number of real tokens of each row, see `Lengths`.

        Raises:
            ValueError: more tokens than `encoder_limit`, the most that an encoder with learned positions reads; None: any number.
        """
        ids, mask = sequence.ids_and_mask(
            "encoder_input_ids",
            encoder_input_ids,
            encoder_attention_mask,
            self.encoder.get_input_embeddings().num_embeddings,
        )
        places = padding = None
        if self.config.mask_cross_padding:
            order, mask, tokens, padding = sequence.squeeze(mask, "right", lengths)
            ids = ids.gather(1, order)
            places = sequence.real_tokens(mask, tokens)
        out = self.encoder_states(ids, None if padding is not None and padding.span is None else mask)
        soft = None
        if self.adapter is not None:
            soft = self.adapter(sequence.pack(out.last_hidden_state, places)).to(self.llm.dtype)
            soft = sequence.unpack(soft, places, mask)
        if self.aligner is None:
            return Encoded(soft, mask, padding=padding)
        keys, values = self.aligner(
            [sequence.pack(out.hidden_states[index], places) for index in self.config.mixed_states],
            self._projections,
            self._compute_dtype(),
            self._aligner_backend(),
            fold=self.config.fold_at_inference,
        )
        keys, values = split_heads(self._projections, keys, values)
        keys, values = (sequence.unpack(part, places, mask, dim=1).permute(1, 0, 3, 2, 4) for part in (keys, values))
        return Encoded(soft, mask, keys, values, padding)

    def fold(self) -> LayAlignForConditionalGeneration:
        """This model, its aligner folded into the key and value projections now, as the first inference call else does.

        It takes 4 L kv Dl De operations (4.4 TFLOP for mT5-xl and a 7B LLM with MHA: a minute on a CPU) and keeps 2 L kv De values
        until a weight changes, the model is moved or trained. Nothing happens where inference would not use them: in training
        mode, with `fold_at_inference=False`, an aligner that is not "linear" or projections that are not plain linear layers.
        """
        if self.aligner is not None and self.config.fold_at_inference:
            with torch.no_grad():
                self.aligner.folded_weights(self._projections, self._compute_dtype(), self._aligner_backend())
        return self

    def _folded_on_accelerator(self) -> LayAlignForConditionalGeneration:
        """Folded after loading, unless weights are on a CPU, where the model may be about to move."""
        devices = {parameter.device.type for parameter in self.parameters()}
        return self if devices & {"cpu", "meta"} else self.fold()

    def _compute_dtype(self) -> torch.dtype:
        """The dtype of cross keys and values: autocast's, or the LLM's."""
        return autocast_dtype(self.llm.get_input_embeddings().weight) or self.llm.dtype

    def _aligner_backend(self) -> str:
        """The attention's, where the aligner's operators have it."""
        backend = self.config.attention_backend
        return "auto" if backend == "flash" else backend

    def assemble(
        self,
        soft: torch.Tensor | None,
        soft_mask: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> Assembled:
        """The LLM's input sequence: `[bos][soft prompts][boundary][input_ids]`, padding squeezed to the left.

        Args:
            soft: (B, T, Dl), soft prompts, or None.
            soft_mask: (B, T) bool, their mask; without soft prompts it tells the number of rows.
            input_ids: (B, M) long.
            attention_mask: (B, M), True or 1 = real token; None = all real.
            labels: (B, M) long, -100 where no loss.
            lengths: see `Lengths`.

        Raises:
            ValueError: rows or labels that do not fit, or nothing to read.
        """
        embed = self.llm.get_input_embeddings()
        rows, ones = len(soft_mask), soft_mask.new_ones(len(soft_mask), 1)
        of_soft, of_text, _ = lengths or (None, None, None)
        parts = []
        bos = self.config.get_text_config().bos_token_id
        if bos is not None:
            bos = bos[0] if isinstance(bos, (list, tuple)) else bos
            parts.append(Part(embed(torch.full((rows, 1), bos, device=soft_mask.device)), ones, [1] * rows))
        if soft is not None and self.adapter is not None:
            boundary = self.adapter.boundary.to(soft.dtype).expand(rows, 1, -1)
            parts += [Part(soft, soft_mask, of_soft), Part(boundary, ones, [1] * rows)]
        if input_ids is not None:
            ids, mask = sequence.ids_and_mask("input_ids", input_ids, attention_mask, embed.num_embeddings)
            if ids.shape[0] != rows:
                found = f"input_ids has {ids.shape[0]} rows, encoder_input_ids {rows}"
                raise ValueError(f"{found}; both need one row per example")
            parts.append(Part(embed(ids), mask, of_text))
        if not parts:
            raise ValueError("nothing for the LLM to read: no bos token, no adapter and no input_ids")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            got = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {got}")
        return sequence.join(parts, self.llm.dtype, labels, self.config.published_training)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cross: fusion.CrossInputs | None = None,
        lengths: Lengths | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LayAlignOutput:
        """Loss and logits of `[bos][soft prompts][boundary][input_ids]`.

        Args:
            input_ids, attention_mask, labels: (B, M), prompt and target in one row; labels -100 where no loss. Masks may have holes.
            encoder_input_ids, encoder_attention_mask: (B, T), the question for the encoder.
            inputs_embeds, position_ids, past_key_values, cross: (B, S, Dl), (B, S), the LLM's cache, and cross keys and values: the
                inputs of `generate`'s steps, as `encode` and `assemble` make them; with them input_ids are continuation tokens.
            lengths: see `Lengths`.
            logits_to_keep: as in transformers; ignored where labels are given.
            kwargs: `num_items_in_batch`, the label tokens in the whole optimizer step (gradient accumulation; default: in this
                call), `use_cache` (default: False), and what else the LLM takes.

        Raises:
            ValueError: inputs that do not go together.
            RuntimeError: an LLM that does not use LayAlign's attention.
        """
        if self.aligner is not None:
            fusion.check_swapped(self.llm)
        label_count = kwargs.pop("num_items_in_batch", None)
        use_cache = bool(kwargs.pop("use_cache", None))
        targets = None
        if encoder_input_ids is not None:
            if inputs_embeds is not None or past_key_values is not None or cross is not None:
                raise ValueError(
                    "encoder_input_ids starts a new sequence: do not give inputs_embeds, past_key_values or cross with it"
                )
            asked = (encoder_input_ids, encoder_attention_mask), (input_ids, attention_mask), labels
            lengths = lengths or sequence.measure(*asked, self.config.published_training)
            encoded = self.encode(encoder_input_ids, encoder_attention_mask, lengths and lengths.encoder)
            assembled = self.assemble(encoded.soft, encoded.mask, input_ids, attention_mask, labels, lengths)
            inputs_embeds, attention_mask, aligned, padding = assembled
            cross, input_ids = encoded.cross(padding), None
            if aligned is not None and labels is not None:
                targets, logits_to_keep = sequence.predicting_columns(aligned, lengths, labels.shape[1])
        elif labels is not None:
            raise ValueError("labels need encoder_input_ids: the loss is computed over the assembled sequence")
        elif past_key_values is None and inputs_embeds is None:
            raise ValueError("encoder_input_ids is missing: give the encoder's tokens (a LayAlignProcessor makes them)")
        if position_ids is None and past_key_values is None and attention_mask is not None:
            count_padding = labels is not None and self.config.published_training
            position_ids = sequence.positions(attention_mask, count_padding)
        states = None
        if cross is not None:
            cross = cross if self.config.mask_cross_padding else cross._replace(mask=None, span=None)
            states = fusion.CrossStates(cross, self.config.fused_layers, self.config.attention_backend)
            kwargs["fusion"] = states
        out = self.llm(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if states is not None and not self._seen_fused:
            fusion.check_used(self.llm, states)
            self._seen_fused = True
        loss = None if targets is None else sequence.token_loss(out.logits, targets, label_count)
        return LayAlignOutput(loss, out.logits, targets, attention_mask, out.past_key_values)


AutoModel.register(LayAlignConfig, LayAlignForConditionalGeneration)
AutoModelForCausalLM.register(LayAlignConfig, LayAlignForConditionalGeneration)
