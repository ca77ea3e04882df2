"""Saved models on disk: the trained part, with references to the bases instead of the bases. Builds no model: `model.py` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from layalign.configuration import LayAlignConfig, encoder_depth
from layalign.loading import PREFIX, load_encoder, load_llm

Source = str | Path | torch.nn.Module
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SavedModel:
    """What a model is built from: its settings, trained part and bases, all checked against each other."""

    config: LayAlignConfig
    trained: Weights
    encoder: PreTrainedModel
    llm: PreTrainedModel


def read_saved(
    path: str, encoder: Source | None, llm: Source | None, config: LayAlignConfig | None, dtype: torch.dtype | None
) -> SavedModel:
    """Read what `save_pretrained` wrote, and the bases it refers to.

    Args:
        path: folder or hub name.
        encoder, llm: other places (or modules) for the same bases.
        config: settings instead of those at `path`.
        dtype: dtype of the bases; None: as stored.

    Raises:
        ValueError: no LayAlign model at `path`, a base that cannot be found or does not fit, weights that are damaged.
    """
    if config is None:
        try:
            config = LayAlignConfig.from_pretrained(path)
        except (OSError, KeyError) as error:
            raise ValueError(
                f"{path!r} holds no LayAlign model (a folder or hub name with a config.json): {error}"
            ) from error
    if config.model_type == LayAlignConfig.model_type and None in (config.encoder_config, config.llm_config):
        raise ValueError(f"{path!r} holds no LayAlign model: it has no config.json that names two bases")
    if config.model_type != LayAlignConfig.model_type:
        raise ValueError(f"{path!r} holds a {config.model_type!r} model, not a LayAlign model")
    trained = _trained_weights(path)
    encoder = _base("encoder", encoder, config.encoder_name_or_path)
    llm = _base("llm", llm, config.llm_name_or_path)
    encoder_module, llm_module = load_encoder(encoder, dtype), load_llm(llm, dtype)
    _check_fit("encoder", encoder, encoder_module.config, config.encoder_config)
    _check_fit("llm", llm, llm_module.config, config.llm_config)
    config.encoder_name_or_path = reference(encoder, encoder_module)
    config.llm_name_or_path = reference(llm, llm_module)
    return SavedModel(config, trained, encoder_module, llm_module)


def is_trained(name: str) -> bool:
    """Whether a state-dict key belongs to the trained part: adapter, aligner or a gate."""
    return name.startswith(("adapter.", "aligner.")) or ".fusion_gate." in name


def trained_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of a model's adapter, aligner and gates."""
    return ((name, parameter) for name, parameter in model.named_parameters() if is_trained(name))


def load_trained_part(model: torch.nn.Module, weights: Weights, origin: str) -> None:
    """Copy a trained part into a model, strictly.

    Args:
        model: a LayAlignForConditionalGeneration.
        weights: a tensor for each of its trained parameters.
        origin: where the weights come from, for messages.

    Raises:
        ValueError: names or shapes that do not match, listed.
    """
    parameters = dict(trained_parameters(model))
    missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unexpected:
        raise ValueError(f"{origin!r} does not fit this model: missing {missing}, unexpected {unexpected}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{origin!r}: {name} has shape {tuple(weights[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def reference(source: Source, module: PreTrainedModel) -> str | None:
    """What to write down so that a base is found again: a hub name, `layalign:NAME`, or a folder's absolute path; None if unknown."""
    name = module.config.name_or_path if isinstance(source, torch.nn.Module) else str(source)
    if not name or name.startswith(PREFIX):
        return name or None
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _trained_weights(path: str) -> Weights:
    try:
        file = cached_file(path, SAFE_WEIGHTS_NAME)
    except OSError as error:
        raise ValueError(f"{path!r} has no {SAFE_WEIGHTS_NAME} with the trained part: {error}") from error
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _base(role: str, given: Source | None, recorded: str | None) -> Source:
    source = recorded if given is None else given
    if source is None:
        raise ValueError(
            f"the model does not say where its {role} comes from: pass {role}= (a name, a folder or a module)"
        )
    return source


def _check_fit(role: str, source: Source, found: PreTrainedConfig, expected: PreTrainedConfig) -> None:
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
