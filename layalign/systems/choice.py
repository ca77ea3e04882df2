"""Which system the options of a command mean."""

from __future__ import annotations

import json
from pathlib import Path

from layalign.configuration import LayAlignConfig
from layalign.evaluation.settings import GenerationSettings
from layalign.loading import PREFIX, check_model_path
from layalign.systems.baselines import PublishedBaseline
from layalign.systems.folders import causal_config, check_place
from layalign.systems.layalign_model import LayAlignModel
from layalign.systems.llm import LLM
from layalign.systems.system import System
from layalign.systems.translate_first import TranslateFirst


def chosen_system(
    settings: GenerationSettings,
    *,
    model: str | None = None,
    llm: str | None = None,
    translator: str | None = None,
    examples: str | None = None,
    shots: int | None = None,
    published: str | None = None,
    encoder: str | None = None,
    encoder_tokenizer: str | None = None,
    prefix: str | None = None,
) -> System:
    """A LayAlign model, an LLM alone or after a translator, or a baseline's published checkpoint.

    Args:
        settings: how it is run.
        model: a LayAlign model, or with `published` a baseline's checkpoint.
        llm: an LLM alone, the baseline's, or that of `model` where it has moved.
        translator: an encoder-decoder before the LLM.
        examples, shots: a file of worked examples for the LLM, and how many; one a question where `shots` is left out.
        published: the baseline's kind.
        encoder: its encoder, or that of `model` where it has moved.
        encoder_tokenizer: where that one's tokenizer is, if not with it.
        prefix: what the translator reads before each text.

    Raises:
        ValueError: options that do not go together; a model or an LLM alone that is not there, before anything reads data for it.
    """
    if prefix is not None and translator is None:
        raise ValueError("--prefix goes with --translator")
    given = {"translator": translator, "examples": examples, "shots": shots}
    of_llm = [f"--{name}" for name, value in given.items() if value is not None]
    if published is not None:
        if of_llm:
            raise ValueError(f"{', '.join(of_llm)} goes with --llm alone, not with --published")
        if model is None:
            raise ValueError("--published: give the checkpoint as the model")
        return PublishedBaseline(
            kind=published,
            checkpoint=model,
            encoder=encoder,
            llm=llm,
            encoder_tokenizer=encoder_tokenizer,
            settings=settings,
        )
    if encoder_tokenizer is not None:
        raise ValueError("--encoder-tokenizer goes with --published; a LayAlign model has its own")
    if model is not None:
        if of_llm:
            raise ValueError(f"{', '.join(of_llm)} goes with --llm alone, got the model {model!r}")
        check_model_path(model)
        return LayAlignModel(model=model, encoder=encoder, llm=llm, settings=settings)
    if encoder is not None:
        raise ValueError("--encoder goes with a model or with --published")
    if llm is None:
        raise ValueError("model: got none and no --llm, takes one of them")
    if settings.encoder_max_length is not None:
        raise ValueError("--encoder-max-length goes with a model, whose encoder reads the questions; got --llm alone")
    if shots is not None and examples is None:
        raise ValueError("--shots: give the file of --examples too")
    check_place("llm", llm)
    count = 0 if examples is None else shots or 1
    if translator is None:
        return LLM(llm=str(llm), examples=examples, shots=count, settings=settings)
    return TranslateFirst(
        llm=str(llm),
        examples=examples,
        shots=count,
        translator=translator,
        prefix=prefix or "",
        settings=settings,
    )


def system_at(
    place: str, settings: GenerationSettings, encoder: str | None = None, llm: str | None = None
) -> LayAlignModel | LLM:
    """What is there: a LayAlign model or, of any other kind, an LLM alone.

    Args:
        place: a folder, a hub name or `layalign:NAME`.
        settings: how it is run.
        encoder, llm: the bases of a LayAlign model, where they have moved.

    Raises:
        ValueError: a folder without a model, or a path to nothing.
    """
    if not place.startswith(PREFIX):
        check_model_path(place)
    if _is_llm(place):
        return LLM(llm=place, settings=settings)
    return LayAlignModel(model=place, encoder=encoder, llm=llm, settings=settings)


def _is_llm(place: str) -> bool:
    if not Path(place).is_dir():
        try:
            causal_config("model", place)
        except ValueError:  # LayAlign's, or its own loading says what is wrong
            return False
        return True
    try:
        config = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))
        return config["model_type"] != LayAlignConfig.model_type
    except (OSError, ValueError, KeyError, TypeError):  # likewise
        return False
