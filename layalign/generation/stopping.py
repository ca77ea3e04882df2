"""Ending generation at texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class EndsWith(StoppingCriteria):
    """Ends the rows in which one of some texts has been generated. One object a call of generate: a prompt may hold them.

    transformers' stop_strings cannot serve: they reject tokenizers that have no token for any text.

    Args:
        tokenizer: that of the generated tokens.
        texts: none of them empty.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, list(texts)
        # A token has a byte or more, so that a text fits into so many.
        self._longest = max(len(text.encode()) for text in texts) + 1
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) whether each row (B, N) of ids is at its end."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1
        last = input_ids[:, max(self._prompt, input_ids.shape[1] - self._longest) :].tolist()
        written = self.tokenizer.batch_decode(last, clean_up_tokenization_spaces=False)
        found = [any(text in row for text in self.texts) for row in written]
        return torch.tensor(found, device=input_ids.device)
