"""What a table would take, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from layalign.evaluation.output import check_output
from layalign.folders import damage
from layalign.kernels.files import write_json, write_text
from layalign.train.plan.plan import make_plan
from layalign.train.tables.runs import MARKER, Sources, Training, entries
from layalign.train.tables.table import Table


def trainings(table: Table, sources: Sources, rows: Iterable[str] | None = None) -> list[Training]:
    """The runs that a table's figures take, in the order in which they are made, each once. Raises ValueError as `entries`."""
    found: dict[str, Training] = {}
    wanted = None if rows is None else list(rows)
    for entry in chain.from_iterable(entries(table, own, wanted) for own in sources.of_seeds()):
        if entry.training is not None and entry.part.is_asked:
            found |= {training.key: training for training in entry.training.left()}
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
