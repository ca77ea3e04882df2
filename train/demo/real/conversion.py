"""What both converters share: a configuration by a table of names, and the files of a transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast


def renamed(table: Mapping[str, str], found: Mapping[str, Any]) -> dict[str, Any]:
    """{our name: what `found` has under its own}, of a table {our name: its name}.

    Raises:
        KeyError: `found` lacks one.
    """
    return {ours: found[theirs] for ours, theirs in table.items()}


def published_value(stored: float) -> float:
    """The decimal that was published, of a number stored as fp32: the shortest one that rounds to it."""
    return float(str(numpy.float32(stored)))


def write_folder(
    folder: str | Path, config: PreTrainedConfig, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    config.save_pretrained(folder)
    save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
