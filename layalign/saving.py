"""Saved models on disk: the trained part, with references to the bases instead of the bases. Builds no model: `model.py` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from layalign.arguments import Arguments
from layalign.base_models import Source, check_fit, load_base, write_down, written_down
from layalign.base_samples import check_same, sample
from layalign.configuration import LayAlignConfig, is_unread
from layalign.folders import check_sealed, read_from
from layalign.loading import load_llm
from layalign.parts import is_trained, part_of, trained_parameters
from layalign.quantization import with_libraries

# Where a trained LLM lies in a model's folder.
LLM_FOLDER = "llm"
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SavedModel:
    """What a model is built from: its settings, trained part and bases, all checked against each other."""

    config: LayAlignConfig
    trained: Weights
    encoder: PreTrainedModel | None
    llm: PreTrainedModel


def read_saved(
    path: str,
    encoder: Source | None,
    llm: Source | None,
    config: LayAlignConfig | None,
    arguments: Arguments,
    check_bases: bool = True,
) -> SavedModel:
    """Read what `save_pretrained` wrote, and the bases it refers to.

    Args:
        path: folder or hub name.
        encoder, llm: other places (or modules) for the same bases.
        config: settings instead of those at `path`.
        arguments: of the call.
        check_bases: compare the bases' weights with those trained with, and refuse NaN and Inf among them.

    Raises:
        ValueError: no LayAlign model at `path`, a base that cannot be found or does not fit, weights that are damaged.
    """
    given = {"encoder": encoder, "llm": llm}
    config = read_settings(path, config, arguments)
    if config.train_llm and llm is not None:
        raise ValueError(
            f"llm: the LLM of {path!r} was trained with it and is saved in it ({LLM_FOLDER}/); another has not been, leave llm out"
        )
    if config.encoder_config is None and encoder is not None:
        raise ValueError(f"encoder: {path!r} is an LLM alone, which reads no encoder; leave encoder out")
    quantized = config.quantization or {}
    # As saved: a module is as it is. What a call asks of one is refused.
    if arguments.settings.get("quantization") is None:
        quantized = {base: own for base, own in quantized.items() if not isinstance(given[base], torch.nn.Module)}
    config.quantization = with_libraries(quantized | arguments.quantization or None)
    config.checked()
    trained = trained_weights(path, **arguments.own)
    modules: dict[str, PreTrainedModel | None] = {"encoder": None}
    for role in ("encoder", "llm"):
        if getattr(config, f"{role}_config") is None:
            continue
        if role == "llm" and config.train_llm:
            modules[role] = own = load_own_llm(path, arguments)
            _take_up(config, role, f"{path}/{LLM_FOLDER}", own)
            continue
        source, asked = given[role], getattr(arguments, role)
        if source is None:
            source, place = written_down(role, config, path)
            asked = place | asked
        modules[role] = own = load_base(
            role, source, replace(arguments, **{role: asked}), config.quantization, check_bases
        )
        _take_up(config, role, source, own)
        if check_bases:
            shown = type(source).__name__ if isinstance(source, torch.nn.Module) else source
            check_same(role, shown, config.base_samples, {role: sample(own)})
        write_down(config, role, source, own, asked)
    config.checked()  # of a base with code of its own, what could not be before it was loaded
    loaded = modules["llm"]
    assert loaded is not None, "read_settings refuses this"
    return SavedModel(config, trained, modules["encoder"], loaded)


def _take_up(config: LayAlignConfig, role: str, source: Source, base: PreTrainedModel) -> None:
    """See that a base has the sizes written down; one with code of its own brings its configuration's class now."""
    expected = getattr(config, f"{role}_config")
    if is_unread(expected):
        setattr(config, f"{role}_config", base.config)
    else:
        check_fit(role, source, base.config, expected)


def read_settings(path: str, config: LayAlignConfig | None, arguments: Arguments) -> LayAlignConfig:
    """The settings of a saved model, with those of a call in their place.

    Args:
        path: folder or hub name.
        config: instead of those at `path`.
        arguments: of the call.

    Raises:
        ValueError: no LayAlign model there, or a wrong setting.
    """
    if config is None:
        try:
            with read_from(path, "model"):
                config = LayAlignConfig.from_pretrained(path, **arguments.own)
        except (OSError, KeyError) as error:
            raise ValueError(
                f"{path!r} holds no LayAlign model (a folder or hub name with a config.json): {error}"
            ) from error
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"config: takes a LayAlignConfig, got {config!r}")
    if config.model_type != LayAlignConfig.model_type:
        raise ValueError(f"{path!r} holds a {config.model_type!r} model, not a LayAlign model")
    if config.lacks_bases:
        raise ValueError(f"{path!r} holds no LayAlign model: it has no config.json that names two bases")
    if config.train_llm and arguments.settings.get("train_llm", True) is False:
        raise ValueError(
            f"train_llm: got False, and the LLM of {path!r} was trained with it: it is loaded and saved with the model; "
            "train_only says what of the model is trained from now on"
        )
    for name, value in arguments.settings.items():
        if not (name == "quantization" and value is None):  # as saved
            setattr(config, name, value)
    config.checked()
    return config


def load_own_llm(path: str, arguments: Arguments | None = None) -> PreTrainedModel:
    """The LLM that was trained with a model and saved with it.

    Args:
        path: the model's folder or hub name.
        arguments: of the call; None: as it is stored, on the CPU.

    Raises:
        ValueError: none there, or a damaged one.
    """
    arguments = arguments or Arguments()
    folder = "/".join(part for part in (arguments.own.get("subfolder"), LLM_FOLDER) if part)
    asked = arguments.llm | arguments.own | arguments.devices | {"subfolder": folder}
    try:
        return load_llm(path, arguments.llm_dtype, **asked)
    except (ValueError, SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path!r}: its LLM, trained with it, is not whole in {LLM_FOLDER}/: {error}") from error


def load_trained_part(model: torch.nn.Module, weights: Weights, origin: str, with_llm: bool = True) -> None:
    """Copy a trained part into a model, strictly.

    Args:
        model: a LayAlignForConditionalGeneration.
        weights: a tensor for each of its trained parameters.
        origin: where the weights come from, for messages.
        with_llm: whether those of an LLM that is trained belong to them; else they stay as they are.

    Raises:
        ValueError: names or shapes that do not match, listed.
    """
    parameters = {name: own for name, own in trained_parameters(model) if with_llm or is_trained(name)}
    held = {id(own) for own in parameters.values()}
    # A tied weight stands in a state dict under each of its names.
    tied = {name for name, own in model.named_parameters(remove_duplicate=False) if id(own) in held}
    missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys() - tied)
    if missing or unexpected:
        raise ValueError(
            f"{origin!r} does not fit this model: missing {_listed(missing)}, unexpected {_listed(unexpected)}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{origin!r}: {name} has shape {tuple(weights[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
        value = weights[name]
        if not value.is_floating_point():
            raise ValueError(f"{origin!r}: {name} is {value.dtype}, takes floating point numbers")
        if not bool((value.float() if value.itemsize == 1 else value).isfinite().all()):
            raise ValueError(f"{origin!r}: {name} holds NaN or Inf: what was trained is damaged")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_saved_part(model: torch.nn.Module, saved: SavedModel, origin: str, arguments: Arguments) -> None:
    """Copy a saved trained part into a model made of the same folder, in the dtypes asked for: the LLM's, and where an encoder is
    trained the encoder's; where nothing is asked for, the encoder's as stored, and what is trained beside the bases in fp32. The
    model's settings of `generate` become those saved with it.

    Args:
        model: a LayAlignForConditionalGeneration.
        saved: of the folder.
        origin: the folder, for messages.
        arguments: of the call.

    Raises:
        ValueError: as `load_trained_part`.
    """
    own = next((value.dtype for name, value in saved.trained.items() if part_of(name) == "encoder"), None)
    if saved.config.train_encoder and saved.encoder is not None and own is not None and arguments.encoder_dtype is None:
        saved.encoder.to(own)
    load_trained_part(model, saved.trained, origin, with_llm=False)
    try:
        with read_from(origin, "model"):
            model.generation_config = GenerationConfig.from_pretrained(origin, **arguments.own)
    except OSError:  # none there
        pass
    if arguments.llm_dtype is not None:
        for name, parameter in trained_parameters(model):
            if part_of(name) != "encoder":
                parameter.data = parameter.data.to(saved.llm.dtype)


def trained_weights(path: str, compared: bool = False, **kwargs: Any) -> Weights:
    """The tensors of `model.safetensors` at a folder or hub name.

    Args:
        path: of the model.
        compared: whether its folder has been compared with the manifest already, which reads every file.
        kwargs: that find it, as transformers takes them (revision, subfolder, ...).

    Raises:
        ValueError: no such file, or a damaged one, as far as itself or a manifest beside it tells.
    """
    try:
        file = cached_file(path, SAFE_WEIGHTS_NAME, **kwargs)
    except OSError as error:
        raise ValueError(f"{path!r} has no {SAFE_WEIGHTS_NAME} with the trained part: {error}") from error
    if not compared:
        check_sealed(Path(file).parent, weights=True)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _listed(names: list[str]) -> list[str]:
    """Names for a message; an LLM has hundreds."""
    return names if len(names) <= 20 else [*names[:20], f"and {len(names) - 20} more"]
