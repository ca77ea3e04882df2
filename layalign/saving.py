"""Saving and loading the trained part, with references to the bases instead of the bases."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from layalign import bases
from layalign.configuration import LayAlignConfig, encoder_depth


def is_trained(name):
    """Whether a state-dict key belongs to the trained part: adapter, aligner or a gate."""
    return name.startswith(("adapter.", "aligner.")) or ".fusion_gate." in name


def reference(source, module):
    """What to write down so that a base is found again: a hub name, `layalign:NAME`, or a folder's absolute path; None if unknown."""
    name = module.config.name_or_path if isinstance(source, torch.nn.Module) else str(source)
    if not name or name.startswith(bases.PREFIX):
        return name or None
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def from_pretrained(cls, path, *, encoder=None, llm=None, config=None, dtype=None, **kwargs):
    """Bases by reference, then the trained part.

    Raises:
        ValueError: no LayAlign model at `path`, a base that cannot be found or does not fit, weights that are damaged or do not fit.
    """
    path = str(path)
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
    weights = _trained_weights(path)
    encoder = _base("encoder", encoder, config.encoder_name_or_path)
    llm = _base("llm", llm, config.llm_name_or_path)
    expected_encoder, expected_llm = config.encoder_config, config.llm_config
    encoder_module, llm_module = bases.load_encoder(encoder, dtype), bases.load_llm(llm, dtype)
    _check_fit("encoder", encoder, encoder_module.config, expected_encoder)
    _check_fit("llm", llm, llm_module.config, expected_llm)
    config.encoder_name_or_path = reference(encoder, encoder_module)
    config.llm_name_or_path = reference(llm, llm_module)
    model = cls(config, encoder_module, llm_module)
    load_trained_part(model, weights, path)
    if dtype is not None:
        for _, parameter in model.trained_parameters():
            parameter.data = parameter.data.to(llm_module.dtype)
    return model.eval()


def load_trained_part(model, weights, origin):
    """Copy a trained part into a model, strictly.

    Raises:
        ValueError: names or shapes that do not match, listed.
    """
    parameters = dict(model.trained_parameters())
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


def _trained_weights(path):
    try:
        file = cached_file(path, SAFE_WEIGHTS_NAME)
    except OSError as error:
        raise ValueError(f"{path!r} has no {SAFE_WEIGHTS_NAME} with the trained part: {error}") from error
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error


def _base(role, given, recorded):
    source = recorded if given is None else given
    if source is None:
        raise ValueError(
            f"the model does not say where its {role} comes from: pass {role}= (a name, a folder or a module)"
        )
    return source


def _check_fit(role, source, found, expected):
    if role == "encoder":
        sizes = {"hidden_size": lambda c: c.hidden_size, "layers": encoder_depth, "vocab_size": lambda c: c.vocab_size}
    else:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes = {name: (lambda c, name=name: getattr(c.get_text_config(), name)) for name in names}
    wrong = {name: (size(found), size(expected)) for name, size in sizes.items() if size(found) != size(expected)}
    if wrong:
        listed = ", ".join(f"{name} {got} instead of {want}" for name, (got, want) in wrong.items())
        raise ValueError(
            f"{role} {source if isinstance(source, str) else type(source).__name__!r} is not the one trained with: {listed}"
        )
