"""A table measured: what is missing is trained, everything asked, and the figures put beside the published ones."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from layalign.evaluation.output import check_output
from layalign.evaluation.report import summarize
from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.folders import damage
from layalign.kernels.files import MANIFEST, write_json, write_text
from layalign.saving import LLM_FOLDER
from layalign.systems import LLM, LayAlignModel, System, TranslateFirst
from layalign.tasks import find_task
from layalign.train.plan.cost import sizes_of
from layalign.train.plan.plan import empty_model, make_plan
from layalign.train.recipe import Recipe
from layalign.train.stages import train
from layalign.train.tables.figure import TRAINED, trained_millions, write_figure
from layalign.train.tables.runs import Entry, Sources, Training, entries, no_callbacks
from layalign.train.tables.seeds import over_seeds
from layalign.train.tables.table import COUNTED, WORDS, Table
from layalign.train.tables.text import table_text

MARKER = "tables.json"
SCORER = "official"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rows are asked.

    Attributes:
        data: folder with the tasks' files; None: the usual names on the hub.
        tasks: {a task's name: a file of problems that takes its place}.
        languages, limit: as an evaluation takes them.
        settings: of all systems; the prompt is each row's own.
    """

    data: str | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    languages: Sequence[str] | None = None
    limit: int | None = None
    settings: GenerationSettings = DEFAULT_SETTINGS


def make_table(
    table: Table,
    sources: Sources,
    asking: Asking | None = None,
    rows: Iterable[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and ask what is not there yet, and write table_NN.json and table_NN.md in the output folder, and the rows' accuracy against
    their trained parameters as a figure (table_NN.png, .svg, its points as .csv), where a row has both.

    Called again, also after it was killed, it goes on, and repeats nothing that is whole; rows that several tables share are made once.

    Args:
        table: which.
        sources: what its rows are made over, and where.
        asking: how they are asked.
        rows: names of rows; None: all. The others are shown as published, or as they were measured here before under the same settings.
        progress: show what is done.

    Returns:
        the content of table_NN.json: {"table", "title", "scorer", "parts": [{"name", "columns", "rows": [{"name", "published",
        "measured" (None: not), "why" (it is not), "folder", "trained_millions", ...}]}]}; over seeds as `over_seeds` has it.

    Raises:
        ValueError: a recipe, data or bases that are missing or wrong, or several processes.
    """
    asking = asking or Asking()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "layalign table is one process; --write-recipes writes its trainings, which `torchrun ... -m layalign train FILE` runs in "
            "several, and the same command then goes on with them"
        )
    wanted = None if rows is None else list(rows)
    lines = {
        (part.name, row.name): {"name": row.name, "published": row.published[part.name]}
        | {"as_is": row.is_the_recipe, "measured": None, "why": "not asked for"}
        for part in table.parts
        for row in table.rows
        if part.name in row.published
    }
    asked = {(entry.part.name, entry.row.name) for entry in entries(table, sources, wanted)}
    of_seeds = [(own, list(entries(table, own))) for own in sources.of_seeds()]
    check_output(sources.output, "tables of the paper", MARKER)
    sources.output.mkdir(parents=True, exist_ok=True)
    write_json(sources.output / MARKER, {"holds": "tables of the paper"})
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {name: {} for name in lines}
    left = []
    for own, of_seed in of_seeds:  # first what takes nothing, so that a table that is written early lacks none of it
        for entry in of_seed:
            name = (entry.part.name, entry.row.name)
            if entry.missing is None and _is_at_hand(entry, own, asking):
                found[name][own.seed_of(entry)] = measure(entry, own, asking, progress=False)
            elif name in asked and entry.missing is not None:
                lines[name]["why"] = entry.missing
            elif name in asked:
                left.append((own, entry, name))
    for own, _ in of_seeds:
        for entry, name in [(entry, name) for source, entry, name in left if source is own]:
            if own.seed_of(entry) in found[name]:  # what is not trained has no seed
                continue
            if progress:
                print(f"table {table.number}: {entry.name}{own.said_seed}", flush=True)
            found[name][own.seed_of(entry)] = measure(entry, own, asking, progress)
        result = written(table, sources, {name: line | _measured(found[name], sources) for name, line in lines.items()})
        if progress and (own is of_seeds[-1][0] or any(source is own for source, *_ in left)):
            print(table_text(result))
    drawn = sources.output / f"table_{table.number:02}.png"
    if progress and drawn.exists():
        print(f"accuracy against trained parameters: {drawn}")
    return result


def _measured(found: Mapping[str, dict[str, Any]], sources: Sources) -> dict[str, Any]:
    """What a line says of {seed, or "" of what has none: figures}, in the order of the seeds that were asked for."""
    if not found or "" in found:
        return found.get("", {})
    return over_seeds({seed: found[seed] for seed in map(str, sources.seeds) if seed in found})


def written(table: Table, sources: Sources, lines: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """Write the files of lines by part and row -> the content of table_NN.json."""
    parts = [
        {"name": part.name, "task": part.task, "columns": part.columns}
        | {"rows": [line for (name, _), line in lines.items() if name == part.name]}
        for part in table.parts
    ]
    result = {"table": table.number, "title": table.title, "section": table.section, "scorer": SCORER, "parts": parts}
    write_table(result, sources.output)
    return result


def write_table(result: Mapping[str, Any], folder: Path) -> None:
    """Write table_NN.json, table_NN.md and the figure of a table into a folder. result: of `make_table`."""
    stem = folder / f"table_{result['table']:02}"
    write_json(stem.with_suffix(".json"), result, indent=1)
    write_text(stem.with_suffix(".md"), table_text(result))
    write_figure(result, stem)


def measure(entry: Entry, sources: Sources, asking: Asking, progress: bool = True) -> dict[str, Any]:
    """A row's own figures: {"measured": one a column, "folder" of its training, "trained_millions" and "evaluation", "questions" a
    language}.

    Raises:
        ValueError: as `make_table`.
    """
    columns, line = entry.part.columns, dict[str, Any]()
    figures: dict[str, Any] = {}
    if any(column in WORDS for column in columns):
        figures |= described(entry)
    if any(column in COUNTED for column in columns):
        sizes = sizes_of(empty_model(entry.recipe))
        counts = {name.removesuffix("_millions"): getattr(sizes, name.removesuffix("_millions")) for name in COUNTED}
        figures |= {f"{name}_millions": count / 1e6 for name, count in counts.items()}
    if any(column not in figures for column in columns):
        if entry.training is not None:
            for training in entry.training.in_order():
                make(training, sources.callbacks)
            line["folder"] = str(entry.training.folder)
        line[TRAINED] = 0.0 if entry.training is None else trained_millions(entry.training.folder / "model")
        scores, line["evaluation"], line["questions"] = ask(entry, sources, asking, progress)
        figures |= scores
    return {"measured": [figures.get(column) for column in columns], "why": None, **line}


def make(training: Training, callbacks: Callable[[Recipe], Sequence[TrainerCallback]] = no_callbacks) -> None:
    """Train, unless it is done; `callbacks` as of `Sources`. Raises ValueError as `train`."""
    if _is_trained(training):
        return
    train(training.recipe, callbacks(training.recipe))
    gc.collect()  # the next one's bases need the room


def _is_trained(training: Training) -> bool:
    return damage(training.folder / "model", lambda name: not name.startswith(f"{LLM_FOLDER}/")) is None


def ask(entry: Entry, sources: Sources, asking: Asking, progress: bool) -> tuple[dict[str, Any], str, dict[str, int]]:
    """Scores of a row by averages and languages, the folder of its evaluation, and how many questions there were in each language."""
    system = system_of(entry, asking.settings)
    task, folder = _evaluation(entry, sources, asking)
    results = evaluate(
        system,
        [task],
        data=asking.data if task == entry.part.task else None,
        languages=asking.languages,
        limit=asking.limit,
        output=folder,
        progress=progress,
    )
    (found,) = results["tasks"].values()
    scores = found["accuracy"][SCORER]
    return {**summarize(scores, find_task(entry.part.task).groups), **scores}, str(folder), found["counts"]


def _evaluation(entry: Entry, sources: Sources, asking: Asking) -> tuple[str, Path]:
    """What a row is asked, and the folder of that: of another training, other problems or other settings, another one."""
    task = asking.tasks.get(entry.part.task, entry.part.task)
    counts = {
        "system": fingerprint_of(entry),
        "task": task,
        "languages": asking.languages,
        "limit": asking.limit,
        "prompt": entry.prompt,
        "max_new_tokens": asking.settings.max_new_tokens,
        "encoder_max_length": asking.settings.encoder_max_length,
        "dtype": asking.settings.dtype,
    }
    known = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:12]
    return task, sources.output / "evaluations" / f"{entry.part.task}-{known}"


def _is_at_hand(entry: Entry, sources: Sources, asking: Asking) -> bool:
    """Whether a row has been trained and asked, so that its figures take nothing."""
    if entry.training is not None and not _is_trained(entry.training):
        return False
    return (_evaluation(entry, sources, asking)[1] / "results.json").exists()


def fingerprint_of(entry: Entry) -> str:
    """What tells a row's system from others: of a trained one its run and what that wrote, of others their names."""
    if entry.training is not None:
        written = (entry.training.folder / "model" / MANIFEST).read_bytes()  # of a model that was made again, others
        return f"{entry.training.key} {hashlib.sha256(written).hexdigest()}"
    return " + ".join(name for name in (entry.translator, entry.llm) if name)


def system_of(entry: Entry, settings: GenerationSettings) -> System:
    """Who is asked in a row."""
    settings = replace(settings, prompt=entry.prompt)
    if entry.training is not None:
        model = entry.training.folder / "model"
        if entry.recipe.encoder is None:
            return LLM(llm=str(model / LLM_FOLDER), settings=settings)
        return LayAlignModel(model=str(model), settings=settings)
    if entry.translator is not None:
        return TranslateFirst(translator=entry.translator, llm=str(entry.llm), settings=settings)
    return LLM(llm=str(entry.llm), settings=settings)


def described(entry: Entry) -> dict[str, str]:
    """What a row is made of, as WORDS has it."""
    recipe = entry.recipe
    encoder = entry.translator if entry.row.system != "trained" else recipe.encoder
    llm = recipe.llm if entry.llm is None else entry.llm
    sources = [source for stage in recipe.stages.values() for source in stage.data]
    data = "+".join(dict.fromkeys(source.path or "records" for source in sources))
    return {
        "backbone": "+".join(Path(name).name for name in (encoder, llm) if name),
        "training_data": "none" if entry.training is None else data,
        "source": "as it is" if entry.training is None else f"trained ({entry.training.key})",
    }


def trainings(table: Table, sources: Sources, rows: Iterable[str] | None = None) -> list[Training]:
    """The runs that a table's figures take, in the order in which they are made, each once. Raises ValueError as `entries`."""
    found: dict[str, Training] = {}
    wanted = None if rows is None else list(rows)
    for entry in chain.from_iterable(entries(table, own, wanted) for own in sources.of_seeds()):
        if entry.training is not None and entry.part.is_asked:
            found |= {training.key: training for training in entry.training.in_order()}
    return list(found.values())


def plan_table(table: Table, sources: Sources, rows: Iterable[str] | None = None) -> dict[str, Any]:
    """What `make_table` would train, and what that takes: nothing is loaded or written.

    Returns:
        {"table", "trainings": [{"run", "output", "whole", and of what is not whole "plan" (of `make_plan`) or "why" there is none}],
        "seconds": of these, None where a part is not known, "missing": {row: why}}.

    Raises:
        ValueError: as `entries`.
    """
    found: list[dict[str, Any]] = []
    for training in trainings(table, sources, rows):
        line: dict[str, Any] = {"run": training.key, "output": str(training.folder)}
        line["whole"] = damage(training.folder / "model", lambda name: False) is None
        try:
            if not line["whole"]:
                line["plan"] = make_plan(training.recipe)
        except (ValueError, OSError) as error:
            line["why"] = str(error).splitlines()[0]
        found.append(line)
    left = [line.get("plan", {}).get("seconds") for line in found if not line["whole"]]
    unseeded = entries(table, sources, rows)
    missing = {entry.name: entry.missing for entry in unseeded if entry.missing is not None}
    seconds = None if None in left else sum(left)
    return {"table": table.number, "trainings": found, "seconds": seconds, "missing": missing}


def write_recipes(table: Table, sources: Sources, rows: Iterable[str] | None = None) -> list[Path]:
    """Write the recipe of each training, in the order in which they are to run -> the files. Raises ValueError as `entries`."""
    written = []
    check_output(sources.output, "tables of the paper", MARKER)
    folder = sources.output / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(sources.output / MARKER, {"holds": "tables of the paper"})
    for training in trainings(table, sources, rows):
        file = folder / f"{training.key}.yaml"
        write_text(file, yaml.safe_dump(dict(training.values), sort_keys=False, allow_unicode=True))
        written.append(file)
    return written
