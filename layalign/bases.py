"""Where the frozen bases come from: hub names, folders, and the tiny bases shipped with the package."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTextEncoding, PreTrainedModel

PREFIX = "layalign:"
SHIPPED = Path(__file__).parent / "bases"


def resolve(name):
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


def load_encoder(source, dtype=None):
    """The multilingual encoder as a module whose forward takes (input_ids, attention_mask): of an encoder-decoder, its encoder half."""
    if isinstance(source, torch.nn.Module):
        module = source
    else:
        path = resolve(source)
        config = _read_config(path, "encoder")
        known = type(config) in AutoModelForTextEncoding._model_mapping
        auto = AutoModelForTextEncoding if known else AutoModel
        module = _load(auto, path, "encoder", dtype)
    return encoder_half(module)


def encoder_half(module):
    """Of T5, mT5, NLLB and the like only the encoder stack is needed; BERT-like and decoder-only models are used whole."""
    if not isinstance(module, PreTrainedModel):
        raise ValueError(f"encoder must be a name, a folder or a transformers model, got {type(module).__name__}")
    stack = getattr(module, "encoder", None)
    two_halves = module.config.is_encoder_decoder or type(module).__name__.endswith("EncoderModel")
    if two_halves and stack is None:
        stack = module.get_encoder()
    return stack if two_halves and isinstance(stack, PreTrainedModel) else module


def encoder_limit(encoder):
    """The most tokens the encoder reads, where it looks positions up in a learned table (BERT, XLM-R, BART, GPT-2); None: any number."""
    for name, module in encoder.named_modules():
        name = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name == "wpe"):
            # RoBERTa and its like count positions from the one behind their padding's.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return encoder.config.max_position_embeddings - unused
    return None


def load_llm(source, dtype=None):
    """The LLM, with its language-model head."""
    if not isinstance(source, torch.nn.Module):
        path = resolve(source)
        _read_config(path, "llm")
        return _load(AutoModelForCausalLM, path, "llm", dtype)
    if not isinstance(source, PreTrainedModel) or source.get_output_embeddings() is None:
        raise ValueError(f"llm must be a transformers causal language model with its head, got {type(source).__name__}")
    return source


def build_encoder(config):
    """An encoder with fresh random weights."""
    auto = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
    return encoder_half(auto.from_config(config))


def _load(auto, path, role, dtype):
    """transformers fills weights that a checkpoint lacks with random numbers and only logs it.

    Raises:
        ValueError: weights that are missing, other than those of a pooler, which LayAlign does not use.
    """
    module, found = auto.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{role} {path!r} does not hold all weights of a {type(module).__name__}: missing {listed}")
    return module


def _read_config(path, role):
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{role} {path!r} is neither a folder with a transformers config.json nor a model that can be fetched: {error}"
        ) from error
