"""What is made of logits: log-likelihoods, and a watch for NaN, which greedy search takes for the likeliest of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAN_LOGITS = (
    "the model's logits are NaN, so it has no answer; states that overflow in float16 do not in bfloat16 or float32 (dtype), "
    "and a trained part may have diverged"
)


class NaNLogits(ValueError):
    """What is asked has no answer: logits are NaN."""

    def __init__(self) -> None:
        super().__init__(NAN_LOGITS)


class NaNWatch(LogitsProcessor):
    """Notes whether a step of generation has NaN among its logits, without waiting for the device. One object a call of generate."""

    def __init__(self) -> None:
        self._found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (B, V) as they are."""
        found = scores.isnan().any()
        self._found = found if self._found is None else self._found | found
        return scores

    def check(self) -> None:
        """Raises NaNLogits where a step had any."""
        if self._found is not None and bool(self._found):
            raise NaNLogits


def watched(model: PreTrainedModel, **arguments: Any) -> Any:
    """What `model.generate` returns. Raises NaNLogits where logits are NaN."""
    watch = NaNWatch()
    arguments["logits_processor"] = LogitsProcessorList([watch, *(arguments.get("logits_processor") or ())])
    found = model.generate(**arguments)
    watch.check()
    return found


def label_loglikelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) sums over the labels (B, C), -100 where there is none, of the logs of their probability by logits (B, C, V).

    Raises:
        NaNLogits: a sum that is NaN.
    """
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    sums = -losses.double().sum(1)
    if bool(sums.isnan().any()):
        raise NaNLogits
    return sums
