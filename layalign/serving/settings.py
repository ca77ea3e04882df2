"""ServedConfig: a model's settings as vLLM reads them, and what of them it serves."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from layalign.base_models import written_down
from layalign.configuration import LayAlignConfig
from layalign.limits import position_limit
from layalign.loading import build_encoder, resolve
from layalign.saving import LLM_FOLDER

# Families of LLMs whose classes in vLLM are tested against transformers', each with the norm of keys that its attention has.
KEY_NORMS = {
    "llama": None,
    "mistral": None,
    "qwen2": None,
    "qwen3": "k_norm",
    "gemma": None,
    "gemma2": None,
    "gemma3_text": "k_norm",
}


# The longest question, in tokens, for an encoder that has no limit of its own. vLLM measures memory by the longest one there can be, and
# such encoders (mT5) hold a bias for each pair of tokens: of 32,768 of them those of 16 heads are 32 GiB in 16 bits.
UNLIMITED = 4096
# What the server's settings or a request may say of how a question is read, as mm_processor_kwargs, and what each takes.
READING: dict[str, type] = {"lang": str, "encoder_max_length": int}
PAGED_DECODE = "LAYALIGN_PAGED_DECODE"


def paged_decode_asked() -> bool:
    """Whether LAYALIGN_PAGED_DECODE=1 asks for both attentions of a decoding step in one launch, which no GPU has run.

    Raises:
        ValueError: neither 0 nor 1.
    """
    given = os.environ.get(PAGED_DECODE, "0")
    if given not in ("0", "1"):
        raise ValueError(f"{PAGED_DECODE}: got {given!r}, takes 0 or 1")
    return given == "1"


class ServedConfig(LayAlignConfig):
    """LayAlignConfig for vLLM, which asks the outermost configuration whether there is an encoder.

    Args:
        longest_question: the most tokens of a question that are taken, by `--hf-overrides`; None: what the encoder reads, UNLIMITED where
            it reads any number.
    """

    model_type = "layalign"
    is_encoder_decoder: bool = True
    longest_question: int | None = None


def check_served(config: LayAlignConfig) -> None:
    """Pass settings that vLLM can serve.

    Raises:
        ValueError: others, with what to do about them.
    """
    family = config.get_text_config().model_type
    if family not in KEY_NORMS:
        raise ValueError(f"vLLM: the LLM is of the family {family!r}; LayAlign serves {', '.join(KEY_NORMS)} there")
    if config.adapter is None:
        raise ValueError("vLLM: this model has no adapter, and LayAlign serves models with soft prompts there")
    if config.lora is not None:
        raise ValueError(
            "vLLM: this model has LoRA on its LLM; merge_lora() and save_pretrained make one that can be served"
        )
    if config.train_encoder:
        raise ValueError("vLLM: this model's encoder is trained with it, and LayAlign serves frozen encoders there")
    if config.quantization:
        raise ValueError(
            "vLLM: this model says how its bases are quantised (bitsandbytes, torchao); set quantization to none"
        )
    if config.gate is None and config.aligner is not None:
        raise ValueError("vLLM: cross-attention without a gate is not served; 'scalar' and 'head' gates are")
    if config.gate == "dynamic" and config.aligner is not None:
        raise ValueError(
            "vLLM: dynamic gates read the hidden state, which LayAlign does not do there; 'scalar' and 'head' are served"
        )


def given_revision(arguments: Sequence[str]) -> str | None:
    """The model's revision among options of `vllm serve`; of several the last, as vLLM reads them.

    Raises:
        ValueError: the option without a revision.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--revision")
    try:
        return parser.parse_known_args(list(arguments))[0].revision
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def llm_place(model: str, config: LayAlignConfig, revision: str | None = None) -> tuple[str, str | None]:
    """Where a model's LLM is: a folder or hub name, and its revision there.

    Args:
        model: the model's own folder or hub name.
        config: its settings.
        revision: the model's own on the hub.
    """
    if config.train_llm:
        # vLLM takes a folder or a whole repository, not a part of one.
        patterns = [f"{LLM_FOLDER}/*"]
        own = model if Path(model).is_dir() else snapshot_download(model, revision=revision, allow_patterns=patterns)
        return str(Path(own) / LLM_FOLDER), None
    name, place = written_down("llm", config, model)
    llm = resolve(name)
    if place.get("subfolder"):
        llm = str(Path(llm) / place["subfolder"])
    return llm, place.get("revision")


def encoder_limit(config: LayAlignConfig) -> int | None:
    """The most tokens that a model's encoder reads, told without its weights; None: any number."""
    with torch.device("meta"):
        return position_limit(build_encoder(config.encoder_config))


def longest_question(config: LayAlignConfig, room: int) -> int:
    """The most tokens of a question, each of which is a soft prompt in the LLM's sequence.

    Args:
        config: the model's settings as vLLM has them.
        room: for soft prompts, in tokens.

    Raises:
        ValueError: a setting `longest_question` that is no number of tokens, or more than the encoder reads.
    """
    limit, given = encoder_limit(config), getattr(config, "longest_question", None)
    if given is None:
        return min(room, UNLIMITED if limit is None else limit)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"longest_question: got {given!r}, takes a positive number of tokens")
    if limit is not None and given > limit:
        raise ValueError(f"longest_question: got {given}, this model's encoder reads at most {limit} tokens")
    return min(room, given)


def checked_reading(given: Mapping[str, Any]) -> dict[str, Any]:
    """What mm_processor_kwargs say of how a question is read, as arguments of LayAlignProcessor.

    Raises:
        ValueError: others than READING, or values of another kind.
    """
    if unknown := sorted(given.keys() - READING.keys()):
        raise ValueError(f"mm_processor_kwargs: takes {', '.join(READING)}, got {', '.join(unknown)}")
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if type(value) is not READING[name]:
            raise ValueError(f"mm_processor_kwargs: {name}: got {value!r}, takes {READING[name].__name__}")
    return said
