"""Bases and models from disk: hub names, folders, and the tiny bases shipped with the package."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from layalign.adapters import unwrapped
from layalign.arguments import BASES, NO_CODE, PLACE, SHARED, found_by
from layalign.base_samples import check_finite, is_unused
from layalign.folders import read_from
from layalign.kernels.files import blocks_of
from layalign.quantization import computing_alike, is_quantized, quantization_config
from layalign.spelling import first_line
from layalign.spreading import check_names, spread

if TYPE_CHECKING:
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

PREFIX = "layalign:"
SHIPPED = Path(__file__).parent / "bases"
# Files of a model's folder that decide what it answers, beside its weights.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DECIDING = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.jinja",
    *_TOKENIZER,
    *(f"encoder_tokenizer/{name}" for name in _TOKENIZER),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str | Path) -> str:
    """Turn `layalign:NAME` into the folder of a shipped base; anything else comes back as it is (a folder or a hub name).

    Raises:
        ValueError: no shipped base has that name.
    """
    name = str(name)
    if not name.startswith(PREFIX):
        return name
    folder = SHIPPED / name.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
        raise ValueError(f"no base called {name!r} ships with layalign; shipped: {[PREFIX + s for s in shipped]}")
    return str(folder)


def load_encoder(
    source: str | Path | torch.nn.Module,
    dtype: torch.dtype | None = None,
    quantization: dict[str, Any] | None = None,
    *,
    check: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """The multilingual encoder as a module whose forward takes (input_ids, attention_mask): of an encoder-decoder, its encoder half.

    Args:
        source: hub name, folder, `layalign:NAME` or a transformers model.
        dtype: dtype of its weights; None: as stored. A module keeps its own.
        quantization: how its weights are quantised, see `layalign.quantization`; None: as they are stored.
        check: whether NaN and Inf among the weights are refused; those of a module, of another format or offloaded are not looked at.
        kwargs: of transformers' `from_pretrained`, see `layalign.arguments`.

    Raises:
        ValueError: no model there, one that lacks weights or has NaN or Inf there, a module that is not transformers' or, with
            quantization or another dtype, any, or a library for that which is not installed.
    """
    if isinstance(source, torch.nn.Module):
        _use_as_it_is("encoder", source, dtype, quantization, kwargs)
        return computing_alike(encoder_half(source))
    path = resolve(source)
    config = read_config(path, "encoder", **found_by(kwargs))
    quantized = _quantized("encoder", path, config, dtype, quantization)
    whole = load_checked(encoder_class(config), path, "encoder", dtype, check, **kwargs, **quantized)
    return computing_alike(encoder_half(whole))


def encoder_half(module: torch.nn.Module) -> PreTrainedModel:
    """Of T5, mT5, NLLB and the like only the encoder stack is needed; BERT-like and decoder-only models are used whole.

    Raises:
        ValueError: not a transformers model.
    """
    if not isinstance(module, PreTrainedModel):
        raise ValueError(f"encoder must be a name, a folder or a transformers model, got {type(module).__name__}")
    stack = getattr(module, "encoder", None)
    two_halves = module.config.is_encoder_decoder or type(module).__name__.endswith("EncoderModel")
    if two_halves and stack is None:
        stack = module.get_encoder()
    return stack if two_halves and isinstance(stack, PreTrainedModel) else module


def load_llm(
    source: str | Path | torch.nn.Module,
    dtype: torch.dtype | None = None,
    quantization: dict[str, Any] | None = None,
    *,
    check: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """The LLM, with its language-model head. Arguments and errors as in `load_encoder`."""
    if not isinstance(source, torch.nn.Module):
        path = resolve(source)
        config = read_config(path, "llm", **found_by(kwargs))
        if isinstance(kwargs.get("device_map"), dict) and set(kwargs["device_map"]) != {""}:
            trust = kwargs.get("trust_remote_code", False)
            with torch.device("meta"):
                check_names(kwargs["device_map"], AutoModelForCausalLM.from_config(config, trust_remote_code=trust))
        quantized = _quantized("llm", path, config, dtype, quantization)
        return computing_alike(load_checked(AutoModelForCausalLM, path, "llm", dtype, check, **kwargs, **quantized))
    source = unwrapped(source)
    _use_as_it_is("llm", source, dtype, quantization, kwargs)
    if not isinstance(source, PreTrainedModel) or source.get_output_embeddings() is None:
        raise ValueError(f"llm must be a transformers causal language model with its head, got {type(source).__name__}")
    return computing_alike(source)


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with fresh random weights."""
    return encoder_half(encoder_class(config).from_config(config, **NO_CODE))


def load_model(
    model_path: str | os.PathLike,
    dtype: Any = None,
    device: str | torch.device | None = None,
    devices: str | None = None,
    **kwargs: Any,
) -> tuple[LayAlignForConditionalGeneration, LayAlignProcessor]:
    """A saved model and its processor, in evaluation mode.

    Args:
        model_path: folder or hub name.
        dtype: None or "auto" as stored, "float32", "bfloat16" or "float16", or as `from_pretrained` takes it.
        device: where to; None: CUDA where there is one, else the CPU.
        devices: instead of `device`: spread the LLM's layers over all devices, see `layalign.spreading.spread`.
        kwargs: other arguments of `LayAlignForConditionalGeneration.from_pretrained`; with its device_map neither device nor devices.

    Raises:
        ValueError: no model there, a dtype or device that there is not, two of device, devices and device_map, or what
            `from_pretrained` refuses.
    """
    # By the package's lazy names: the model itself loads its bases by this module.
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    inside = kwargs.get("subfolder") if Path(model_path).is_dir() else None
    check_model_path(Path(model_path, inside) if inside else model_path)
    if device is not None and devices is not None:
        raise ValueError(f"devices: got {devices!r} and device {str(device)!r}, takes one of them")
    placed = kwargs.get("device_map") is not None
    if placed and (device is not None or devices is not None):
        raise ValueError("device and device_map, devices and device_map: two ways of one thing; give one")
    device = torch_device("cpu" if placed else device)
    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    model = LayAlignForConditionalGeneration.from_pretrained(str(model_path), dtype=wanted, **kwargs).eval()
    if devices is not None:
        spread(model, devices)
    elif not placed:
        model = model.to(device)
    finds = {name: value for name, value in kwargs.items() if name in SHARED or name in PLACE}
    return model, LayAlignProcessor.from_pretrained(str(model_path), **finds)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None or "auto": None, as stored.

    Raises:
        ValueError: another name.
    """
    if name not in (None, "auto", *DTYPES):
        raise ValueError(f"dtype: got {name!r}, takes {', '.join(DTYPES)} or auto")
    return DTYPES.get(name or "auto")


def torch_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, takes cpu, cuda or cuda:N ({str(error).splitlines()[0]})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, but torch finds no CUDA device")
    return device


def check_model_path(model_path: str | os.PathLike) -> None:
    """Pass a folder with a model, or a hub name.

    Raises:
        ValueError: a folder without a model, or a path to nothing.
    """
    path = Path(model_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: the folder {path} holds no model (no config.json)")
    elif path.exists():
        raise ValueError(f"model: {path} is a file, takes the folder of a trained model")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model_path)) or path.parent.is_dir():
        raise ValueError(f"model: no such folder: {path}")


def fingerprint(model_path: str | os.PathLike) -> str:
    """A SHA-256 over what decides answers in a model's folder, or a hub name as it is."""
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    digest = hashlib.sha256()
    weights = (*folder.glob("*.safetensors"), *folder.glob("llm/*.safetensors"))
    for path in sorted([*(folder / name for name in _DECIDING), *weights]):
        if path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            for block in blocks_of(path):  # an LLM that was trained is there as a whole
                digest.update(block)
    return digest.hexdigest()


def encoder_class(config: PreTrainedConfig) -> Any:
    """The AutoModel class that makes an encoder of a configuration."""
    return AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel


def load_checked(
    auto: Any, path: str, role: str, dtype: torch.dtype | None, check: bool = True, **kwargs: Any
) -> PreTrainedModel:
    """A pretrained model with all of its weights: transformers fills those that a checkpoint lacks with random numbers and only
    logs it.

    Args:
        auto: one of transformers' AutoModel classes.
        path: folder or hub name.
        role: what it is called in messages.
        dtype: of its weights; None: as stored.
        check: whether NaN and Inf among them are refused.
        kwargs: other arguments of `from_pretrained`.

    Raises:
        ValueError: no weights there, some that are missing, other than those of a pooler, which LayAlign does not use, or that
            are NaN or Inf or cannot be quantised, or a package that is not installed.
    """
    # transformers looks for an adapter, too, and there it does not pass these on itself.
    finds = {name: kwargs[name] for name in (*SHARED, *PLACE) if name in kwargs}
    finds = {"adapter_kwargs": finds} if finds else {}
    kwargs = NO_CODE | kwargs
    try:
        with read_from(path, role):
            module, found = auto.from_pretrained(
                path, dtype=dtype or "auto", output_loading_info=True, **finds, **kwargs
            )
    except (OSError, ImportError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{role} {path!r} cannot be loaded: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "quantization_config" not in kwargs:
            # Which weight it was stands in transformers' report before it.
            raise ValueError(
                f"{role} {path!r} cannot be loaded, its weights are damaged or do not fit its config.json: {error}"
            ) from error
        # Which layer it was stands in transformers' report before it.
        raise ValueError(
            f"quantization: {role} {path!r} cannot be quantised so ({error}); torchao's group_size must divide the width of every layer"
        ) from error
    missing = sorted(name for name in found["missing_keys"] if not is_unused(name))
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{role} {path!r} does not hold all weights of a {type(module).__name__}: missing {listed}")
    if check:
        check_finite(role, path, module)
    return module


def read_config(path: str, role: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a base.

    Args:
        path: folder or hub name.
        role: what it is called in messages.
        kwargs: that find it, as transformers takes them (revision, subfolder, ...).

    Raises:
        ValueError: none there.
    """
    try:
        with read_from(path, role):
            return AutoConfig.from_pretrained(path, **NO_CODE | kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{role} {path!r} is neither a folder with a transformers config.json nor a model that can be fetched: {error}"
        ) from error


def load_tokenizer(role: str, path: str | Path | None, finds: Mapping[str, Any] = NO_CODE) -> Any:
    """A base's tokenizer.

    Args:
        role: what the base is called in messages.
        path: folder, hub name or `layalign:NAME`; None is refused.
        finds: what transformers is told beside it (revision, subfolder, ...).

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if path is None:
        raise ValueError(f"{role}: got none, takes the place of a tokenizer")
    place = resolve(path)
    try:
        with read_from(place, role):
            return AutoTokenizer.from_pretrained(place, **finds)
    except Exception as error:  # tokenizers raises errors of no class of its own
        why = first_line(error)
        if "tiktoken" in why and find_spec("sentencepiece") is None:  # which would not help
            why = "a SentencePiece file alone is read with `pip install sentencepiece protobuf`"
        raise ValueError(f"{role}: {path} holds no tokenizer that can be loaded: {why}") from error


def _quantized(role, path, config, dtype, settings):
    """The arguments of `from_pretrained` that quantise a base. Its layers compute in the dtype they would have."""
    if settings is None:
        return {}
    if is_quantized(config):
        kind = config.quantization_config
        kind = kind.get("quant_method") if isinstance(kind, dict) else kind.quant_method
        raise ValueError(f"quantization: {role} {path!r} is quantised already ({kind}); leave it out for the {role}")
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = dtype or stored
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return {"quantization_config": quantization_config(settings, dtype)}


def _use_as_it_is(role, module, dtype, settings, kwargs):
    """That nothing is asked of a module, which is used as it is; how files are found does not concern it."""
    if settings is not None:
        raise ValueError(
            f"quantization: the {role} is a module, which is used as it is; give its name or folder, or a quantised module"
        )
    if (
        dtype is not None
        and (own := next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)) != dtype
    ):
        raise ValueError(
            f"dtype: the {role} is a module of {own}, which is used as it is, got {dtype}; give its name or folder, or "
            f"module.to({dtype})"
        )
    asked = sorted(set(kwargs) - set(SHARED) - set(BASES))
    if asked:
        raise ValueError(f"{asked[0]}: the {role} is a module, which is used as it is; give its name or folder")
