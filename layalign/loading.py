"""Bases and models from disk: hub names, folders, and the tiny bases shipped with the package."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

if TYPE_CHECKING:
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

PREFIX = "layalign:"
SHIPPED = Path(__file__).parent / "bases"
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


def load_encoder(source: str | Path | torch.nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The multilingual encoder as a module whose forward takes (input_ids, attention_mask): of an encoder-decoder, its encoder half.

    Args:
        source: hub name, folder, `layalign:NAME` or a transformers model.
        dtype: dtype of its weights; None: as stored. A module keeps its own.

    Raises:
        ValueError: no model there, one that lacks weights, or a module that is not transformers'.
    """
    if isinstance(source, torch.nn.Module):
        return encoder_half(source)
    path = resolve(source)
    return encoder_half(load_checked(encoder_class(_read_config(path, "encoder")), path, "encoder", dtype))


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


def encoder_limit(encoder: PreTrainedModel) -> int | None:
    """The most tokens the encoder reads, where it looks positions up in a learned table (BERT, XLM-R, BART, GPT-2); None: any number."""
    for name, module in encoder.named_modules():
        name = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name == "wpe"):
            # RoBERTa and its like count positions from the one behind their padding's.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return encoder.config.max_position_embeddings - unused
    return None


def load_llm(source: str | Path | torch.nn.Module, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The LLM, with its language-model head. Arguments and errors as in `load_encoder`."""
    if not isinstance(source, torch.nn.Module):
        path = resolve(source)
        _read_config(path, "llm")
        return load_checked(AutoModelForCausalLM, path, "llm", dtype)
    if not isinstance(source, PreTrainedModel) or source.get_output_embeddings() is None:
        raise ValueError(f"llm must be a transformers causal language model with its head, got {type(source).__name__}")
    return source


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with fresh random weights."""
    return encoder_half(encoder_class(config).from_config(config))


def load_model(
    model_path: str | os.PathLike,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    devices: str | None = None,
) -> tuple[LayAlignForConditionalGeneration, LayAlignProcessor]:
    """A saved model and its processor, in evaluation mode.

    Args:
        model_path: folder or hub name.
        dtype: None or "auto" as stored, "float32", "bfloat16" or "float16".
        device: where to; None: CUDA where there is one, else the CPU.
        devices: instead of `device`: spread the LLM's layers over all devices, see `layalign.spreading.spread`.

    Raises:
        ValueError: no model there, a dtype or device that there is not, or both of device and devices.
    """
    # By the package's lazy names: the model itself loads its bases by this module.
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    check_model_path(model_path)
    if device is not None and devices is not None:
        raise ValueError(f"devices: got {devices!r} and device {str(device)!r}, takes one of them")
    device, wanted = torch_device(device), torch_dtype(dtype)
    model = LayAlignForConditionalGeneration.from_pretrained(str(model_path), dtype=wanted).eval()
    if devices is None:
        model = model.to(device)
    else:
        from layalign.spreading import spread

        spread(model, devices)
    return model, LayAlignProcessor.from_pretrained(str(model_path))


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
    """A SHA-256 over the trained part and the settings in a model's folder, or a hub name as it is."""
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    names = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
    digest = hashlib.sha256()
    for path in sorted([*(folder / name for name in names), *folder.glob("*.safetensors")]):
        if path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def encoder_class(config: PreTrainedConfig) -> Any:
    """The AutoModel class that makes an encoder of a configuration."""
    return AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel


def load_checked(auto: Any, path: str, role: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """A pretrained model with all of its weights: transformers fills those that a checkpoint lacks with random numbers and only
    logs it.

    Args:
        auto: one of transformers' AutoModel classes.
        path: folder or hub name.
        role: what it is called in messages.
        dtype: of its weights; None: as stored.

    Raises:
        ValueError: weights that are missing, other than those of a pooler, which LayAlign does not use.
    """
    module, found = auto.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{role} {path!r} does not hold all weights of a {type(module).__name__}: missing {listed}")
    return module


def _read_config(path: str, role: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{role} {path!r} is neither a folder with a transformers config.json nor a model that can be fetched: {error}"
        ) from error
