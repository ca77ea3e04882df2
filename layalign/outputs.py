"""What the model's calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from layalign.compatibility import CACHE
from layalign.fusion import CrossInputs
from layalign.sequence import Padding


@dataclass
class LayAlignOutput(ModelOutput):
    """Output of a forward call.

    Attributes:
        loss: mean cross-entropy per label token, where labels were given.
        logits: with labels (B, M, V): logits[:, j] predicts labels[:, j], as in encoder-decoders, and is 0 where there is no label,
            for only what predicts a label was computed. None where they were skipped, as in training. Without labels (B, S, V),
            of the assembled sequence (padding on the left): logits[:, j] predicts what comes after position j.
        labels: (B, M), those that count in the loss, -100 elsewhere. Where logits were skipped or only_scored was asked for, (B, C),
            of the C positions that predict a label in some row, as are the logits then.
        attention_mask: (B, S) bool of the assembled sequence.
        past_key_values: the LLM's cache, where asked for; from transformers 5.24 on `cache`, with the old name as an alias.
        hidden_states: of the LLM, (B, S, Dl) each, where asked for.
        attentions: of an LLM without cross-attention, where asked for.
        cu_seqlens: (n + 1,) int32, where each assembled sequence of a packed row begins, then S.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cu_seqlens: torch.Tensor | None = None


class Encoded(NamedTuple):
    """Everything the LLM needs from the encoder, once per input.

    Padding is squeezed to the right and cut to the longest row, so that where it stood changes nothing.

    Attributes:
        soft: soft prompts (B, T, Dl), None without an adapter.
        mask: (B, T) bool, True = real token.
        keys: cross keys (B, L, Hkv, T, D) of the L fused layers, None without an aligner.
        values: cross values, likewise.
        padding: the mask as spans; None where padding was left as it came (`mask_cross_padding=False`).
    """

    soft: torch.Tensor | None
    mask: torch.Tensor
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    padding: Padding | None = None

    def cross(self, own: Padding | None = None) -> CrossInputs | None:
        """Keys, values and what hides of them as `forward` takes them. own: the padding of the LLM's sequence."""
        if self.keys is None or self.values is None:
            return None
        span = None if self.padding is None else self.padding.span
        mask = None if self.padding is not None and span is None else self.mask
        return CrossInputs(self.keys, self.values, mask, span, own)
