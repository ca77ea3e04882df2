"""Quantised bases: settings, and what transformers takes for them. The bases are quantised when they are loaded, never saved so."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from layalign.spelling import did_you_mean, did_you_mean_or_known

Module = TypeVar("Module", bound=torch.nn.Module)
BASES = ("encoder", "llm")
BITS = ("4bit", "8bit")
# In the order they are looked for.
LIBRARIES = ("bitsandbytes", "torchao")
TYPES = ("nf4", "fp4")
_OPTIONS = ("bits", "library", "type", "double", "group_size")
_KINDS = "4bit, 8bit, none or a mapping (bits, library, type, double, group_size)"
# Instead of options: the dict of a quantisation configuration of transformers.
CONFIG = "config"


def checked_quantization(value: Any) -> dict[str, dict[str, Any]] | None:
    """Settings of quantisation in one form: {base: {"bits": ..., ...}}, None where nothing is quantised.

    Args:
        value: "4bit" or "8bit" for both bases, {"llm": ..., "encoder": ...} for each its own, or instead of a name a mapping of
            bits; library ("bitsandbytes", "torchao"; default: the first of them that is installed); of bitsandbytes' 4 bits type
            ("nf4", "fp4") and double (the scales quantised too); of torchao's 4 bits group_size, in weights. Or a mapping of config
            alone, the dict of a quantisation configuration of transformers, see `of_transformers`.

    Raises:
        ValueError: anything else.
    """
    if value is None or value == "none":
        return None
    if isinstance(value, dict) and value and not set(value) & {*_OPTIONS, CONFIG}:
        _check_keys(value, BASES, "a base")
        found = {base: _checked_base(value[base], base) for base in BASES if base in value}
    else:
        found = {base: _checked_base(value, "") for base in BASES}
    return {base: settings for base, settings in found.items() if settings is not None} or None


def of_transformers(value: Any) -> dict[str, Any]:
    """Settings of one base from what transformers takes as `quantization_config`, in a form that is saved as JSON.

    Args:
        value: one of transformers' configurations (BitsAndBytesConfig, TorchAoConfig, ...) or its dict.

    Raises:
        ValueError: anything else.
    """
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if isinstance(value, QuantizationConfigMixin):
        value = value.to_dict()
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"quantization_config: takes a quantisation configuration of transformers (BitsAndBytesConfig, ...) or its dict, "
            f"of the LLM, or {{'encoder': ..., 'llm': ...}}; got {value!r}"
        )
    return _checked_config(value)


def _checked_config(value: dict[str, Any]) -> dict[str, Any]:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        AutoQuantizationConfig.from_dict(dict(value))
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"quantization_config: transformers does not take {value!r}: {error}") from error
    return {CONFIG: value}


def quantization_config(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """What `from_pretrained` of transformers takes.

    Args:
        settings: one base's, checked.
        dtype: what its layers compute in.

    Raises:
        ValueError: the library is not installed.
    """
    if CONFIG in settings:
        from transformers.quantizers.auto import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict(dict(settings[CONFIG]))
    library = chosen_library(settings)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        if settings["bits"] == "8bit":
            return TorchAoConfig(Int8WeightOnlyConfig())
        groups = PerGroup(settings.get("group_size", 32))
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups))  # type: ignore[attr-defined]
    from transformers import BitsAndBytesConfig

    if settings["bits"] == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.get("type", TYPES[0]),
        bnb_4bit_use_double_quant=settings.get("double", False),
        bnb_4bit_compute_dtype=dtype,
    )


def chosen_library(settings: dict[str, Any]) -> str:
    """The library that quantises: the one named, or the first of LIBRARIES that is installed and has the options asked for.

    Raises:
        ValueError: it is not installed.
    """
    named = settings.get("library")
    asked = (named,) if named else _fitting(settings)
    found = next((library for library in asked if find_spec(library) is not None), None)
    if found is None:
        raise ValueError(
            f"quantization: {settings['bits']} needs {' or '.join(asked)}, which is not installed: "
            'pip install "layalign[quantization]"'
        )
    return found


def with_libraries(quantization: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
    """Checked settings, the library named that quantises each base, so that the same one does where they are read again.

    Raises:
        ValueError: it is not installed.
    """
    if quantization is None:
        return None
    return {
        base: settings if CONFIG in settings else settings | {"library": chosen_library(settings)}
        for base, settings in quantization.items()
    }


def computing_alike(module: Module) -> Module:
    """`module`, of which no layer changes to bitsandbytes' 4-bit kernel for CPUs with AVX512-BF16 when it is first evaluated.

    That kernel packs the weights anew, of widths that are multiples of 32 and 64 alone, computes in bf16 whatever the layer's dtype, and
    passes no gradient on where the model is trained again after an evaluation (bitsandbytes 0.50).
    """
    switch = "support_avx512bf16_for_cpu"
    for layer in module.modules():
        if getattr(layer, switch, False):
            setattr(layer, switch, False)
    return module


def is_quantized(config: Any) -> bool:
    """Whether a transformers configuration says that its checkpoint is quantised already (AWQ, GPTQ, bitsandbytes, ...)."""
    return getattr(config, "quantization_config", None) is not None


def _checked_base(value: Any, base: str) -> dict[str, Any] | None:
    where = f"{base}: " if base else ""
    if value is None or value == "none":
        return None
    if isinstance(value, str):
        value = {"bits": value}
    if not isinstance(value, dict) or not value:
        raise ValueError(f"quantization: {where}takes {_KINDS}, got {value!r}")
    if set(value) == {CONFIG} and isinstance(value[CONFIG], dict):
        return _checked_config(value[CONFIG])
    _check_keys(value, _OPTIONS, "an option")
    settings = {key: value[key] for key in _OPTIONS if value.get(key) is not None}
    for key, allowed in (("bits", BITS), ("library", LIBRARIES), ("type", TYPES), ("double", (True, False))):
        if (key == "bits" or key in settings) and settings.get(key) not in allowed:
            got = f"got {settings.get(key)!r}{did_you_mean(settings.get(key), allowed)}"
            raise ValueError(f"quantization: {where}{key} must be one of {', '.join(map(str, allowed))}, {got}")
    size = settings.get("group_size", 32)
    if type(size) is not int or size < 1:
        raise ValueError(f"quantization: {where}group_size must be a whole number from 1, got {size!r}")
    named = settings.get("library")
    if not _fitting(settings) or (named and named not in _fitting(settings)):
        raise ValueError(
            f"quantization: {where}type and double are options of bitsandbytes' 4bit, group_size of torchao's; got {settings}"
        )
    return settings


def _fitting(settings: dict[str, Any]) -> Sequence[str]:
    """The libraries that have the options asked for."""
    four, fitting = settings["bits"] == "4bit", []
    if "group_size" not in settings and (four or not {"type", "double"} & settings.keys()):
        fitting.append("bitsandbytes")
    if not {"type", "double"} & settings.keys() and (four or "group_size" not in settings):
        fitting.append("torchao")
    return fitting


def _check_keys(values: dict[Any, Any], known: Sequence[str], what: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"quantization: {key!r} is not {what}{did_you_mean_or_known(key, known)}")
