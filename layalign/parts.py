"""The parts of a model that can be trained, and what is theirs in a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layalign.lora import OURS

if TYPE_CHECKING:
    from layalign.configuration import LayAlignConfig

# The trained part, which is saved as one file, and what can be trained beside it.
TRAINED_PART = ("adapter", "aligner", "gates")
PARTS = (*TRAINED_PART, "lora", "llm", "encoder")


def part_of(name: str) -> str | None:
    """The part that a name in a state dict belongs to; None: to none."""
    if name.startswith(("adapter.", "aligner.", "encoder.")):
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
        "encoder": bool(config.train_encoder),
    }
    return tuple(part for part in PARTS if has[part])


def is_trained(name: str) -> bool:
    """Whether a state-dict key belongs to what `model.safetensors` holds: adapter, aligner, gates, LoRA, and an encoder that is trained."""
    return part_of(name) not in (None, "llm")


def trained_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of a model's adapter, aligner, gates and LoRA, and of its LLM and encoder where these are trained."""
    config: Any = model.config
    return _of_parts(model, parts_of(config))


def let_train(model: torch.nn.Module, parts: Sequence[str]) -> None:
    """Let gradients flow into these parts, and into no other."""
    chosen = {id(own) for _, own in _of_parts(model, parts)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())


def _of_parts(model: torch.nn.Module, parts: Sequence[str]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of some parts; of the encoder those that the configuration has trained."""
    encoder: Any = getattr(model, "encoder", None)
    config: Any = model.config
    alone = encoder is not None and config.train_encoder == "embeddings"
    embeddings = encoder.get_input_embeddings().weight if alone else None
    for name, own in model.named_parameters():
        part = part_of(name)
        if part in parts and (part != "encoder" or embeddings is None or own is embeddings):
            yield name, own
