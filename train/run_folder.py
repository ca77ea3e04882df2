"""What a run writes down about itself, so that it resumes its own work and never touches another's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING

from layalign.configuration import STAGES
from layalign.kernels.files import write_json

if TYPE_CHECKING:
    from layalign.train.collate import EncodedRecords
    from layalign.train.recipe import Recipe

RECIPE = "recipe.json"
DATA = "data.json"
# These may differ between a run and its continuation: none changes a trained number.
_FREE = {"output", "progress", "report_to", "data_root", "keep_checkpoints"}


def claim(recipe: Recipe) -> None:
    """Take the recipe's output folder for this run, or find that it is already this run's.

    Raises:
        ValueError: the folder belongs to a run of another recipe (the keys that differ are listed) or holds files of
            something else.
    """
    output = Path(recipe.output)
    file = output / RECIPE
    # Through JSON once, so that tuples and paths compare equal to what was read back.
    wanted = json.loads(json.dumps(_identity(recipe)))
    worked = (output / "model").exists() or any(has_work(output / name) for name in STAGES)
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"output: {file} is unreadable ({error}); choose another output folder") from error
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            raise ValueError(f"output: {file} was not written by a training run; choose another output folder")
        if worked:
            _refuse_other(_flat(found), _flat(wanted), output)
            return
    foreign = [name for name in (*STAGES, "model") if (output / name).exists()]
    if foreign and not file.exists():
        raise ValueError(
            f"output: {output} holds {foreign} but no {RECIPE}: it is not a training run; choose another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {output} cannot be made: {error.strerror}") from error
    write_json(file, wanted)


def has_work(folder: Path) -> bool:
    """Whether a stage's folder holds a checkpoint or a result. Before that, a run that failed may begin anew, corrected."""
    return (folder / "final").exists() or any(folder.glob("checkpoint-*"))


def check_data(folder: str | os.PathLike, name: str, records: Sized, skipped: Sized, encoded: EncodedRecords) -> None:
    """Write down what a stage trains on, or compare with what was written down.

    Args:
        folder: the stage's.
        name: the stage.
        records, skipped: what was read, and what was left out.
        encoded: the records, tokenised.

    Raises:
        ValueError: the stage began with other data.
    """
    file = Path(folder) / DATA
    found = {"records": len(records), "skipped": len(skipped), "sha256": encoded.digest()}
    if file.exists() and has_work(file.parent):
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != found:
            raise ValueError(
                f"stages.{name}.data: no longer the data this run began with "
                f"({before['records']} records then, {len(records)} now, "
                "or other texts or tokenizers); restore it, or choose another output folder"
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def _identity(recipe):
    values = dataclasses.asdict(recipe)
    for stage in values["stages"].values():
        for source in (*stage["data"], *(stage["eval_data"] or ())):
            if source["records"] is not None:
                text = json.dumps(source["records"], sort_keys=True, default=str)
                source["records"] = f"{len(source['records'])} records, {hashlib.sha256(text.encode()).hexdigest()}"
    return values


def _flat(values, prefix=""):
    """Nested settings as one mapping with dotted keys, without those that may change."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat = {}
    for key, value in items:
        if key in _FREE:
            continue
        name = f"{prefix}{key}"
        if isinstance(value, (dict, list)) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _refuse_other(found, wanted, output):
    absent = "(not set)"
    differing = [
        f"{key}: {found.get(key, absent)!r} there, {wanted.get(key, absent)!r} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key, absent) != wanted.get(key, absent)
    ]
    if differing:
        raise ValueError(
            f"output: {output} holds a run of another recipe; nothing was changed. Choose another output folder, "
            "or restore these settings:\n  " + "\n  ".join(differing)
        )
