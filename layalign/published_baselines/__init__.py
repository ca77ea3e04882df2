"""Checkpoints of MindMerger and LangBridge, in the layouts that their authors publish, as settings of LayAlign's model.

MindMerger (github.com/CONE-MT/MindMerger) saves the mapping alone, a pickle {"model_state_dict": ...}; both bases are those it was
trained on. The LLM reads [bos][mapped][boundary][prompt], as LayAlign's does.

LangBridge (github.com/kaistAI/LangBridge) saves a folder of transformers' with everything: encoder (of which training changes at
least the embeddings), LLM and alignment. The encoder reads the whole prompt, the LLM [bos][aligned][end of encoding] and what it
writes itself. Rows of one length, and one row alone, which is how its authors evaluate, come out as from their code. Where rows of a
batch are padded, theirs depend on it: positions count the padding, and masks of generation are shifted by one; ours do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from layalign.arguments import NO_CODE
from layalign.base_models import reference
from layalign.loading import encoder_class, load_checked, load_llm, load_tokenizer, resolve
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.published import read_tensors
from layalign.published_baselines.langbridge import ADDED_TOKENS, WEIGHTS, LangBridge, renamed
from layalign.saving import Weights, load_trained_part

MINDMERGER, LANGBRIDGE = "mindmerger", "langbridge"
KINDS = (MINDMERGER, LANGBRIDGE)
MAPPING = {"mlp.linear1.": "adapter.linear1.", "mlp.linear2.": "adapter.linear2.", "end_boundary": "adapter.boundary"}


def load_published(
    kind: str,
    checkpoint: str | Path,
    encoder: str | None = None,
    llm: str | None = None,
    *,
    bases: str | Path | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> LayAlignForConditionalGeneration:
    """A published checkpoint of a baseline, as a model in evaluation mode.

    Args:
        kind: "mindmerger" or "langbridge".
        checkpoint: MindMerger's pytorch_model.bin or the folder that holds it; LangBridge's folder. Only tensors are read.
        encoder, llm: folder, hub name or `layalign:NAME` of its bases; LangBridge's folder names them too.
        bases: an empty or new folder, in which bases that LangBridge's training changed are written, so that the saved model finds
            them. None: the model works, and a saved copy of it asks for them.
        dtype: of the bases; None: as stored. What is trained is read as stored.
        settings: of LayAlignConfig.

    Raises:
        ValueError: another kind, no such checkpoint or one that is damaged or unsafe, or bases that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes {' or '.join(map(repr, KINDS))}")
    if kind == MINDMERGER:
        if encoder is None or llm is None:
            raise ValueError("encoder and llm: MindMerger's checkpoint holds the mapping alone, give both bases")
        path = Path(checkpoint)
        file = path / WEIGHTS[1] if path.is_dir() else path
        trained = renamed(read_tensors(file, "model_state_dict"), MAPPING, str(file))
        modules = {"encoder": _load_encoder(encoder, dtype), "llm": load_llm(llm, dtype)}
        return _joined(modules, {"encoder": encoder, "llm": llm}, trained, str(file), adapter="mlp", **settings)
    found = LangBridge.read(checkpoint)
    places = {"encoder": encoder or found.encoder, "llm": llm or found.llm}
    modules = {"encoder": _load_encoder(places["encoder"], dtype), "llm": load_llm(places["llm"], dtype)}
    known: dict[str, str | None] = {**places}
    for role, module in modules.items():
        if found.put_into(role, module):
            known[role] = None if bases is None else _written(module, Path(bases) / role)
    settings = {"adapter": found.adapter, "llm_input": {"translation": False, "task": False}, **settings}
    return _joined(modules, known, found.trained(), found.path, **settings)


def published_processor(
    kind: str,
    checkpoint: str | Path,
    encoder: str | None = None,
    llm: str | None = None,
    *,
    encoder_tokenizer: str | None = None,
    prompt: str | None = None,
) -> LayAlignProcessor:
    """The processor of a published checkpoint.

    Args:
        kind, checkpoint, encoder, llm: as for `load_published`.
        encoder_tokenizer: where the encoder's tokenizer is; None: the encoder's, for LangBridge with the tokens that its training
            adds.
        prompt: a template with {text} that the LLM reads (MindMerger) or the encoder (LangBridge).

    Raises:
        ValueError: as `load_published`, or no tokenizer where one is looked for.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes {' or '.join(map(repr, KINDS))}")
    if kind == LANGBRIDGE:
        settings = LangBridge.settings(checkpoint)
        encoder = encoder or settings["enc"]
        llm = str(checkpoint) if (Path(checkpoint) / "tokenizer_config.json").is_file() else llm or settings["lm"]
    for_encoder = load_tokenizer("encoder_tokenizer", encoder_tokenizer or encoder)
    if kind == MINDMERGER:
        return LayAlignProcessor(load_tokenizer("llm", llm), for_encoder, prompt_template=prompt)
    if encoder_tokenizer is None:
        for_encoder.add_tokens(ADDED_TOKENS, special_tokens=True)
    return LayAlignProcessor(load_tokenizer("llm", llm), for_encoder, encoder_template=prompt)


def _load_encoder(name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The whole encoder model, which saves as it was loaded, where LayAlign uses a part of it."""
    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, **NO_CODE)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoder {name!r} is neither a model's folder nor one that can be fetched: {error}"
        ) from error
    return load_checked(encoder_class(config), path, "encoder", dtype)


def _joined(
    modules: dict[str, PreTrainedModel],
    places: Mapping[str, str | None],
    trained: Weights,
    origin: str,
    **settings: Any,
) -> LayAlignForConditionalGeneration:
    """A model of both bases and their trained part; places: where a saved copy of it finds them."""
    model = LayAlignForConditionalGeneration.from_bases(**modules, **{"aligner": None, **settings})
    load_trained_part(model, trained, origin)
    for role, place in places.items():
        setattr(model.config, f"{role}_name_or_path", place and reference(place, modules[role]))
    return model.eval()


def _written(module: PreTrainedModel, folder: Path) -> str:
    """Save a base; its folder."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"bases: {folder} is not empty")
    module.save_pretrained(folder)
    return str(folder)
