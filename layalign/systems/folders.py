"""Folders and hub names of transformers models: looked at before they are loaded, told apart by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from layalign.arguments import NO_CODE
from layalign.configuration import LayAlignConfig
from layalign.kernels.files import blocks_of
from layalign.loading import resolve
from layalign.spelling import first_line

# What changes answers: weights, configurations, tokenizers and chat templates.
HASHED = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
CHUNK = 1 << 24
# Below so many bytes a fingerprint takes a second or two, and shows no bar.
SHOWN_FROM = 1 << 31


def causal_config(role: str, path: str) -> PreTrainedConfig:
    """The configuration of a causal LM.

    Args:
        role: the option that names it, for messages.
        path: a folder, a hub name or `layalign:NAME`.

    Raises:
        ValueError: anything else is there, or nothing.
    """
    config = _config(role, path)
    if config.model_type == LayAlignConfig.model_type:
        raise ValueError(f"{role}: {path} holds a LayAlign model, takes a causal LM alone; give it as the model")
    masked = any("ForMaskedLM" in name for name in config.architectures or ())
    if config.is_encoder_decoder or masked or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{role}: {path} holds {_kind(config)}, takes a causal LM")
    return config


def seq2seq_config(role: str, path: str) -> PreTrainedConfig:
    """The same of an encoder-decoder."""
    config = _config(role, path)
    if not config.is_encoder_decoder or config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{role}: {path} holds {_kind(config)}, takes an encoder-decoder such as NLLB, M2M100, mBART or T5"
        )
    return config


def fingerprint(path: str | Path) -> str:
    """A SHA-256 over what a folder, or one file, holds of a model; a hub name as it is."""
    place = Path(resolve(path))
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in HASHED and file.is_file())
    else:
        return str(path)
    total = sum(file.stat().st_size for file in files)
    digest = hashlib.sha256()
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"hash {place.name}", disable=total < SHOWN_FROM) as bar:
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for block in blocks_of(file, CHUNK):
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def check_place(role: str, path: str) -> None:
    """Pass a folder with a config.json, or what may be a hub name.

    Raises:
        ValueError: a file, a folder without a model, or a path to nothing.
    """
    place = Path(resolve(path))
    if not str(path).strip():
        raise ValueError(f"{role}: got {path!r}, takes the folder or the hub name of a model")
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ValueError(f"{role}: the folder {path} holds no model (no config.json)")
    elif place.exists():
        raise ValueError(f"{role}: {path} is a file, takes the folder of a model")
    elif str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise ValueError(f"{role}: no such folder: {path!r}")


def _config(role: str, path: str) -> PreTrainedConfig:
    check_place(role, path)
    try:
        return AutoConfig.from_pretrained(resolve(path), **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{role}: {path} is neither a folder with a transformers config.json nor a model that can be fetched: "
            f"{first_line(error)}"
        ) from error


def _kind(config: PreTrainedConfig) -> str:
    names = config.architectures or [f"a model of type {config.model_type!r}"]
    return names[0]
