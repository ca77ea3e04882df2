"""One model over several devices: the LLM's layers apart, all else on the first of them, where the LLM reads its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layalign.offloading import hooks, is_offloaded, working_device
from layalign.spelling import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layalign import LayAlignForConditionalGeneration

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")
# Names of whole parts in a device map, beside the LLM's modules.
OTHERS = ("encoder", "adapter", "aligner")
DISK = "disk"


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


def split_device_map(
    device_map: Any = None,
    max_memory: Any = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool | None = None,
) -> dict[str, Any]:
    """The LLM's arguments of transformers' `from_pretrained` for a device map of a whole model; empty: the CPU.

    Args:
        device_map: one of WAYS; one device (a name, a GPU's number, a torch.device) for the whole model; or {module: device or
            "disk"}, the LLM's modules by their names in it ("model.layers.0") or in the whole model ("llm.model.layers.0").
        max_memory, offload_folder, offload_buffers: as transformers takes them.

    Raises:
        ValueError: a device that there is not, names that do not go together, or one of the others where it says nothing.
    """
    if device_map is None:
        given = {"max_memory": max_memory, "offload_folder": offload_folder, "offload_buffers": offload_buffers}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: got {value!r} without a device_map, to which it belongs")
        return {}
    if max_memory is not None and device_map not in WAYS:
        raise ValueError(
            f"max_memory: says how a device_map is made; it takes one of {', '.join(WAYS)}, got {device_map!r}"
        )
    if max_memory is not None and not (isinstance(max_memory, Mapping) and max_memory):
        raise ValueError(f"max_memory: takes {{GPU's number or 'cpu': bytes or '10GB'}}, got {max_memory!r}")
    if isinstance(device_map, Mapping):
        device_map = _named(device_map)
    elif device_map not in WAYS:
        device_map = {"": _name(_device(device_map))}
    if isinstance(device_map, dict) and DISK in device_map.values() and offload_folder is None:
        raise ValueError("device_map: puts modules on 'disk'; give offload_folder, where they are written")
    found = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    found["offload_buffers"] = offload_buffers
    return {name: value for name, value in found.items() if value is not None}


def _named(device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A device map by module, of the LLM alone."""
    places: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, place in device_map.items():
        if not isinstance(name, str):
            raise ValueError(f"device_map: got a name {name!r}, takes names of modules")
        inside = "" if name == "llm" else name.removeprefix("llm.")
        if name in OTHERS:
            others[name] = _device(place)
        elif inside in places:
            raise ValueError(f"device_map: {name!r} is there twice")
        else:
            places[inside] = DISK if place == DISK else _name(_device(place))
    if not places:
        raise ValueError("device_map: says nothing of the LLM; name its modules, or 'llm'")
    first = first_device(places)
    for name, place in others.items():
        if place != first:
            raise ValueError(
                f"device_map: {name} goes where the LLM reads its inputs, {first}, got {place}; leave it out"
            )
    return places


def first_device(device_map: Any, max_memory: Mapping[Any, Any] | None = None) -> torch.device:
    """Where an LLM of this device map reads its inputs: its first GPU, else the CPU."""
    if isinstance(device_map, Mapping):
        places = (torch.device(place) for place in device_map.values() if place != DISK)
        return next((place for place in places if place.type != "cpu"), torch.device("cpu"))
    numbers = range(torch.cuda.device_count()) if max_memory is None else max_memory
    return next((torch.device("cuda", number) for number in numbers if isinstance(number, int)), torch.device("cpu"))


def _device(place: Any) -> torch.device:
    if isinstance(place, (int, str, torch.device)) and not isinstance(place, bool):
        try:
            device = torch.device(place)
        except RuntimeError:
            device = torch.device("cuda", place) if type(place) is int and place >= 0 else torch.device("meta")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device_map: got {place!r}, torch finds {torch.cuda.device_count()} CUDA devices")
        if device.type != "meta":
            return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    near = did_you_mean(place, (*WAYS, "cpu")) if isinstance(place, str) else ""
    raise ValueError(
        f"device_map: got {place!r}, takes {', '.join(WAYS)}, a device (cpu, cuda:N, N) or {{module of the LLM: device or 'disk'}}{near}"
    )


def _name(device: torch.device) -> str | int:
    """A device as accelerate and safetensors both take it."""
    return device.index if device.type == "cuda" else str(device)


def check_names(device_map: Any, llm: PreTrainedModel) -> None:
    """Compare a device map with an LLM, which may be on the meta device.

    Raises:
        ValueError: a name that is no module of the LLM, or weights that it says nothing of.
    """
    if not isinstance(device_map, Mapping):
        return
    modules = [name for name, _ in llm.named_modules()]
    weights = [name for name, _ in llm.named_parameters()]
    for name in device_map:
        if name not in modules and name not in weights:
            raise ValueError(f"device_map: {type(llm).__name__} has no module {name!r}{did_you_mean(name, modules)}")
    without = [weight for weight in weights if not any(_within(weight, name) for name in device_map)]
    if without:
        raise ValueError(
            f"device_map: says nothing of {without[0]} ({len(without)} weights of {type(llm).__name__} in all)"
        )


def _within(weight: str, module: str) -> bool:
    return module == "" or weight == module or weight.startswith(f"{module}.")


def gather_parts(model: LayAlignForConditionalGeneration) -> None:
    """Put encoder, adapter and aligner where the LLM, placed by its device map, reads its inputs."""
    embeddings = model.llm.get_input_embeddings()
    first = working_device(embeddings, torch.device("cpu"))
    for name in OTHERS:
        if (part := getattr(model, name)) is not None:
            part.to(first)
    for module in model.llm.modules():
        if is_offloaded(module) and hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            # PEFT has put them where the layer's weights are, which is nowhere between calls.
            place = working_device(module.base_layer, first)
            for part in (module.lora_A, module.lora_B):
                part.to_empty(device=place)
    if hooks(model.llm):
        # What transformers looks at before it moves a model.
        model.hf_device_map = dict.fromkeys(OTHERS, first) | {
            f"llm.{name}" if name else "llm": place for name, place in model.llm.hf_device_map.items()
        }
