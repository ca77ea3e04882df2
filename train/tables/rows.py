"""The recipe of a table's row: another recipe with what the row changes, and without what the row has no place for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layalign.configuration import encoder_depth
from layalign.loading import read_config, resolve
from layalign.tasks import find_task
from layalign.tasks.prompts import TRANSLATION
from layalign.train.parts import stage_parts
from layalign.train.recipe import Recipe, read_recipe
from layalign.train.settings import build

if TYPE_CHECKING:
    from layalign.train.tables.runs import Sources
    from layalign.train.tables.table import Part, Row

THIRDS = ("first third", "middle third", "last third")
# Settings that make a part which was trained under others no beginning.
_OF_THE_MODEL = {"encoder", "llm", "model", "lora", "train_llm", "train_encoder"}


def row_values(row: Row, part: Part, sources: Sources) -> dict[str, Any]:
    """The recipe of a row, unchecked.

    Raises:
        ValueError: a recipe that cannot be read, or that has no place for the row's settings.
    """
    values = merged(read_recipe(sources.recipe_of(row, part), sources.overrides), row.settings)
    if row.settings.get("encoder") is not None:
        values["encoder"] = sources.base(row.settings["encoder"])
    if row.stages is not None:
        if lacking := [name for name in row.stages if name not in values["stages"]]:
            raise ValueError(f"stages: the row is of the {lacking[0]} stage, which the recipe has not")
        if row.stages == ["translation"]:
            values = of_the_translation_stage(values, build(Recipe, copy.deepcopy(values)))
        values["stages"] = {name: values["stages"][name] for name in row.stages}
    _begin(values, row)
    _without_what_the_row_has_not(values, row)
    model = values["model"]
    for key, widening in (("adapter_width", row.adapter_widening), ("aligner_width", row.aligner_widening)):
        if widening is not None:
            model[key] = widening * read_config(resolve(values["encoder"]), "encoder").hidden_size
    if row.states is not None:
        model |= {"encoder_states": "all", "encoder_layers": third(row.states, values["encoder"])}
    reads = {"translation": False, "task": True} | dict(values.get("llm_input") or {})
    published = {"translation": TRANSLATION, "task": find_task(part.task).prompt}
    for name, stage in values["stages"].items():
        if reads.get(name) and stage.get("prompt") is None and (prompt := published[name]):
            values["stages"][name] = {**stage, "prompt": prompt.replace("{text}", "{source}")}
    return values


def of_the_translation_stage(values: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A recipe without the bases and LoRA that its translation stage does not train.

    Args:
        values: the recipe, as a mapping.
        recipe: the same.
    """
    parts = stage_parts(recipe, "translation")
    kept = {
        "lora": ("lora", recipe.lora),
        "llm": ("train_llm", True),
        "encoder": ("train_encoder", recipe.train_encoder),
    }
    others = {key: value for key, value in values.items() if key not in ("lora", "train_llm", "train_encoder")}
    return others | dict(pair for part, pair in kept.items() if part in parts)


def _begin(values: dict[str, Any], row: Row) -> None:
    """What a row begins with: without the translation stage nothing, and a trained part only where it is the row's own kind."""
    if row.stages == ["task"]:
        values.pop("init_from", None)
    changed = _OF_THE_MODEL & row.settings.keys()
    if values.get("init_from") is not None and (changed or row.states or row.adapter_widening or row.aligner_widening):
        raise ValueError("init_from: what the recipe begins with is trained under other settings than this row's")
    if row.settings.get("train_llm"):
        values.pop("lora", None)


def _without_what_the_row_has_not(values: dict[str, Any], row: Row) -> None:
    """Take out of a recipe what it says of parts that a row leaves out, and of states that a row chooses otherwise."""
    chosen = row.settings.get("model", {})
    model = values["model"] = dict(values.get("model") or {})
    gone: list[str] = []
    if "encoder" in row.settings and row.settings["encoder"] is None:
        values.pop("train_encoder", None)
        gone.append("encoder")
    if "adapter" in chosen:
        model.pop("adapter_width", None)
        gone += [] if chosen["adapter"] else ["adapter"]
    if "aligner" in chosen:
        model.pop("aligner_width", None)
        gone += [] if chosen["aligner"] else ["aligner", "gates"]
        for name in () if chosen["aligner"] else ("encoder_layers", "llm_layers", "gate"):
            model.pop(name, None)
    if "encoder_states" in chosen and chosen["encoder_states"] not in ("all", "mean"):
        model.pop("encoder_layers", None)
    for name, stage in values["stages"].items():
        trained = stage.get("train") or []
        left = [part for part in ([trained] if isinstance(trained, str) else trained) if part not in gone]
        rates = {"encoder_learning_rate": None} if "encoder" in gone else {}
        values["stages"][name] = {**stage, "train": left or None, **rates}


def third(which: str, encoder: str) -> list[int]:
    """A third of the states that LayAlign mixes: the embeddings' output and all layers' but the last.

    Args:
        which: of THIRDS.
        encoder: the encoder's folder or name.

    Raises:
        ValueError: an encoder of fewer than three layers.
    """
    depth, place = encoder_depth(read_config(resolve(encoder), "encoder")), THIRDS.index(which)
    if depth < 3:
        raise ValueError(f"states: {encoder} has {depth} layers, of which there is no {which}")
    return list(range(round(depth * place / 3), round(depth * (place + 1) / 3)))


def merged(values: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with others' values in their place."""
    found = dict(values) if isinstance(values, Mapping) else {}
    for key, value in others.items():
        found[key] = merged(found.get(key), value) if isinstance(value, Mapping) else copy.deepcopy(value)
    return found
