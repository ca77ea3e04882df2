"""A table measured: what is missing is trained, everything asked, and the figures put beside the published ones."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from layalign.evaluation.output import check_output
from layalign.kernels.files import InUse, write_json, write_text
from layalign.spelling import first_line
from layalign.train.plan.cost import sizes_of
from layalign.train.plan.plan import empty_model
from layalign.train.recipe import Recipe
from layalign.train.stages import train
from layalign.train.tables.asking import SCORER, Asking, ask, evaluation_of
from layalign.train.tables.figure import TRAINED, trained_millions, write_figure
from layalign.train.tables.runs import MARKER, Entry, Sources, Training, entries, no_callbacks
from layalign.train.tables.seeds import over_seeds
from layalign.train.tables.table import COUNTED, WORDS, Table
from layalign.train.tables.text import table_text

# Seconds, where all that is left is another process's.
LOOKS_AGAIN_AFTER = 20.0


def make_table(
    table: Table,
    sources: Sources,
    asking: Asking | None = None,
    rows: Iterable[str] | None = None,
    progress: bool = True,
    wait: bool = True,
) -> dict[str, Any]:
    """Train and ask what is not there yet, and write table_NN.json and table_NN.md in the output folder, and the rows' accuracy against
    their trained parameters as a figure (table_NN.png, .svg, its points as .csv), where a row has both.

    Called again, also after it was killed, it goes on, and repeats nothing that is whole; rows that several tables share are made once.
    Several calls may work in one folder: what another one is at is left to it, and waited for at the end.

    Args:
        table: which.
        sources: what its rows are made over, and where.
        asking: how they are asked.
        rows: names of rows; None: all. The others, and other seeds, are shown as they were measured here before under the same settings.
        progress: show what is done.
        wait: for rows that other processes are at; else these are left to a later call, as where other tables are still to be made.

    Returns:
        the content of table_NN.json: {"table", "title", "scorer", "settings" (of all rows), "parts": [{"name", "columns", "file" (asked in
        place of the task), "rows": [{"name", "published", "measured" (None: not), "why" (it is not), "folder", "trained_millions",
        ...}]}]}; over seeds as `over_seeds` has it.

    Raises:
        ValueError: a recipe, data, problems or bases that are missing or wrong, or several processes. What one row meets while it is
            made is raised when the others are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "layalign table is one process; --write-recipes writes its trainings, which `torchrun ... -m layalign train FILE` runs in "
            "several, and the same command then goes on with them"
        )
    wanted = None if rows is None else list(rows)
    asked = {_name(entry) for entry in entries(table, sources, wanted)}
    asking = (asking or Asking()).checked(table)
    lines = {
        (part.name, row.name): {"name": row.name, "published": row.published[part.name]}
        | {"reference": row.name == table.reference, "measured": None}
        | {"why": "not made yet" if (part.name, row.name) in asked else "not asked for"}
        for part in table.parts
        for row in table.rows
        if part.name in row.published
    }
    check_output(sources.output, "tables of the paper", MARKER)
    of_seeds = [(own, entry) for own in sources.of_seeds() for entry in entries(table, own)]
    sources.output.mkdir(parents=True, exist_ok=True)
    write_json(sources.output / MARKER, {"holds": "tables of the paper"})
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {name: {} for name in lines}

    def look() -> None:
        """Take in what takes nothing: a table that is written early lacks none of it, nor of what other processes made meanwhile."""
        further = ((own, entry) for own in sources.of_further_seeds() for entry in entries(table, own))
        for own, entry in (*of_seeds, *further):
            known, seed = found[_name(entry)], own.seed_of(entry)
            if seed not in known and entry.missing is None and _is_at_hand(entry, own, asking):
                with suppress(InUse):  # another one reads it too, or is still at it
                    known[seed] = measure(entry, own, asking, progress=False)

    failed: list[str] = []
    left = []
    for own, entry in of_seeds:
        if _name(entry) in asked and entry.missing is None:
            left.append((own, entry))
        elif _name(entry) in asked:
            lines[_name(entry)]["why"] = entry.missing

    def write(figure: bool = False) -> dict[str, Any]:
        look()
        result = _result(table, sources, asking, {name: line | _measured(found[name]) for name, line in lines.items()})
        write_table(result, sources.output, figure)
        return result

    look()
    while left:
        put_off = []
        for own, entry in left:
            known = found[_name(entry)]
            if own.seed_of(entry) in known:  # what is not trained has no seed, and is there after the first one
                continue
            if progress:
                print(f"table {table.number}: {entry.name}{own.said_seed}", flush=True)
            try:
                known[own.seed_of(entry)] = measure(entry, own, asking, progress)
            except InUse as error:
                if progress:
                    print(f"left to another process for now: {error}", flush=True)
                put_off.append((own, entry))
            except (ValueError, torch.OutOfMemoryError) as error:
                # The row's own, most likely: the others are made, and it is said again at the end.
                print(f"table {table.number}: {entry.name}{own.said_seed}: {error}", file=sys.stderr, flush=True)
                lines[_name(entry)]["why"] = f"it could not be made: {first_line(error)}"
                failed.append(str(error))
            else:
                write()
                continue
            gc.collect()  # an error holds what it was raised in, a model among it, until it is gone
        if len(put_off) == len(left):
            if not wait:
                break
            time.sleep(LOOKS_AGAIN_AFTER)
        left = put_off
    result = write(figure=True)
    progress = progress and not left
    if progress:
        print(table_text(result))
    drawn = sources.output / f"table_{table.number:02}.png"
    if progress and drawn.exists():
        print(f"accuracy against trained parameters: {drawn}")
    if failed:
        raise ValueError(failed[0])
    return result


def _name(entry: Entry) -> tuple[str, str]:
    return entry.part.name, entry.row.name


def _measured(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a line says of {seed, or "" of what has none: figures}."""
    if not found or "" in found:
        return found.get("", {})
    return over_seeds({seed: found[seed] for seed in sorted(found, key=int)})


def _result(
    table: Table, sources: Sources, asking: Asking, lines: Mapping[tuple[str, str], Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of table_NN.json, of lines by part and row."""
    files = {task: Path(file).name for task, file in asking.tasks.items()}
    parts = [
        {"name": part.name, "task": part.task, "file": files.get(part.task), "columns": part.columns}
        | {"rows": [line for (name, _), line in lines.items() if name == part.name]}
        for part in table.parts
    ]
    result = {"table": table.number, "title": table.title, "section": table.section, "scorer": SCORER}
    recipes = [Path(sources.recipes[name]).name for name in table.recipes if name in sources.recipes]
    given = {"recipes": recipes, "overrides": [*sources.overrides]}
    result |= {"settings": given | {"limit": asking.limit, "languages": asking.languages}}
    return result | {"parts": parts}


def write_table(result: Mapping[str, Any], folder: Path, figure: bool = True) -> None:
    """Write table_NN.json, table_NN.md and, where asked for, the figure of a table into a folder. result: of `make_table`."""
    stem = folder / f"table_{result['table']:02}"
    write_json(stem.with_suffix(".json"), result, indent=1)
    write_text(stem.with_suffix(".md"), table_text(result))
    if figure:
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
            if not entry.training.is_whole:
                for training in entry.training.in_order():
                    make(training, sources.callbacks)
            line["folder"] = str(entry.training.folder)
        line[TRAINED] = 0.0 if entry.training is None else trained_millions(entry.training.folder / "model")
        scores, line["evaluation"], line["questions"] = ask(entry, sources, asking, progress)
        figures |= scores
    return {"measured": [figures.get(column) for column in columns], "why": None, **line}


def make(training: Training, callbacks: Callable[[Recipe], Sequence[TrainerCallback]] = no_callbacks) -> None:
    """Train, unless it is done; `callbacks` as of `Sources`. Raises ValueError as `train`."""
    if training.is_whole:
        return
    train(training.recipe, callbacks(training.recipe))
    gc.collect()  # the next one's bases need the room


def _is_at_hand(entry: Entry, sources: Sources, asking: Asking) -> bool:
    """Whether a row has been trained and asked, so that its figures take nothing but to read them."""
    if not entry.part.is_asked:  # nor are there problems to ask
        return False
    if entry.training is not None and not entry.training.is_whole:
        return False
    return (evaluation_of(entry, sources, asking)[1] / "results.json").exists()


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
