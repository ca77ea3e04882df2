"""What the model's calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from layalign.fusion import CrossInputs
from layalign.sequence import Padding


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
    past_key_values: Any = None


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
