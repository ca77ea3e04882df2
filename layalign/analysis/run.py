"""`layalign analyze`: measure saved models on parallel texts and write figures."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from layalign.analysis import measures
from layalign.analysis.states import joined_states, llm_states
from layalign.analysis.texts import parallel_texts
from layalign.analysis.tokens import TokenPair, token_map
from layalign.analysis.write import RESULTS, write_analysis
from layalign.arguments import Arguments
from layalign.configuration import SETTINGS, encoder_depth
from layalign.evaluation.output import check_output
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.parts import part_of
from layalign.saving import read_settings
from layalign.systems import LLM, LayAlignModel, PublishedBaseline, System, system_at
from layalign.systems.labels import labels
from layalign.versions import CORE, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layalign.model import LayAlignForConditionalGeneration
    from layalign.processor import LayAlignProcessor

# {lang: N texts}, row i of one meaning in all of them, English among them.
Parallel = Mapping[str, Sequence[str]]
# What is analysed: what `systems.system_at` takes, or a system of its own settings.
Analysed = LayAlignModel | LLM | PublishedBaseline
Model = str | PathLike | System
DEFAULT_PAIR = TokenPair()
_BARE = "{text}"
# The place of an LLM that is read alone, and the template that it reads texts in, if any.
_Alone = tuple[str, str | None]


class _Asked(NamedTuple):
    parallel: Parallel
    texts: list[str]  # the two whose tokens are compared
    languages: list[str | None]
    layers: Sequence[int] | None
    progress: bool


def analyze(
    models: Model | Sequence[Model] | Mapping[str, Model],
    task: str = "mgsm",
    *,
    data: str | PathLike | None = None,
    texts: str | PathLike | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = 100,
    output: str | PathLike | None = None,
    pair: TokenPair = DEFAULT_PAIR,
    settings: GenerationSettings = DEFAULT_SETTINGS,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how alike models see the same text in different languages, and write a folder: analysis.json, report.html, table.md, and
    each of the paper's analyses (section 5.4, appendix A) as a figure (PNG, SVG) with its data (CSV).

    Args:
        models: one or several, side by side: LayAlign models, LLMs alone and published baselines, by folder or hub name or as
            `layalign.systems` of their own settings; {what it is called: model} where their own names do not tell. The LLM of each is
            read alone, too.
        task, data: parallel questions, as in `tasks.load_task`.
        texts: a folder with one UTF-8 file a language instead, such as sw.txt, whose lines are translations of each
            other (FLORES).
        languages: codes, English among them; None for all.
        limit: texts a language, from the start; None for all.
        output: the folder; runs/analyze/<models' names> by default.
        pair: the two texts whose tokens are compared.
        settings: how models given by name are run; all but `max_new_tokens`.
        progress: show bars, then the tables.

    Returns:
        What analysis.json holds: texts (N), languages, data, pair {"texts", "languages"}, versions, and systems {name: what it is (kind,
        place, encoder, llm, trained {part: parameters}, settings, run), and what was measured}: english {"encoder", "llm": {lang:
        {"same", "other", "found"}}} (see `measures.against_english`; the encoder's last state), components {"llm": {"share": (2,),
        "points": {lang: (N, 2)}}}; with an encoder encoder_layers {"english": {lang: {...: [a number a state]}}, "similarity": (E, E)}
        and tokens (see `tokens.token_map`); with an aligner ratio {lang: [a number a fused layer]}, fused_layers, mix {"keys", "values":
        (L, E)}, mixed_states and gates (L, 1 or Hq); and without {figure: why it has none}. Of a single model with an encoder, its
        measures also stand at the top, those of its LLM alone as english and components {"llm_alone"}.

    Raises:
        ValueError: anything missing or malformed.
    """
    systems = _systems(models, settings)
    folder = Path(output) if output else Path("runs") / "analyze" / _joined_name(systems)
    check_output(folder, "analysis", RESULTS)
    parallel = parallel_texts(task, data, texts, languages, limit)
    asked = _Asked(parallel, *pair.among(parallel), pair.layers, progress)
    for label, system in systems.items():
        system.check(parallel)
        if isinstance(system, LayAlignModel):
            config = read_settings(system.model, None, Arguments())
            if config.encoder_config is not None:
                pair.check_depth(encoder_depth(config.encoder_config), label)
    found: dict[str, dict[str, Any]] = {}
    llms: dict[str, _Alone] = {}
    alone: dict[_Alone, tuple[str, dict[str, Any]]] = {}
    for label, system in systems.items():
        if progress and len(systems) > 1:
            print(f"{label}:")
        record, llms[label] = _analyzed(label, system, asked, alone)
        if record is not None:
            found[label] = record
        gc.collect()  # the next one needs the room
    names = labels([name for name, _ in alone.values()], [place for place, _ in alone])
    if len(alone) == 1 and found:
        names = ["LLM alone"]
    names = [f"{name} (the LLM)" if name in found else name for name in names]
    systems_found = found | dict(zip(names, (record for _, record in alone.values()), strict=True))
    results = {
        "texts": len(parallel["en"]),
        "languages": list(parallel),
        "data": {"texts": str(texts)} if texts else {"task": task, "data": None if data is None else str(data)},
        "pair": {"texts": asked.texts, "languages": asked.languages},
        "systems": systems_found,
        "versions": versions((*CORE, "matplotlib")),
    }
    if len(found) == 1:
        ((label, record),) = found.items()
        results |= _of_one(record, alone[llms[label]][1])
    write_analysis(results, folder, show=progress)
    return results


def _systems(
    models: Model | Sequence[Model] | Mapping[str, Model], settings: GenerationSettings
) -> dict[str, Analysed]:
    """{label: system}."""
    named = list(models) if isinstance(models, Mapping) else None
    several = models.values() if isinstance(models, Mapping) else models
    given = [several] if isinstance(several, (str, PathLike, System)) else list(several)
    if not given:
        raise ValueError("models: got none, takes at least one")
    if settings is not DEFAULT_SETTINGS and any(isinstance(one, System) for one in given):
        raise ValueError("settings: a system has its own; give them to it")
    systems: list[Any] = [one if isinstance(one, System) else system_at(str(one), settings) for one in given]
    for system in systems:
        if not isinstance(system, (LayAlignModel, LLM, PublishedBaseline)):
            raise ValueError(
                f"models: got {system.name}, a {type(system).__name__}; takes LayAlign models, LLMs and published baselines"
            )
    names = named or labels([one.name for one in systems], [_place(one) for one in systems])
    return dict(zip(names, systems, strict=True))


def _place(system: Analysed) -> str:
    if isinstance(system, LayAlignModel):
        return system.model
    return system.llm if isinstance(system, LLM) else system.checkpoint


def _joined_name(systems: Mapping[str, Analysed]) -> str:
    return re.sub(r"[^\w.-]+", "-", "+".join(systems).replace("+", "-and-"))[:100]


def _analyzed(
    label: str, given: Analysed, asked: _Asked, alone: dict[_Alone, tuple[str, dict[str, Any]]]
) -> tuple[dict[str, Any] | None, _Alone]:
    """What is measured of a system, None where it is an LLM alone, and how its LLM is read alone, which goes to `alone` unless it is
    there.

    Args:
        label: its name.
        given: the system.
        asked: of it.
        alone: {(place, template): (name, what was measured)} of the LLMs so far.
    """
    system = replace(given)  # what it loads goes with it
    settings, parallel = system.settings, asked.parallel
    answerer: Any = system.load() if isinstance(system, LLM) else system.load(settings.prompt)
    model = answerer.model
    run = {key: value for key, value in asdict(settings).items() if key != "max_new_tokens"}
    reading: dict[str, Any] = {"batch_size": settings.batch_size, "progress": asked.progress}
    for lang, rows in parallel.items():
        answerer.check(rows, partial(_named, lang), [lang] * len(rows))
    record = None
    llm, name, place = model, f"{label} alone", _place(system)
    if not isinstance(system, LLM):
        llm, config = model.llm, model.config
        if model.encoder is not None:
            langs, longest = asked.languages, settings.encoder_max_length
            answerer.check(asked.texts, "pair, text {}".format, None if None in langs else langs)
            record = _described(system, model) | {"run": run}
            record["tokens"] = token_map(model, answerer.processor, asked.texts, langs, asked.layers, longest)
            of_both = {"encoder_max_length": longest, "prompt": answerer.prompt}
            found = measured(model, answerer.processor, parallel, **reading, **of_both)
            record |= {key: value for key, value in found.items() if key not in ("texts", "languages")}
            record["without"] = _without(model)
        # Of a published LLM that its authors changed, no place is written down.
        base = (isinstance(system, LayAlignModel) and system.llm) or config.llm_name_or_path
        changed = config.train_llm or config.lora or (config.quantization or {}).get("llm")
        if changed or base is None or model.encoder is None:
            name = f"LLM of {label}"  # not the base as others have it
        else:
            name, place = f"{Path(base).name} alone", base
    place = os.path.realpath(place) if Path(place).exists() else place
    # Words of a template bring all texts nearer to each other: an LLM is beside a model what it is behind the same.
    template = None if record is None or answerer.prompt == _BARE else answerer.prompt
    if template is not None:
        name += f", {label}'s prompt"
    if (place, template) not in alone:
        no_encoder = dict.fromkeys(("encoder_layers", "encoder_english", "tokens"), "no encoder")
        without = no_encoder | dict.fromkeys(("ratio", "aligner", "gates"), "no aligner")
        found = measured_alone(llm, answerer.tokenizer, parallel, template=template, **reading)
        described = {"kind": "LLM alone", "place": place, "llm": place, "run": run | {"prompt": template}}
        alone[place, template] = name, described | found | {"without": without}
    return record, (place, template)


def _described(system: LayAlignModel | PublishedBaseline, model: LayAlignForConditionalGeneration) -> dict[str, Any]:
    """What a system is."""
    config = model.config
    trained: dict[str, int] = {}
    for name, parameter in model.trained_parameters():
        part = part_of(name) or name
        trained[part] = trained.get(part, 0) + parameter.numel()
    return {
        "kind": "LayAlign" if isinstance(system, LayAlignModel) else system.kind,
        "place": _place(system),
        "encoder": config.encoder_name_or_path,
        "llm": config.llm_name_or_path,
        "trained": trained,
        "settings": {name: getattr(config, name) for name in SETTINGS},
    }


def _without(model: LayAlignForConditionalGeneration) -> dict[str, str]:
    """{figure: why a model has none}."""
    if model.aligner is None:
        return dict.fromkeys(("ratio", "aligner", "gates"), "no aligner")
    if model.config.gate is None:
        return {"gates": "no gates (gate: none)"}
    if model.config.gate == "dynamic":
        return {"gates": "other gates for each input (gate: dynamic)"}
    return {}


def _of_one(record: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
    """A single model's measures as they stand at the top."""
    names = ("english", "encoder_layers", "components", "ratio", "fused_layers", "mix", "mixed_states", "gates")
    found = {name: record[name] for name in names if name in record}
    return found | {name: record[name] | {"llm_alone": alone[name]["llm"]} for name in ("english", "components")}


def _named(lang: str, place: int) -> str:
    return f"{lang}, text {place + 1}"


def measured(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    parallel: Parallel,
    *,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The measures of `analyze` of a model, without those of the LLM alone; settings: of `joined_states`."""
    states = {
        lang: joined_states(model, processor, rows, lang=lang, progress=lang if progress else None, **settings)
        for lang, rows in parallel.items()
    }
    encoder = {lang: found.encoder for lang, found in states.items()}
    llm = {lang: found.llm for lang, found in states.items()}
    last = {lang: rows[-1] for lang, rows in encoder.items()}
    results = {
        "texts": len(llm["en"]),
        "languages": list(states),
        "english": {"encoder": measures.against_english(last), "llm": measures.against_english(llm)},
        "encoder_layers": {
            "english": measures.by_layer(encoder),
            "similarity": measures.layer_similarity(encoder).tolist(),
        },
        "components": {"llm": measures.components(llm)},
    }
    if model.aligner is None:
        return results
    mix = model.aligner.mix.weight.detach().float().cpu()
    return results | {
        "ratio": {lang: found.ratio.mean(1).tolist() for lang, found in states.items() if found.ratio is not None},
        "fused_layers": list(model.config.fused_layers),
        "mix": {"keys": mix[0::2].tolist(), "values": mix[1::2].tolist()},
        "mixed_states": ["mean"] if model.aligner.average else list(model.config.mixed_states),
        "gates": None if model.config.gate in (None, "dynamic") else model.gates().tolist(),
    }


def measured_alone(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parallel: Parallel,
    *,
    progress: bool = False,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """{"english", "components"} of a causal LLM that reads the texts itself, under the name "llm"; settings: of `llm_states`."""
    states = {
        lang: llm_states(
            llm, tokenizer, rows, lang=lang, progress=f"{lang}, LLM alone" if progress else None, **settings
        )
        for lang, rows in parallel.items()
    }
    return {"english": {"llm": measures.against_english(states)}, "components": {"llm": measures.components(states)}}
