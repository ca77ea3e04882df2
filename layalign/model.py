"""LayAlignForConditionalGeneration: a frozen encoder and a frozen LLM, joined by adapter, layer-wise aligner and gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from layalign import families, fusion, label_loss, limits, packing, saving, sequence
from layalign.adapters import take_adapter, unwrapped
from layalign.arguments import PLACE, Arguments, sorted_arguments
from layalign.assembling import AssemblingModel
from layalign.base_models import Source, load_base, write_down
from layalign.compatibility import CACHE
from layalign.configuration import SETTINGS, LayAlignConfig
from layalign.generation.mixin import LayAlignGenerationMixin
from layalign.label_loss import LabelLoss
from layalign.lora import add_lora, check_bare
from layalign.modules import Adapter, Gate, LayerwiseAligner
from layalign.offloading import at_hand, working_device
from layalign.outputs import LayAlignOutput
from layalign.packing import PackedInputs
from layalign.parts import let_train, parts_of
from layalign.projections import attention_modules, key_value_projections
from layalign.published import PublishedCheckpoint, write_published
from layalign.quantization import with_libraries
from layalign.sequence import Lengths
from layalign.spreading import gather_parts

DType = torch.dtype | str | dict[str, Any] | None


class LayAlignForConditionalGeneration(AssemblingModel, LayAlignGenerationMixin):
    """LayAlign (arXiv 2502.11405) over any transformers encoder and LLM. Build it with `from_bases`, `from_pretrained` or
    `from_published`; only adapter, aligner and gates are trained and saved, and, where asked for, LoRA on the LLM or the LLM.

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
        encoder_size, llm_size = getattr(config.encoder_config, "hidden_size", 0), text.hidden_size
        layers = config.fused_layers
        self.adapter = self.aligner = None
        if config.adapter:
            self.adapter = Adapter(config.adapter, encoder_size, llm_size, config.adapter_width)
        if self.adapter is not None:
            self.adapter.draw_boundary(at_hand(self.llm.get_input_embeddings(), "weight"))
        if config.aligner and layers:
            states, average = len(config.mixed_states), config.encoder_states == "mean"
            self.aligner = LayerwiseAligner(
                config.aligner, states, len(layers), encoder_size, llm_size, average, config.aligner_width
            )
            self._attach(layers, text)
        check_bare(self.llm)
        if config.lora is not None:
            add_lora(self.llm, config.lora)
        self._seen_fused = self._packable = False
        self._label_loss = LabelLoss()
        self.post_init()
        let_train(self, parts_of(config))
        self.train(self.training)

    def _attach(self, layers: list[int], text: Any) -> None:
        modules = attention_modules(self.llm)
        self._projections = key_value_projections(self.llm, layers)
        families.bring_arguments(self.llm, [modules[layer] for layer in layers])
        for layer, projection in zip(layers, self._projections, strict=True):
            gate = Gate(self.config.gate, text.num_attention_heads, text.hidden_size)
            place = working_device(projection.modules[0], self.device)
            modules[layer].fusion_gate = gate.to(place)
            if self.config.gate == "dynamic":
                modules[layer].register_forward_pre_hook(fusion.dynamic_gate_hook, with_kwargs=True)
        fusion.swap_attention(self.llm)
        families.check_unproven(self.llm, self._projections)

    @classmethod
    def from_bases(
        cls,
        encoder: Source | None,
        llm: Source,
        *,
        dtype: DType = None,
        check_bases: bool = True,
        **arguments: Any,
    ) -> LayAlignForConditionalGeneration:
        """Join two pretrained bases with a fresh trained part.

        Args:
            encoder: name, folder, `layalign:NAME` or module of the multilingual encoder; None: an LLM alone.
            llm: the same for the causal LLM. A module is used as it is: its attention implementation is set to LayAlign's and
                gates are added to its attention modules; an adapter on it (PEFT's LoRA) becomes the setting `lora`, trained and
                saved with the model. A further model of the same LLM shares its weights and nothing else.
            dtype: dtype of the bases, {"encoder": ..., "llm": ...} for each its own (default: as stored). The trained part is
                made in fp32.
            check_bases: refuse bases with NaN or Inf among their weights.
            arguments: LayAlignConfig settings, and those of `from_pretrained` but revision and subfolder, which are each base's own
                (encoder_kwargs, llm_kwargs).

        Raises:
            ValueError: a base that cannot be loaded or whose attention cannot be swapped, or a wrong argument.
        """
        given = sorted_arguments("from_bases", arguments | {"dtype": dtype}, SETTINGS, own_files=False)
        settings = given.settings
        if encoder is None:
            settings = {"adapter": None, "aligner": None} | settings
        # Checked before anything is loaded; what is loaded is then checked against it.
        config = LayAlignConfig(**settings)
        settings["quantization"] = with_libraries((config.quantization or {}) | given.quantization or None)
        modules = {
            role: load_base(role, source, given, settings["quantization"], check_bases)
            for role, source in (("encoder", encoder), ("llm", llm))
            if source is not None
        }
        encoder_module, llm_module = modules.get("encoder"), modules["llm"]
        config = LayAlignConfig(
            encoder_config=None if encoder_module is None else encoder_module.config,
            llm_config=llm_module.config,
            **settings,
        )
        if encoder is not None:
            write_down(config, "encoder", encoder, modules["encoder"], given.encoder)
        write_down(config, "llm", unwrapped(llm), llm_module, given.llm)
        taken = take_adapter(llm_module) if config.lora is None else None
        if taken is None:
            return cls(config, encoder_module, llm_module)._placed(given).train_only()
        with taken:
            config.lora = taken.settings
            model = cls(config, encoder_module, llm_module)
        return model._placed(given).train_only()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        encoder: Source | None = None,
        llm: Source | None = None,
        config: LayAlignConfig | None = None,
        dtype: DType = None,
        quantization: Any = None,
        check_bases: bool = True,
        **arguments: Any,
    ) -> LayAlignForConditionalGeneration:
        """Load a saved trained part and the bases it refers to.

        Args:
            path: folder or hub name written by `save_pretrained`.
            encoder, llm: other places (or modules) for the same bases.
            config: settings instead of the saved ones.
            dtype: of the weights, torch's or by name, {"encoder": ..., "llm": ...} for each base its own; the trained part takes
                the LLM's. None or "auto": as stored.
            quantization: of the bases, see LayAlignConfig; None: as saved; "none": none.
            check_bases: refuse bases with NaN or Inf, or of other weights than those trained with as far as a few of them tell.
            arguments: transformers' device_map, max_memory, offload_folder, offload_buffers (of the LLM; encoder and trained part go
                where it reads its inputs), quantization_config (of the LLM, or {"encoder": ..., "llm": ...}), attn_implementation
                (of the encoder); revision and subfolder (of `path`); token, cache_dir, local_files_only, force_download, proxies (of
                `path` and the bases); trust_remote_code, use_safetensors, weights_only, variant (of the bases); encoder_kwargs and
                llm_kwargs, mappings of these for one base; and LayAlignConfig settings in place of the saved ones.

        Raises:
            ValueError: no LayAlign model at `path`, a base that cannot be found or does not fit, weights that are damaged or do
                not fit, an argument that is none of these or says nothing here.
        """
        given = sorted_arguments(
            "from_pretrained", arguments | {"dtype": dtype, "quantization": quantization}, SETTINGS
        )
        if config is not None and given.attn_implementation is None:
            given = replace(given, attn_implementation=getattr(config, "_attn_implementation", None))
        saved = saving.read_saved(str(path), encoder, llm, config, given, check_bases)
        model = cls(saved.config, saved.encoder, saved.llm)._placed(given)
        saving.load_saved_part(model, saved, str(path), given)
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
        **arguments: Any,
    ) -> LayAlignForConditionalGeneration:
        """Load the authors' checkpoint onto its two bases.

        Args:
            checkpoint: path of `pytorch_model.bin`, its folder or hub name. It is mapped, not read into memory. Only tensors are
                read: a pickle with code in it is refused, unexecuted.
            encoder, llm: the bases it was trained on (names, folders or modules).
            compatible: reproduce the published code's quirks: no padding mask in the cross-attention, and what `published_training`
                in LayAlignConfig describes. Off, answers and losses do not depend on the batch.
            check_bases: compare the bases inside the checkpoint with the given ones, which finds NaN as well.
            arguments: of `from_bases`, and revision and subfolder of the checkpoint.

        Raises:
            ValueError: not such a checkpoint, a damaged or unsafe file, or bases that are not the ones in it.
        """
        own = sorted_arguments("from_published", arguments, SETTINGS).own
        published = PublishedCheckpoint.read(checkpoint, **own)
        rest = {name: value for name, value in arguments.items() if name not in PLACE}
        if compatible:
            rest |= {"mask_cross_padding": False, "published_training": True}
        rest = {"aligner": published.aligner, "encoder_layers": published.encoder_layers, **rest}
        model = cls.from_bases(encoder, llm, check_bases=False, **rest)  # compared below, in parts: files may be large
        saving.load_trained_part(model, published.trained_part(model.llm, model.config), str(checkpoint))
        if check_bases:
            published.check_bases(model.encoder, model.llm)
        return model.eval()._folded_on_accelerator()

    def _placed(self, arguments: Arguments) -> LayAlignForConditionalGeneration:
        """This model, its parts where the LLM's device map has them and its encoder's attention as asked for."""
        if arguments.devices:
            gather_parts(self)
        if arguments.attn_implementation is not None:
            try:
                self.set_attn_implementation(arguments.attn_implementation)
            except (ValueError, ImportError) as error:
                raise ValueError(f"attn_implementation: {error}") from error
        return self

    def save_published(self, path: str | Path) -> None:
        """Write the authors' format: the whole state dict, bases included. See `layalign.published.write_published`; LoRA has no
        place in it, `merge_lora` first."""
        write_published(path, self.config, self.encoder, self.llm, self.trained_state_dict())

    @can_return_tuple
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
        cu_seqlens: torch.Tensor | None = None,
        encoder_cu_seqlens: torch.Tensor | None = None,
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
            cu_seqlens, encoder_cu_seqlens: (n + 1,) int32, from 0 up to M and to T: n examples packed end to end, without padding and
                without masks, in one row of input_ids and labels (1, M) and one of encoder_input_ids (1, T). Each sees itself alone.
            kwargs: `cache`, the newer name of past_key_values; `num_items_in_batch`, the label tokens in the whole optimizer step
                (gradient accumulation; default: in this call); without labels it means that the caller makes the loss of them, as a
                Trainer does that smooths labels, and logits (B, M, V) come out as if all of input_ids were labels; `skip_logits`,
                whether labels are scored without all their logits at once and no logits are returned (default: in training
                mode); `only_scored`, see LayAlignOutput; `use_cache` (default: False); `return_dict`, `output_hidden_states`, and
                what else the LLM takes.

        Raises:
            ValueError: inputs that do not go together, more than the LLM's positions, packed ones for an LLM that does not keep
                them apart, or output_attentions, which the fused attention has not.
            RuntimeError: an LLM that does not use LayAlign's attention.
        """
        if self.aligner is not None:
            fusion.check_swapped(self.llm)
        label_count = kwargs.pop("num_items_in_batch", None)
        use_cache = bool(kwargs.pop("use_cache", None))
        skip_logits, only_scored = kwargs.pop("skip_logits", None), kwargs.pop("only_scored", False)
        self._ask_for_states(kwargs)
        loss_outside = False
        if labels is None and label_count is not None and input_ids is not None and encoder_input_ids is not None:
            loss_outside = True
            labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
        if labels is not None:
            labels = sequence.checked_labels(labels, self.config.get_text_config().vocab_size)
        label_places = None if labels is None else sequence.label_places(labels)
        wanted: Any = labels
        none: Any = None
        places = columns = bounds = none
        cache = kwargs.pop("cache", None)
        if cache is not None and past_key_values is not None:
            raise ValueError("past_key_values and cache are two names for one thing: give one of them")
        past_key_values = cache if past_key_values is None else past_key_values
        if encoder_input_ids is not None:
            if inputs_embeds is not None or past_key_values is not None or cross is not None:
                raise ValueError(
                    "encoder_input_ids starts a new sequence: do not give inputs_embeds, past_key_values or cross with it"
                )
            question, text = (encoder_input_ids, encoder_attention_mask), (input_ids, attention_mask)
            if cu_seqlens is not None or encoder_cu_seqlens is not None:
                if attention_mask is not None or encoder_attention_mask is not None or use_cache:
                    raise ValueError(
                        "packed inputs have no padding and no cache: do not give masks or use_cache with cu_seqlens"
                    )
                packed = PackedInputs(encoder_input_ids, encoder_cu_seqlens, input_ids, cu_seqlens, label_places)
                inputs_embeds, position_ids, cross, bounds, places, columns = self._read_packed(packed, lengths)
                # All real, so that transformers looks for no packing of its own in position_ids.
                attention_mask = torch.ones_like(position_ids, dtype=torch.bool)
            else:
                lengths = lengths or sequence.measure(question, text, labels, self.config.published_training)
                encoded = self.encode(*question, lengths and lengths.encoder)
                assembled = self.assemble(encoded.soft, encoded.mask, *text, label_places, lengths)
                inputs_embeds, attention_mask, aligned, padding = assembled
                cross = encoded.cross(padding)
                if aligned is not None and labels is not None:
                    places, columns = sequence.predicting_columns(aligned, lengths, labels.shape[1])
            input_ids = None
        elif labels is not None:
            raise ValueError("labels need encoder_input_ids: the loss is computed over the assembled sequence")
        elif past_key_values is None and inputs_embeds is None:
            raise ValueError("encoder_input_ids is missing: give the encoder's tokens (a LayAlignProcessor makes them)")
        elif cross is None and self.aligner is not None:
            raise ValueError("cross is missing: a step after the first takes what encode(...).cross(...) gave")
        if position_ids is None and past_key_values is None and attention_mask is not None:
            count_padding = labels is not None and self.config.published_training
            position_ids = sequence.positions(attention_mask, count_padding)
        read: Any = inputs_embeds if input_ids is None else input_ids
        if bounds is None:
            limits.check_positions(self.llm_limit, read, position_ids, past_key_values)
        states = None
        if cross is not None or bounds is not None:
            if cross is not None and not self.config.mask_cross_padding:
                cross = cross._replace(mask=None, span=None)
            states = fusion.CrossStates(cross, self.config.fused_layers, self.config.attention_backend, bounds)
            kwargs["fusion"] = states
        arguments = kwargs | {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: past_key_values,
            "use_cache": use_cache,
        }
        loss = None
        targets: Any = None if places is None else sequence.at_places(wanted, places)
        if targets is not None and not loss_outside and (self.training if skip_logits is None else skip_logits):
            out, total = self._label_loss.run(self.llm, arguments, targets, columns)
            out.logits = None
        else:
            columns = sequence.kept_columns(logits_to_keep, read) if columns is None else columns
            out, total = self.llm(**arguments, logits_to_keep=columns), None
        # Compiled, it costs nothing, and a flag would be a second graph.
        compiling = torch.compiler.is_compiling()
        if states is not None and (compiling or not self._seen_fused):
            fusion.check_used(self.llm, states)
            if not compiling:
                self._seen_fused = True
        if targets is not None and not loss_outside:
            total = label_loss.summed(out.logits.flatten(0, 1), targets.flatten()) if total is None else total
            loss = sequence.mean_loss(total, targets, label_count)
        logits = out.logits
        if targets is not None and logits is not None and not only_scored:
            logits, targets = sequence.back_in_place(logits, places, wanted)
        return LayAlignOutput(
            loss=loss,
            logits=logits,
            labels=None if loss_outside else targets,
            attention_mask=attention_mask,
            cu_seqlens=None if bounds is None else bounds.own,
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            **{CACHE: getattr(out, CACHE)},
        )

    @torch.compiler.disable(
        reason="packed rows have shapes by the values of cu_seqlens: compile without fullgraph=True"
    )
    def _read_packed(self, packed: PackedInputs, lengths: Lengths | None) -> tuple[Any, ...]:
        """Embeddings, positions, cross inputs, bounds, targets and their columns, of packed inputs."""
        lengths = packing.check_inputs(self, packed, lengths)
        if not self._packable:
            packing.check_packable(self)
            self._packable = True
        encoded = self.encode_packed(packed.encoder_input_ids, lengths.encoder)
        row = packing.assemble(self, encoded.soft, packed, lengths)
        assert packed.encoder_cu_seqlens is not None, "check_inputs refuses this"
        bounds = fusion.Packing(row.cu_seqlens, packed.encoder_cu_seqlens.to(torch.int32))
        return row.embeddings, row.position_ids, packing.cross_inputs(encoded), bounds, row.targets, row.columns


AutoModel.register(LayAlignConfig, LayAlignForConditionalGeneration)
AutoModelForCausalLM.register(LayAlignConfig, LayAlignForConditionalGeneration)
