"""What `from_bases`, `from_pretrained` and `from_published` take beside the bases: each argument arrives where it belongs, or raises."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from layalign import quantization as quantizing
from layalign.spelling import did_you_mean
from layalign.spreading import split_device_map

Given = dict[str, Any]

DTYPES = {
    str(dtype).partition(".")[2]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# For the model's own files and those of both bases.
SHARED: dict[str, tuple[type, ...]] = {
    "cache_dir": (str, os.PathLike),
    "force_download": (bool,),
    "local_files_only": (bool,),
    "proxies": (dict,),
    "token": (str, bool),
}
# Of one place: at the top that of the model's own files, within encoder_kwargs and llm_kwargs that of a base.
PLACE: dict[str, tuple[type, ...]] = {"revision": (str,), "subfolder": (str,)}
# For both bases alike, or for each its own.
BASES: dict[str, tuple[type, ...]] = {
    "trust_remote_code": (bool,),
    "use_safetensors": (bool,),
    "weights_only": (bool,),
    "variant": (str,),
    "code_revision": (str,),
}
# What transformers is told where a call says nothing: left to itself, it asks on stdin whether a base's own code may run.
NO_CODE: Given = {"trust_remote_code": False}
# Where the LLM's weights lie; encoder and trained part go where the LLM reads its inputs.
DEVICES = ("device_map", "max_memory", "offload_folder", "offload_buffers")
TYPED = SHARED | PLACE | BASES
LOADING = (
    "dtype",
    "torch_dtype",
    *DEVICES,
    "quantization_config",
    "attn_implementation",
    "encoder_kwargs",
    "llm_kwargs",
)
OF_ENCODER = ("dtype", "torch_dtype", *TYPED, "quantization_config", "attn_implementation")
OF_LLM = ("dtype", "torch_dtype", *TYPED, *DEVICES, "quantization_config")
# Given by transformers itself, by its auto classes and pipelines, and of no use here.
INTERNAL = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs")


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call, sorted.

    Attributes:
        own: of transformers' functions that find the model's own files.
        encoder, llm: of transformers' `from_pretrained` for each base, dtype (None: as stored) apart from the rest.
        encoder_dtype, llm_dtype: of the weights of each base; None: as stored.
        devices: of the LLM, as transformers takes them; empty: the CPU.
        quantization: {base: settings}, of quantization_config.
        attn_implementation: of the encoder; None: transformers' choice.
        settings: of LayAlignConfig.
    """

    own: Given = field(default_factory=dict)
    encoder: Given = field(default_factory=dict)
    llm: Given = field(default_factory=dict)
    encoder_dtype: torch.dtype | None = None
    llm_dtype: torch.dtype | None = None
    devices: Given = field(default_factory=dict)
    quantization: dict[str, Given] = field(default_factory=dict)
    attn_implementation: Any = None
    settings: Given = field(default_factory=dict)


def sorted_arguments(
    function: str, given: Mapping[str, Any], settings: Iterable[str], own_files: bool = True
) -> Arguments:
    """The arguments of a call, checked.

    Args:
        function: called, for messages.
        given: its keyword arguments.
        settings: names of LayAlignConfig's settings.
        own_files: whether it reads a model's own files, which `revision` and `subfolder` are then of.

    Raises:
        ValueError: an argument that it does not take, with those that it does; a wrong value; one thing given twice.
    """
    settings = sorted(settings)
    place = tuple(PLACE) if own_files else ()
    known = (*LOADING, *SHARED, *place, *BASES, *settings)
    left = {name: value for name, value in given.items() if name not in INTERNAL}
    for name in left:
        if name not in known:
            raise ValueError(_unknown(function, name, known, own_files))
    named = {name: value for name, value in left.items() if name in settings}
    left = {name: value for name, value in left.items() if name not in settings and value is not None}
    of_base = {role: _of_base(role, left.pop(f"{role}_kwargs", None)) for role in quantizing.BASES}
    _check_types(left)
    dtypes = _by_base("dtype", _one_name(left, "dtype"))
    devices = {name: left.pop(name) for name in DEVICES if name in left}
    if twice := devices.keys() & of_base["llm"].keys():
        raise ValueError(f"{min(twice)}: given twice, for the model and in llm_kwargs; it is of the LLM, give it once")
    devices |= {name: of_base["llm"].pop(name) for name in DEVICES if name in of_base["llm"]}
    quantized = _quantization_configs(left.pop("quantization_config", None), of_base)
    if twice := quantized.keys() & (quantizing.checked_quantization(named.get("quantization")) or {}).keys():
        raise ValueError(
            f"quantization and quantization_config: both say how the {min(twice)} is quantised; give one of them"
        )
    attention = left.pop("attn_implementation", None)
    if (own := of_base["encoder"].pop("attn_implementation", None)) is not None:
        if attention is not None:
            raise ValueError("attn_implementation: given twice, for the model and in encoder_kwargs; give it once")
        attention = own
    for role, own in of_base.items():
        if (dtype := _one_name(own, "dtype", f"{role}_kwargs: ")) is not None:
            dtypes[role] = checked_dtype(dtype, f"{role}_kwargs: dtype")
    shared = {name: value for name, value in left.items() if name in SHARED or name in BASES}
    return Arguments(
        own={name: value for name, value in left.items() if name in SHARED or name in place},
        encoder=shared | of_base["encoder"],
        llm=shared | of_base["llm"],
        encoder_dtype=dtypes.get("encoder"),
        llm_dtype=dtypes.get("llm"),
        devices=split_device_map(**devices),
        quantization=quantized,
        attn_implementation=attention,
        settings=named,
    )


def checked_dtype(value: Any, name: str = "dtype") -> torch.dtype | None:
    """A dtype of weights: torch's, its name, or "auto" and None for as stored.

    Raises:
        ValueError: another one.
    """
    if value is None or value == "auto":
        return None
    found = value if isinstance(value, torch.dtype) else DTYPES.get(value) if isinstance(value, str) else None
    if found not in DTYPES.values():
        near = did_you_mean(value, DTYPES) if isinstance(value, str) else ""
        raise ValueError(f"{name}: got {value!r}, takes {', '.join(DTYPES)} (torch's or by name) or 'auto'{near}")
    return found


def found_by(arguments: Mapping[str, Any]) -> Given:
    """Those of a base's arguments that find its files, as transformers' functions for configurations and tokenizers take them."""
    names = (*SHARED, *PLACE, "trust_remote_code", "code_revision")
    return NO_CODE | {name: arguments[name] for name in names if name in arguments}


def _unknown(function: str, name: str, known: Iterable[str], own_files: bool) -> str:
    if name in PLACE and not own_files:
        return (
            f"{name}: {function} reads two bases; give each its own, "
            f"encoder_kwargs={{{name!r}: ...}} and llm_kwargs={{{name!r}: ...}}"
        )
    if name == "use_auth_token":
        return f"{function} does not take 'use_auth_token'; it takes token"
    return f"{function} does not take {name!r}{_meant(name, known)}"


def _meant(name: Any, known: Iterable[str]) -> str:
    """The end of a message about a name that is none of the known ones."""
    near = did_you_mean(name, known)
    return f"{near} It takes {', '.join(known)}" if near else f"; it takes {', '.join(known)}"


def _of_base(role: str, value: Any) -> Given:
    if value is None:
        return {}
    known = OF_ENCODER if role == "encoder" else OF_LLM
    if not isinstance(value, Mapping):
        raise ValueError(f"{role}_kwargs: takes a mapping of {', '.join(known)}, got {value!r}")
    for name in value:
        if name in DEVICES and role == "encoder":
            raise ValueError(
                f"encoder_kwargs: {name} is the LLM's; the encoder goes where the LLM reads its inputs, with the trained part"
            )
        if name == "attn_implementation" and role == "llm":
            raise ValueError(
                "llm_kwargs: attn_implementation would drop the cross-attention; choose the fused operator's backend by attention_backend"
            )
        if name not in known:
            raise ValueError(f"{role}_kwargs does not take {name!r}{_meant(name, known)}")
    found = {name: own for name, own in value.items() if own is not None}
    _check_types(found, f"{role}_kwargs: ")
    return found


def _check_types(values: Mapping[str, Any], where: str = "") -> None:
    for name, value in values.items():
        kinds = TYPED.get(name)
        if kinds is not None and not isinstance(value, kinds):
            takes = " or ".join(
                {"PathLike": "a path", "dict": "a mapping", "str": "a str", "bool": "True or False"}[kind.__name__]
                for kind in kinds
            )
            raise ValueError(f"{where}{name}: got {value!r}, takes {takes}")


def _one_name(values: Given, name: str, where: str = "") -> Any:
    """The dtype, under its name or the one that transformers has given up, taken out of the arguments."""
    given = {known: values.pop(known) for known in (name, f"torch_{name}") if known in values}
    if len(given) == 2:
        raise ValueError(f"{where}dtype and torch_dtype: two names of one thing; give dtype")
    return next(iter(given.values()), None)


def _by_base(name: str, value: Any) -> dict[str, torch.dtype | None]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(quantizing.BASES, checked_dtype(value))
    for role in value:
        if role not in quantizing.BASES:
            raise ValueError(f"{name}: {role!r} is not a base{_meant(role, quantizing.BASES)}")
    return {role: checked_dtype(own, f"{name}: {role}") for role, own in value.items()}


def _quantization_configs(value: Any, of_base: dict[str, Given]) -> dict[str, Given]:
    """{base: settings} of transformers' configurations: one alone is the LLM's."""
    if isinstance(value, Mapping) and value and set(value) <= set(quantizing.BASES):
        given = {role: own for role, own in value.items() if own is not None}
    else:
        given = {} if value is None else {"llm": value}
    for role, own in of_base.items():
        if (more := own.pop("quantization_config", None)) is not None:
            if role in given:
                raise ValueError(f"quantization_config: given twice for the {role}; give it once")
            given[role] = more
    return {role: quantizing.of_transformers(own) for role, own in given.items()}
