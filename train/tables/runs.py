"""What a table's rows take: a recipe each, made of another recipe, and the trainings that rows share."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from layalign.configuration import STAGES
from layalign.folders import damage
from layalign.kernels.files import read_json
from layalign.loading import read_config, resolve
from layalign.prompts import DEFAULT_PROMPT, TASK_PROMPT
from layalign.saving import LLM_FOLDER
from layalign.spelling import first_line
from layalign.train.data.stage_data import data_identity
from layalign.train.parts import stage_parts
from layalign.train.recipe import Recipe, load_recipe
from layalign.train.run_folder import digest
from layalign.train.settings import build
from layalign.train.tables.rows import of_the_translation_stage, row_values
from layalign.train.tables.table import Part, Row, Table

MARKER = "tables.json"


def no_callbacks(recipe: Recipe) -> Sequence[TrainerCallback]:
    """None, whatever the recipe."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the rows of tables are made over.

    Attributes:
        output: the folder of all tables.
        recipes: {a shipped recipe's name: what takes its place, a file or another name}.
        overrides: "key=value" for each of these recipes.
        bases: {a base that a row names: where it is}.
        seeds: each row is trained with each of them; none: with its recipe's own.
        callbacks: recipe of a run -> what its training calls besides.

    Raises:
        ValueError: a seed given twice, or one below 0.
    """

    output: Path
    recipes: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    callbacks: Callable[[Recipe], Sequence[TrainerCallback]] = no_callbacks

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds: got {', '.join(map(str, self.seeds))}, takes different numbers from 0 on")

    def of_seeds(self) -> list[Sources]:
        """The same for each seed alone; without seeds, these.

        Raises:
            ValueError: seeds, and one among the overrides.
        """
        if self.seeds and (given := [word for word in self.overrides if word.startswith("seed=")]):
            raise ValueError(f"seeds: got {', '.join(map(str, self.seeds))} and {given[0]}, takes one of them")
        found = [replace(self, seeds=(seed,), overrides=(*self.overrides, f"seed={seed}")) for seed in self.seeds]
        return found or [self]

    @property
    def said_seed(self) -> str:
        """Of one seed, as a line of progress says it."""
        return f", seed {self.seeds[0]}" if self.seeds else ""

    def of_further_seeds(self) -> list[Sources]:
        """The same for each other seed that something in the folder was trained with, where seeds are asked for."""
        if not self.seeds:
            return []
        found = set()
        for file in (self.output / "trained").glob("*/recipe.json"):
            with suppress(OSError, ValueError):
                found.add(read_json(file).get("seed"))
        others = sorted(seed for seed in found - set(self.seeds) if isinstance(seed, int))
        return replace(self, seeds=tuple(others)).of_seeds() if others else []

    def seed_of(self, entry: Entry) -> str:
        """These sources' one seed, of a row whose figures it changes; "" of others."""
        return str(self.seeds[0]) if self.seeds and entry.training is not None and entry.part.is_asked else ""

    def recipe_of(self, row: Row, part: Part) -> str:
        """The file or name of the recipe that a row is settings over."""
        name = row.recipe or part.recipe
        return self.recipes.get(name, name)

    def base(self, name: str) -> str:
        """Where a base is that a row names."""
        return self.bases.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the trainer.

    Attributes:
        values: its recipe as a mapping, which a YAML file can hold.
        after: the run whose trained part it starts from, or None.
        key: what tells it from others: of the stage and the settings that count.
    """

    values: Mapping[str, Any]
    after: Training | None
    key: str

    @cached_property
    def recipe(self) -> Recipe:
        """Its recipe."""
        return build(Recipe, copy.deepcopy(dict(self.values)))

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return Path(self.values["output"])

    @property
    def is_whole(self) -> bool:
        """Whether it has been trained; a base's weights are not looked through."""
        return damage(self.folder / "model", lambda name: not name.startswith(f"{LLM_FOLDER}/")) is None

    def left(self) -> list[Training]:
        """What there is to be made: of a run that is whole that alone, whatever it was made from."""
        return [self] if self.is_whole else self.in_order()

    def in_order(self) -> list[Training]:
        """What is trained for it, one after the other."""
        return [*([] if self.after is None else self.after.in_order()), self]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row in one part of a table.

    Attributes:
        row, part: of the table.
        recipe: that the row is trained by, whole; of a system that is not trained, the recipe that it is compared under.
        training: None: nothing is trained.
        llm, translator: who is asked where nothing is trained.
        prompt: what is read in the evaluation, as an evaluation takes it.
        missing: why it cannot be had here; None: it can.
    """

    row: Row
    part: Part
    recipe: Recipe
    training: Training | None
    llm: str | None
    translator: str | None
    prompt: str
    missing: str | None

    @property
    def name(self) -> str:
        """Row and part."""
        return f"{self.row.name}, {self.part.name}"


def entries(table: Table, sources: Sources, rows: Iterable[str] | None = None) -> Iterator[Entry]:
    """Every row of a table in each of its parts.

    Args:
        table: which.
        sources: what its rows are made over.
        rows: names of the rows wanted; None: all.

    Raises:
        ValueError: a recipe that cannot be read, or an unknown row.
    """
    names = [row.name for row in table.rows]
    if unknown := [name for name in rows or () if name not in names]:
        raise ValueError(
            f"rows: table {table.number} has no {', '.join(map(repr, unknown))}; it has {', '.join(names)}"
        )
    for part in table.parts:
        for row in table.rows:
            if part.name in row.published and (rows is None or row.name in rows):
                yield entry(row, part, sources)


def entry(row: Row, part: Part, sources: Sources) -> Entry:
    """A row in a part of its table. Raises as `entries`."""
    path = sources.recipe_of(row, part)
    plain = load_recipe(path, sources.overrides, check_files=False)
    asked = {"encoder": row.settings.get("encoder"), "llm": row.llm, "translator": row.translator}
    named: dict[str, str] = {role: name for role, name in asked.items() if name is not None}
    places = {role: sources.base(name) for role, name in named.items()}
    missing = next(filter(None, (_missing(role, name, places[role]) for role, name in named.items())), None)
    if missing is None and sources.recipes and (row.recipe or part.recipe) not in sources.recipes:
        missing = _not_here(row.recipe or part.recipe, plain)
    recipe, training = plain, None
    try:
        values = row_values(row, part, sources)
        recipe = build(Recipe, copy.deepcopy(values))
        training = None if row.system != "trained" or missing else training_of(values, sources.output)
    except ValueError as error:
        missing = missing or f"its settings do not fit {path}: {_shortly(error)}"
    return Entry(
        row=row,
        part=part,
        recipe=recipe,
        training=training,
        llm=None if row.system == "trained" else places.get("llm", plain.llm),
        translator=places.get("translator"),
        prompt=_prompt(row, recipe, plain),
        missing=missing,
    )


def training_of(values: Mapping[str, Any], output: Path) -> Training:
    """The runs that a recipe takes: the translation stage is one of its own, which all rows share that do not differ in it.

    Args:
        values: the recipe, as a mapping.
        output: the folder of all tables.

    Raises:
        ValueError: values that are no recipe.
    """
    recipe = build(Recipe, copy.deepcopy(dict(values)))
    if "translation" not in recipe.stages:
        return _training(values, None, output)
    parts = stage_parts(recipe, "translation")
    if {"llm", "encoder"} & set(parts) and "task" in recipe.stages:  # no trained part would carry a base over
        return _training(values, None, output)
    first = of_the_translation_stage(values, recipe) | {
        "stages": {"translation": values["stages"]["translation"]},
        "llm_input": {"translation": recipe.llm_input["translation"]},
    }
    before = _training(first, None, output)
    if "task" not in recipe.stages:
        return before
    second = {**values, "stages": {"task": values["stages"]["task"]}, "init_from": str(before.folder)}
    return _training(second, before, output)


def _training(values: Mapping[str, Any], after: Training | None, output: Path) -> Training:
    """A run in a folder that is called after what counts of it."""
    # The run before counts by its own key, which says what it is, and data by what is in them: neither by its place.
    counts = {**values, "output": "-"} | ({"init_from": None} if after else {})
    recipe = build(Recipe, copy.deepcopy(counts))
    content = []
    for stage in recipe.stages.values():
        content.append([data_identity(sources or (), recipe.data_root) for sources in (stage.data, stage.eval_data)])
        stage.data, stage.eval_data = [], None
    known = json.dumps([digest(recipe), content, None if after is None else after.key], default=str)
    key = "-".join(
        [name for name in STAGES if name in recipe.stages] + [hashlib.sha256(known.encode()).hexdigest()[:12]]
    )
    return Training(values={**values, "output": str(output / "trained" / key)}, after=after, key=key)


def _prompt(row: Row, recipe: Recipe, plain: Recipe) -> str:
    """What is read beside the encoder, or by an LLM alone, where questions are asked."""
    own = plain.stages["task"].prompt if "task" in plain.stages else None
    asked = TASK_PROMPT if own is None else own.replace("{source}", "{text}")
    if row.system != "trained" or recipe.encoder is None:
        return asked
    # Nothing was trained on the task's prompt, and it is asked by the recipe's all the same.
    return asked if "task" not in recipe.stages and recipe.llm_input["task"] else DEFAULT_PROMPT


def _not_here(name: str, recipe: Recipe) -> str | None:
    """Why the paper's own recipe is not to be had here, where others have been given in place of the rest."""
    bases = {role: place for role, place in (("encoder", recipe.encoder), ("llm", recipe.llm)) if place is not None}
    reason = next(filter(None, (_why_not(role, place) for role, place in bases.items())), None)
    try:
        if reason is None:
            recipe.check_files()
    except ValueError as error:
        reason = _shortly(error)
    return (
        None if reason is None else f"the recipe {name} is the paper's: {reason}; --recipe {name}=RECIPE gives another"
    )


def _shortly(error: ValueError) -> str:
    return first_line(error)[:200].rstrip(" :")


def _missing(role: str, name: str, place: str) -> str | None:
    """Why a base that a row names is not to be had here."""
    reason = _why_not(role, place)
    return None if reason is None else f"{reason}; --base {name}=FOLDER says where it is"


@cache
def _why_not(role: str, place: str) -> str | None:
    """Why a base is not to be had; asked once, as without a network the hub is tried for half a minute."""
    try:
        read_config(resolve(place), role)
    except ValueError as error:
        return _shortly(error)
    return None
