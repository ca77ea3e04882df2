"""A model's bases: loaded as a call says, written down so that they are found again, and checked against what was trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from layalign.arguments import SHARED, Arguments
from layalign.base_samples import sample
from layalign.configuration import LayAlignConfig, encoder_depth
from layalign.loading import PREFIX, load_encoder, load_llm
from layalign.quantization import BASES
from layalign.spreading import first_device

Source = str | Path | torch.nn.Module
# Of a base's place: beside the model's own folder, the path from there.
BESIDE = "beside"


def load_base(
    role: str, source: Source, arguments: Arguments, quantization: Mapping[str, Any] | None, check: bool = True
) -> PreTrainedModel:
    """An encoder or an LLM.

    Args:
        role: "encoder" or "llm".
        source: its name, folder or module.
        arguments: of the call.
        quantization: {base: settings}, checked.
        check: as `load_encoder` and `load_llm` take it.

    Raises:
        ValueError: as `load_encoder` and `load_llm`.
    """
    quantized = (quantization or {}).get(role)
    if role == "llm":
        return load_llm(source, arguments.llm_dtype, quantized, check=check, **arguments.llm, **arguments.devices)
    place = {}
    if arguments.devices and not isinstance(source, torch.nn.Module):
        # Before the LLM, so that its share of the memory is not given away twice.
        place = {"device_map": {"": first_device(arguments.devices["device_map"], arguments.devices.get("max_memory"))}}
    return load_encoder(source, arguments.encoder_dtype, quantized, check=check, **arguments.encoder, **place)


def reference(source: Source, module: PreTrainedModel) -> str | None:
    """What to write down so that a base is found again: a hub name, `layalign:NAME`, or a folder's absolute path; None if unknown."""
    name = module.config.name_or_path if isinstance(source, torch.nn.Module) else str(source)
    if not name or name.startswith(PREFIX):
        return name or None
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write_down(
    config: LayAlignConfig, role: str, source: Source, module: PreTrainedModel, given: Mapping[str, Any] | None = None
) -> None:
    """Write into a model's settings where a base is from.

    Args:
        config: the settings.
        role: "encoder" or "llm".
        source, module: what it was loaded from, and what that gave.
        given: the arguments it was loaded with: its revision and subfolder are kept. Of a hub name the commit is, so that the same
            weights are found again.
    """
    name = reference(source, module)
    setattr(config, f"{role}_name_or_path", name)
    place = {key: value for key, value in (given or {}).items() if key in ("revision", "subfolder")}
    if name is None or name.startswith(PREFIX) or Path(name).is_dir():
        place.pop("revision", None)
    else:
        known = getattr(module.config, "_commit_hash", None) if isinstance(source, torch.nn.Module) else None
        if commit := known or _commit(name, place, given or {}):
            place["revision"] = commit
    sources = {base: own for base, own in (config.base_sources or {}).items() if base != role}
    config.base_sources = sources | ({role: place} if place else {}) or None
    sampled(config, role, module)


def sampled(config: LayAlignConfig, role: str, module: PreTrainedModel) -> None:
    """Write into a model's settings what a base is known by; what stands there stays where its weights are not at hand.

    Args:
        config: the settings.
        role: "encoder" or "llm"; an LLM that is trained is saved with the model.
        module: the base.
    """
    samples = {
        base: own for base, own in (config.base_samples or {}).items() if not (base == "llm" and config.train_llm)
    }
    found = {} if role == "llm" and config.train_llm else sample(module)
    # Of a base that has been sharded since, only what was left whole is at hand.
    if found and samples.get(role, found).keys() == found.keys():
        samples[role] = found
    config.base_samples = samples or None


def written_down(role: str, config: LayAlignConfig, model_path: str) -> tuple[str, dict[str, Any]]:
    """Where a model's settings say that a base is, and the arguments that find it there.

    Args:
        role: "encoder" or "llm".
        config: the settings.
        model_path: the model's own folder or hub name.

    Raises:
        ValueError: nowhere, or in a folder that is neither there nor, from the model's own, where it was when that was saved.
    """
    name = getattr(config, f"{role}_name_or_path")
    if name is None:
        raise ValueError(
            f"the model does not say where its {role} comes from: pass {role}= (a name, a folder or a module)"
        )
    place = dict((config.base_sources or {}).get(role, {}))
    beside = place.pop(BESIDE, None)
    if not os.path.isabs(name) or Path(name).is_dir():
        return name, place
    looked = [name]
    if beside is not None and Path(model_path).is_dir():
        moved = (Path(model_path) / beside).resolve()
        if moved.is_dir():
            return str(moved), place
        looked.append(str(moved))
    raise ValueError(
        f"{model_path!r}: its {role} is not where it was, looked in {' and '.join(looked)}; pass {role}= (a name, a folder or a module)"
    )


def beside(config: LayAlignConfig, folder: str | Path) -> dict[str, Any] | None:
    """What settings saved in a folder say of the bases' places: those that are folders also by the path from there."""
    found = {role: dict(own) for role, own in (config.base_sources or {}).items()}
    for role in BASES:
        name = getattr(config, f"{role}_name_or_path")
        found.get(role, {}).pop(BESIDE, None)
        if name is None or not os.path.isabs(name):
            continue
        try:
            way = os.path.relpath(name, Path(folder).resolve())
        except ValueError:  # another drive
            continue
        found.setdefault(role, {})[BESIDE] = Path(way).as_posix()
    return {role: own for role, own in found.items() if own} or None


def check_fit(role: str, source: Source, found: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    """Compare a base with the one that a model was trained with.

    Raises:
        ValueError: it has other sizes.
    """
    found_sizes, expected_sizes = _sizes(role, found), _sizes(role, expected)
    wrong = [
        f"{name} {got} instead of {expected_sizes[name]}"
        for name, got in found_sizes.items()
        if got != expected_sizes[name]
    ]
    if wrong:
        shown = source if isinstance(source, str) else type(source).__name__
        raise ValueError(f"{role} {shown!r} is not the one trained with: {', '.join(wrong)}")


def _sizes(role: str, config: PreTrainedConfig) -> dict[str, Any]:
    if role == "encoder":
        return {"hidden_size": config.hidden_size, "layers": encoder_depth(config), "vocab_size": config.vocab_size}
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(text, name) for name in names}


def _commit(name: str, place: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The commit that a hub name was read from, as the cache's path says."""
    asked = {key: value for key, value in given.items() if key in SHARED and key != "force_download"}
    try:
        file = cached_file(name, CONFIG_NAME, **{**asked, **place, "local_files_only": True})
    except (OSError, ValueError):
        return None
    return extract_commit_hash(file, None)
