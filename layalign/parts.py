"""The parts of a model that can be trained, and what is theirs in a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from layalign.lora import OURS

if TYPE_CHECKING:
    from layalign.configuration import LayAlignConfig

# The trained part, which is saved as one file, and what can be trained beside it.
TRAINED_PART = ("adapter", "aligner", "gates")
PARTS = (*TRAINED_PART, "lora", "llm")


def part_of(name: str) -> str | None:
    """The part that a name in a state dict belongs to; None: to the encoder, which is never trained."""
    if name.startswith(("adapter.", "aligner.")):
        return name.partition(".")[0]
    if ".fusion_gate." in name:
        return "gates"
    if not name.startswith("llm."):
        return None
    return "lora" if OURS.search(name) else "llm"


def parts_of(config: LayAlignConfig) -> tuple[str, ...]:
    """The parts that a model of these settings trains and saves."""
    has = {
        "adapter": config.adapter is not None,
        "aligner": config.aligner is not None,
        "gates": config.aligner is not None and config.gate is not None,
        "lora": config.lora is not None,
        "llm": config.train_llm,
    }
    return tuple(part for part in PARTS if has[part])


def is_trained(name: str) -> bool:
    """Whether a state-dict key belongs to what `model.safetensors` holds: adapter, aligner, gates, LoRA."""
    return part_of(name) not in (None, "llm")


def trained_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of a model's adapter, aligner, gates and LoRA, and of its LLM where that is trained."""
    whole = getattr(model.config, "train_llm", False)
    return ((name, own) for name, own in model.named_parameters() if is_trained(name) or (whole and part_of(name)))


def let_train(model: torch.nn.Module, parts: Sequence[str]) -> None:
    """Let gradients flow into these parts, and into no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts and parameter.is_floating_point())
