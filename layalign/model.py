"""LayAlignForConditionalGeneration: a frozen encoder and a frozen LLM, joined by adapter, layer-wise aligner and gates."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from layalign import bases, fusion, saving
from layalign.configuration import LayAlignConfig
from layalign.decoding import LayAlignGenerationMixin
from layalign.modules import Adapter, Gate, LayerwiseAligner
from layalign.projections import attention_modules, key_value_projection, split_heads
from layalign.sequence import (
    ids_and_mask,
    pack,
    positions,
    predicting_columns,
    real_tokens,
    squeeze,
    take,
    token_loss,
    unpack,
)


@dataclass
class LayAlignOutput(ModelOutput):
    """Output of a forward call.

    Attributes:
        loss: mean cross-entropy per label token, where labels were given.
        logits: (B, C, V). Without labels C is the length of the assembled sequence (padding on the left). With labels only the C
            columns that predict a label in some row were computed; `labels` (B, C) holds their targets, -100 where a row has none.
        labels: see logits.
        attention_mask: (B, S) bool of the assembled sequence.
        past_key_values: the LLM's cache, where asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    past_key_values: object | None = None


class LayAlignForConditionalGeneration(PreTrainedModel, LayAlignGenerationMixin):
    """LayAlign (arXiv 2502.11405) over any transformers encoder and LLM. Build it with `from_bases`, `from_pretrained` or
    `from_published`; only adapter, aligner and gates are trained and saved."""

    config_class = LayAlignConfig
    base_model_prefix = "layalign"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = None
    input_modalities = ("text",)

    def __init__(self, config, encoder=None, llm=None):
        if config.encoder_config is None or config.llm_config is None:
            raise ValueError(
                "LayAlignConfig needs encoder_config and llm_config; LayAlignForConditionalGeneration.from_bases sets both"
            )
        super().__init__(config)
        self.encoder = bases.build_encoder(config.encoder_config) if encoder is None else encoder
        self.llm = AutoModelForCausalLM.from_config(config.llm_config) if llm is None else llm
        config.encoder_config, config.llm_config = self.encoder.config, self.llm.config
        self._no_split_modules = sorted({*(self.encoder._no_split_modules or []), *(self.llm._no_split_modules or [])})
        self.encoder.requires_grad_(False)
        self.llm.requires_grad_(False)

        text = config.get_text_config()
        encoder_size, llm_size = config.encoder_config.hidden_size, text.hidden_size
        layers = config.fused_layers
        self.adapter = Adapter(config.adapter, encoder_size, llm_size) if config.adapter else None
        self.aligner = None
        if self.adapter is not None:
            nn.init.normal_(self.adapter.boundary, std=self.llm.get_input_embeddings().weight.float().std().item())
        if layers:
            states = len(config.mixed_states)
            self.aligner = LayerwiseAligner(
                config.aligner, states, len(layers), encoder_size, llm_size, average=config.encoder_states == "mean"
            )
            self._attach(layers, text)
        self.encoder_limit = bases.encoder_limit(self.encoder)
        takes_cache = "use_cache" in inspect.signature(self.encoder.forward).parameters
        self._encoder_arguments = {"use_cache": False} if takes_cache else {}
        self._swap_proven = False
        self.generation_config = self.llm.generation_config
        self.post_init()
        self.train(self.training)

    def _attach(self, layers, text):
        modules = attention_modules(self.llm)
        self._projections = [key_value_projection(modules[layer], text) for layer in layers]
        for layer in layers:
            gate = Gate(self.config.gate, text.num_attention_heads, text.hidden_size)
            modules[layer].fusion_gate = gate.to(self.device)
            if self.config.gate == "dynamic":
                modules[layer].register_forward_pre_hook(fusion.dynamic_gate_hook, with_kwargs=True)
        self.llm.set_attn_implementation(fusion.NAME)
        if text._attn_implementation != fusion.NAME:
            raise ValueError(
                f"{type(self.llm).__name__} does not let its attention be set: it does not go through transformers' attention interface, "
                "so LayAlign cannot be joined to it"
            )

    def init_weights(self):
        """Nothing to do: the bases bring their weights, and the trained part was initialised where it was made."""

    @classmethod
    def from_bases(cls, encoder, llm, *, dtype=None, **settings):
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
        encoder_module = bases.load_encoder(encoder, dtype)
        llm_module = bases.load_llm(llm, dtype)
        config = LayAlignConfig(
            encoder_config=encoder_module.config,
            llm_config=llm_module.config,
            encoder_name_or_path=saving.reference(encoder, encoder_module),
            llm_name_or_path=saving.reference(llm, llm_module),
            **settings,
        )
        return cls(config, encoder_module, llm_module)

    @classmethod
    def from_pretrained(cls, path, *, encoder=None, llm=None, config=None, dtype=None, **kwargs):
        """Load a saved trained part and the bases it refers to. See `layalign.saving.load_trained_part`.

        Args:
            path: folder or hub name written by `save_pretrained`.
            encoder, llm: other places (or modules) for the same bases.
            dtype: dtype of the bases; the trained part takes it as well unless it is None.
        """
        model = saving.from_pretrained(cls, path, encoder=encoder, llm=llm, config=config, dtype=dtype, **kwargs)
        return model._folded_on_accelerator()

    @classmethod
    def from_published(cls, checkpoint, *, encoder, llm, **settings):
        """Load the authors' `pytorch_model.bin`. See `layalign.published.from_published`."""
        from layalign.published import from_published

        return from_published(cls, checkpoint, encoder=encoder, llm=llm, **settings)._folded_on_accelerator()

    def save_pretrained(self, save_directory, *, state_dict=None, **kwargs):
        """Write config.json and the trained part (safetensors); the bases are only referred to. Arguments as in transformers."""
        trained = self.trained_state_dict(state_dict)
        super().save_pretrained(save_directory, state_dict=trained, **kwargs)

    def save_published(self, path):
        """Write the authors' format: the whole state dict, bases included. See `layalign.published.save_published`."""
        from layalign.published import save_published

        save_published(self, path)

    def trained_parameters(self):
        """(name, parameter) of adapter, aligner and gates; every other parameter is frozen."""
        for name, parameter in self.named_parameters():
            if saving.is_trained(name):
                yield name, parameter

    def trained_state_dict(self, state_dict=None):
        """The trained part of a state dict (default: this model's)."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in state_dict.items() if saving.is_trained(name)}

    @property
    def num_trained_parameters(self):
        return sum(parameter.numel() for _, parameter in self.trained_parameters())

    def gates(self):
        """The gates of the fused layers: (L, 1) for "scalar", (L, Hq) for "head".

        Raises:
            ValueError: dynamic gates, which have no value apart from an input, or a model without an aligner.
        """
        if self.aligner is None or self.config.gate == "dynamic":
            raise ValueError(f"gates() needs an aligner and gate 'scalar' or 'head', got gate {self.config.gate!r}")
        modules = attention_modules(self.llm)
        return torch.stack([modules[layer].fusion_gate.value.detach().float() for layer in self.config.fused_layers])

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def tie_weights(self, *args, **kwargs):
        """The bases tie their own weights."""

    def train(self, mode=True):
        """Training mode for the trained part. The encoder stays in eval mode, and dropout in the frozen LLM stays off: the LLM's
        own flag must follow `mode`, as gradient checkpointing looks at it."""
        super().train(mode)
        if hasattr(self, "encoder") and hasattr(self, "llm"):
            self.encoder.eval()
            for module in self.llm.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        return self

    def set_attn_implementation(self, attn_implementation, **kwargs):
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
            elif part == "llm_config" and (self.aligner is None or name == fusion.NAME):
                self.llm.set_attn_implementation(name, **kwargs)
            else:
                raise ValueError(
                    f"{part!r}: {name!r} would drop the cross-attention; choose the fused operator's backend by config.attention_backend, "
                    'and the encoder\'s attention by {"encoder_config": name}'
                )

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        """Checkpoint the LLM's layers (transformers' enable and disable methods end here).

        Raises:
            ValueError: reentrant checkpointing, which cannot work: all layers share the aligner's output.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "gradient checkpointing needs use_reentrant=False: all LLM layers share the aligner's output"
            )
        self.llm._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def enable_input_require_grads(self):
        """Nothing to do: the adapter's output already requires gradients."""

    def encode(self, encoder_input_ids, encoder_attention_mask=None):
        """Everything the LLM needs from the encoder, once per input.

        Args:
            encoder_input_ids: (B, T) long.
            encoder_attention_mask: (B, T), True or 1 = real token, any pattern; None = all real.

        Returns:
            soft prompts (B, T', Dl) or None, their mask (B, T') bool, cross keys and values (B, L, Hkv, T', D) or None. Padding is
            squeezed to the right and cut to the longest row, so that where it stood changes nothing. Where much of it is left,
            adapter and aligner run on the real tokens only, and the results are zeros at padding.

        Raises:
            ValueError: more tokens than `encoder_limit`, the most that an encoder with learned positions reads; None: any number.
        """
        ids, mask = ids_and_mask(
            "encoder_input_ids",
            encoder_input_ids,
            encoder_attention_mask,
            self.encoder.get_input_embeddings().num_embeddings,
        )
        places = None
        if self.config.mask_cross_padding:
            index, mask, tokens = squeeze(mask, "right")
            ids = ids.gather(1, index)
            places = real_tokens(mask, tokens)
        if self.encoder_limit is not None and ids.shape[1] > self.encoder_limit:
            raise ValueError(
                f"encoder_input_ids has {ids.shape[1]} tokens in a row, the encoder takes {self.encoder_limit}; the processor's "
                f"encoder_max_length={self.encoder_limit} cuts what is longer"
            )
        with torch.no_grad():
            out = self.encoder(
                input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, **self._encoder_arguments
            )
        soft = None
        if self.adapter is not None:
            soft = unpack(self.adapter(pack(out.last_hidden_state, places)).to(self.llm.dtype), places, mask)
        if self.aligner is None:
            return soft, mask, None, None
        keys, values = self.aligner(
            [pack(out.hidden_states[index], places) for index in self.config.mixed_states],
            self._projections,
            self._compute_dtype(),
            self._aligner_backend(),
            fold=self.config.fold_at_inference,
        )
        keys, values = split_heads(self._projections, keys, values)
        keys, values = (unpack(part, places, mask, dim=1).permute(1, 0, 3, 2, 4) for part in (keys, values))
        return soft, mask, keys, values

    def fold(self):
        """Multiply the aligner's projection into the LLM's key and value projections now, as the first inference call else does.

        It takes 4 L kv Dl De operations (4.4 TFLOP for mT5-xl and a 7B LLM with MHA: a minute on a CPU) and keeps 2 L kv De values
        until a weight changes, the model is moved or trained. Nothing happens where inference would not use them: in training
        mode, with `fold_at_inference=False`, an aligner that is not "linear" or projections that are not plain linear layers.

        Returns:
            The model.
        """
        if self.aligner is not None and self.config.fold_at_inference:
            with torch.no_grad():
                self.aligner.folded_weights(self._projections, self._compute_dtype(), self._aligner_backend())
        return self

    def _folded_on_accelerator(self):
        """Folded after loading, unless weights are on a CPU, where the model may be about to move."""
        devices = {parameter.device.type for parameter in self.parameters()}
        return self if devices & {"cpu", "meta"} else self.fold()

    def _compute_dtype(self):
        """The dtype of cross keys and values: autocast's, or the LLM's."""
        device = self.llm.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.llm.dtype

    def _aligner_backend(self):
        """The attention's, where the aligner's operators have it."""
        backend = self.config.attention_backend
        return "auto" if backend == "flash" else backend

    def assemble(self, soft, soft_mask, input_ids=None, attention_mask=None, labels=None):
        """The LLM's input sequence: [bos][soft prompts][boundary][input_ids], padding squeezed to the left.

        Returns:
            embeddings (B, S, Dl), mask (B, S) bool, and labels (B, S) moved with them (-100 elsewhere) or None.
        """
        embed = self.llm.get_input_embeddings()
        rows, device = soft_mask.shape[0], soft_mask.device
        ones = soft_mask.new_ones(rows, 1)
        parts, masks = [], []
        bos = self.config.get_text_config().bos_token_id
        if bos is not None:
            bos = bos[0] if isinstance(bos, (list, tuple)) else bos
            parts.append(embed(torch.full((rows, 1), bos, device=device)))
            masks.append(ones)
        if soft is not None:
            boundary = self.adapter.boundary.to(soft.dtype).expand(rows, 1, -1)
            parts += [soft, boundary]
            masks += [soft_mask, ones]
        if input_ids is not None:
            ids, mask = ids_and_mask("input_ids", input_ids, attention_mask, embed.num_embeddings)
            if ids.shape[0] != rows:
                raise ValueError(
                    f"input_ids has {ids.shape[0]} rows, encoder_input_ids {rows}; both need one row per example"
                )
            parts.append(embed(ids))
            masks.append(mask)
        if not parts:
            raise ValueError("nothing for the LLM to read: no bos token, no adapter and no input_ids")
        unsqueezed = torch.cat(masks, 1)
        index, mask, _ = squeeze(unsqueezed, "left")
        embeddings = torch.cat([part.to(self.llm.dtype) for part in parts], 1)
        if labels is not None:
            if input_ids is None or labels.shape != input_ids.shape:
                got = None if input_ids is None else tuple(input_ids.shape)
                raise ValueError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} for {got}")
            labels = F.pad(labels, (embeddings.shape[1] - labels.shape[1], 0), value=-100)
            if self.config.published_training:
                labels = labels.masked_fill(~unsqueezed, -100)[:, -index.shape[1] :]
            else:
                labels = labels.gather(1, index).masked_fill(~mask, -100)
        return take(embeddings, index), mask, labels

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_input_ids=None,
        encoder_attention_mask=None,
        labels=None,
        inputs_embeds=None,
        position_ids=None,
        past_key_values=None,
        cross_keys=None,
        cross_values=None,
        cross_mask=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Loss and logits of [bos][soft prompts][boundary][input_ids].

        Args:
            encoder_input_ids, encoder_attention_mask: (B, T), the question for the encoder.
            input_ids, attention_mask, labels: (B, M), prompt and target in one row; labels -100 where no loss. Masks may have holes.
            inputs_embeds (B, S, Dl), cross_keys, cross_values (B, L, Hkv, T, D), cross_mask (B, T), past_key_values: the inputs of
                `generate`'s steps, as `encode` and `assemble` make them; with them input_ids are continuation tokens.
            logits_to_keep: as in transformers; ignored where labels are given.
            num_items_in_batch: label tokens in the whole optimizer step (gradient accumulation); None: in this call.

        Returns:
            LayAlignOutput.
        """
        self._check_swap()
        targets = None
        if encoder_input_ids is not None:
            if inputs_embeds is not None or past_key_values is not None or cross_keys is not None:
                raise ValueError(
                    "encoder_input_ids starts a new sequence: do not give inputs_embeds, past_key_values or cross_keys with it"
                )
            soft, cross_mask, cross_keys, cross_values = self.encode(encoder_input_ids, encoder_attention_mask)
            inputs_embeds, attention_mask, aligned = self.assemble(soft, cross_mask, input_ids, attention_mask, labels)
            input_ids = None
            if aligned is not None:
                targets, logits_to_keep = predicting_columns(aligned)
        elif labels is not None:
            raise ValueError("labels need encoder_input_ids: the loss is computed over the assembled sequence")
        elif past_key_values is None and inputs_embeds is None:
            raise ValueError("encoder_input_ids is missing: give the encoder's tokens (a LayAlignProcessor makes them)")
        if position_ids is None and past_key_values is None:
            counting_padding = labels is not None and self.config.published_training
            position_ids = positions(torch.ones_like(attention_mask) if counting_padding else attention_mask.bool())
        cross = self._cross_states(cross_keys, cross_values, cross_mask)
        out = self.llm(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
            **({} if cross is None else {"fusion": cross}),
            **kwargs,
        )
        self._prove_swap(cross)
        loss = None if targets is None else token_loss(out.logits, targets, num_items_in_batch)
        return LayAlignOutput(loss, out.logits, targets, attention_mask, out.past_key_values)

    def _cross_states(self, keys, values, mask):
        if keys is None:
            return None
        mask = mask if self.config.mask_cross_padding else None
        return fusion.CrossStates(keys, values, mask, self.config.fused_layers, self.config.attention_backend)

    def _check_swap(self):
        current = self.llm.config.get_text_config(decoder=True)._attn_implementation
        if self.aligner is not None and current != fusion.NAME:
            raise RuntimeError(
                f"the LLM's attention implementation was set to {current!r}, which drops the cross-attention; "
                f"call model.llm.set_attn_implementation({fusion.NAME!r})"
            )

    def _prove_swap(self, cross):
        """After the first forward: every fused layer must have called the attention function; a few families ignore it silently."""
        if cross is None or self._swap_proven:
            return
        missing = sorted(set(self.config.fused_layers) - cross.used)
        if missing:
            raise RuntimeError(
                f"{type(self.llm).__name__} did not call LayAlign's attention function in layers {missing}: its attention does not go "
                "through transformers' attention interface, so LayAlign cannot be joined to it"
            )
        self._swap_proven = True


AutoModel.register(LayAlignConfig, LayAlignForConditionalGeneration)
AutoModelForCausalLM.register(LayAlignConfig, LayAlignForConditionalGeneration)
