"""What encoder and LLM read: from token ids to soft prompts, cross keys and values, and the LLM's input sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layalign import packing, sequence, shards
from layalign.frozen_bases import FrozenBases
from layalign.kernels.dispatch import autocast_dtype
from layalign.modules import Adapter, LayerwiseAligner
from layalign.offloading import at_hand
from layalign.outputs import Encoded
from layalign.packing import PackedEncoded
from layalign.projections import KeyValueProjection, attention_modules, split_heads
from layalign.sequence import Assembled, Lengths, Part

if TYPE_CHECKING:
    from typing_extensions import Self


class AssemblingModel(FrozenBases):
    """The part of the model that lies before the LLM.

    Attributes:
        adapter: None: there are no soft prompts.
        aligner: None: there is no cross-attention.
    """

    adapter: Adapter | None
    aligner: LayerwiseAligner | None
    _projections: list[KeyValueProjection]

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
            (self.encoder or self.llm).get_input_embeddings().num_embeddings,
        )
        if self.encoder is None:
            return Encoded(None, mask)
        if ids.shape[1] == 0:  # questions without a token: one of padding, as such a row has beside others
            ids, mask = ids.new_zeros(len(ids), 1), mask.new_zeros(len(mask), 1)
        places = padding = None
        if self.config.mask_cross_padding:
            order, mask, tokens, padding = sequence.squeeze(mask, "right", lengths)
            ids = ids.gather(1, order)
            places = sequence.real_tokens(mask, tokens)
        out = self.encoder_states(ids, None if padding is not None and padding.span is None else mask)
        soft = None
        if self.adapter is not None:
            soft = sequence.unpack(self._soft(sequence.pack(out.last_hidden_state, places)), places, mask)
        if self.aligner is None:
            return Encoded(soft, mask, padding=padding)
        keys, values = self._cross(
            [sequence.pack(out.hidden_states[index], places) for index in self.config.mixed_states]
        )
        keys, values = (sequence.unpack(part, places, mask, dim=1).permute(1, 0, 3, 2, 4) for part in (keys, values))
        return Encoded(soft, mask, keys, values, padding)

    def encode_packed(self, encoder_input_ids: torch.Tensor, lengths: Sequence[int]) -> PackedEncoded:
        """`encode` of packed questions; adapter and aligner run on all of them at once.

        Args:
            encoder_input_ids: (1, T) long.
            lengths: of each question, T in all.

        Raises:
            ValueError: a token outside the encoder's vocabulary.
        """
        if self.encoder is None:
            return PackedEncoded(None, None, None)
        vocabulary = self.encoder.get_input_embeddings().num_embeddings
        ids, _ = sequence.ids_and_mask("encoder_input_ids", encoder_input_ids, None, vocabulary)
        mixed = [] if self.aligner is None else list(self.config.mixed_states)
        last, *states = packing.encoder_states(self, ids, lengths, [-1, *mixed])
        soft = None if self.adapter is None else self._soft(last)
        if self.aligner is None:
            return PackedEncoded(soft, None, None)
        keys, values = (part.permute(1, 0, 3, 2, 4) for part in self._cross(states))
        return PackedEncoded(soft, keys, values)

    def gates(self) -> torch.Tensor:
        """The gates of the fused layers: (L, 1) for "scalar", (L, Hq) for "head"; ones (L, 1) where there are none (gate None).

        Raises:
            ValueError: dynamic gates, which have no value apart from an input, or a model without an aligner.
        """
        if self.aligner is None or self.config.gate == "dynamic":
            raise ValueError(
                f"gates() needs an aligner and gate 'scalar', 'head' or None, got gate {self.config.gate!r}"
            )
        modules = attention_modules(self.llm)
        values = [shards.whole(at_hand(modules[layer].fusion_gate, "value")) for layer in self.config.fused_layers]
        return torch.stack([value.detach().float() for value in values])

    def fold(self) -> Self:
        """This model, its aligner folded into the key and value projections now, as the first inference call else does.

        It takes 4 L kv Dl De operations (4.4 TFLOP for mT5-xl and a 7B LLM with MHA: a minute on a CPU) and keeps 2 L kv De values
        until a weight changes, the model is moved or trained. Nothing happens where inference would not use them: in training
        mode, with `fold_at_inference=False`, an aligner that is not "linear" or has a width, or projections that are not plain linear
        layers.
        """
        if self.aligner is not None and self.config.fold_at_inference:
            with torch.no_grad():
                self.aligner.folded_weights(self._projections, self._compute_dtype(), self._aligner_backend())
        return self

    def _folded_on_accelerator(self) -> Self:
        """Folded after loading, unless weights are on a CPU, where the model may be about to move."""
        devices = {parameter.device.type for parameter in self.parameters()}
        return self if devices & {"cpu", "meta"} else self.fold()

    def _soft(self, state: torch.Tensor) -> torch.Tensor:
        """Soft prompts (B, T, Dl) of the encoder's last state."""
        assert self.adapter is not None
        return self.adapter(state).to(self.llm.dtype)

    def _cross(self, states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross keys and values (L, B, T, Hkv, D) of the mixed states."""
        assert self.aligner is not None
        keys, values = self.aligner(
            states,
            self._projections,
            self._compute_dtype(),
            self._aligner_backend(),
            fold=self.config.fold_at_inference,
        )
        return split_heads(self._projections, keys, values)

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
        # Only with others: a list as long as the batch would tie a compiled graph to one size of batches.
        of_one = None if lengths is None else [1] * rows
        parts = []
        bos = self.config.get_text_config().bos_token_id
        if bos is not None:
            bos = bos[0] if isinstance(bos, (list, tuple)) else bos
            parts.append(Part(embed(torch.full((rows, 1), bos, device=soft_mask.device)), ones, of_one))
        if soft is not None and self.adapter is not None:
            boundary = at_hand(self.adapter, "boundary").to(soft.dtype).expand(rows, 1, -1)
            parts += [Part(soft, soft_mask, of_soft), Part(boundary, ones, of_one)]
        if input_ids is not None:
            ids, mask = sequence.ids_and_mask("input_ids", input_ids, attention_mask, embed.num_embeddings)
            if ids.shape[0] != rows:
                found = f"input_ids has {ids.shape[0]} rows, encoder_input_ids {rows}"
                raise ValueError(f"{found}; both need one row per example")
            parts.append(Part(embed(ids), mask, of_text))
        if not parts:
            raise ValueError("nothing for the LLM to read: no bos token, no adapter and no input_ids")
        if labels is not None:
            sequence.check_label_shape(labels, input_ids)
        return sequence.join(parts, self.llm.dtype, labels, self.config.published_training)

    def _compute_dtype(self) -> torch.dtype:
        """The dtype of cross keys and values: autocast's, or the LLM's."""
        return autocast_dtype(self.llm.get_input_embeddings().weight) or self.llm.dtype

    def _aligner_backend(self) -> str:
        """The attention's, where the aligner's operators have it."""
        backend = self.config.attention_backend
        return "auto" if backend == "flash" else backend
