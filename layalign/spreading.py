"""One model over several devices: the LLM's layers apart, all else on the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layalign import LayAlignForConditionalGeneration

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")


def spread(
    model: LayAlignForConditionalGeneration,
    devices: str = "auto",
    device_map: Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> LayAlignForConditionalGeneration:
    """Put the LLM's layers on several GPUs; encoder, adapter and aligner go to the first.

    The layers' key and value projections are called where they lie and cross keys and values follow the layers, so that nothing is folded:
    an input costs more than on one device, a token does not.

    Args:
        model: on the CPU.
        devices, device_map, offload_folder: as in `spread_llm`.

    Returns:
        The model.

    Raises:
        ValueError: as in `spread_llm`.
    """
    first = spread_llm(model.llm, devices, device_map, offload_folder)
    for part in (model.encoder, model.adapter, model.aligner):
        if part is not None:
            part.to(first)
    return model


def spread_llm(
    llm: PreTrainedModel,
    devices: str = "auto",
    device_map: Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> torch.device:
    """Put an LLM's layers on several GPUs by accelerate.

    Args:
        llm: on the CPU.
        devices: "auto" or "balanced" (alike on all GPUs), "balanced_low_0" (less on the first) or "sequential" (one filled after the
            other), as accelerate names them. What no GPU has room for stays on the CPU and is copied for each use.
        device_map: instead {name of a module of the LLM: GPU's number, "cpu" or "disk"}.
        offload_folder: where what is on "disk" is written.

    Returns:
        The first device, which takes the LLM's inputs.

    Raises:
        ValueError: another way, no accelerate, or an LLM that does not fit in all memory.
    """
    if devices not in WAYS:
        raise ValueError(f"devices: got {devices!r}, takes {', '.join(WAYS)}")
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ModuleNotFoundError as error:
        raise ValueError('devices: needs accelerate, which is not installed: pip install "layalign[train]"') from error
    if device_map is None:
        whole = list(llm._no_split_modules or ())
        memory = None
        if devices != "sequential":
            memory = get_balanced_memory(llm, no_split_module_classes=whole, low_zero=devices == "balanced_low_0")
        device_map = infer_auto_device_map(llm, memory, no_split_module_classes=whole)
    placed = {name: torch.device(place) for name, place in device_map.items() if place != "disk"}
    if len(placed) < len(device_map) and offload_folder is None:
        raise ValueError("devices: the LLM does not fit into the memory of all devices and the CPU")
    first = next((place for place in placed.values() if place.type != "cpu"), torch.device("cpu"))
    dispatch_model(llm, dict(device_map), main_device=first, offload_dir=offload_folder, force_hooks=True)
    return first
