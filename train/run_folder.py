"""What a run writes down about itself, so that it resumes its own work and never touches another's."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layalign.configuration import STAGES
from layalign.kernels.files import InUse, read_json, regular, write_json
from layalign.train.initial import InitialWeights

if TYPE_CHECKING:
    from layalign.train.data.collate import EncodedRecords
    from layalign.train.recipe import Recipe

try:
    import fcntl
except ImportError:  # Windows has none; two runs at once in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SAMPLES = "samples.json"
LOCK = "run.lock"
RECIPE = "recipe.json"
DATA = "data.json"
# These may differ between a run and its continuation: none changes a trained number, engines by more than rounding.
_FREE = {"output", "progress", "report_to", "data_root", "keep_checkpoints", "save_steps", "save_minutes", "init_path"}
_FREE |= {"parallel", "fsdp", "deepspeed", "cache"}


class RunFolder:
    """A run's output folder, taken for this run alone; a context manager that gives it free again.

    Args:
        recipe: what is to be run there.

    Raises:
        ValueError: the folder belongs to a run of another recipe (the keys that differ are listed; those of a stage that comes after
            all work there may), holds files of something else, or is in use by another run.
    """

    def __init__(self, recipe: Recipe):
        # Through JSON once, so that tuples and paths compare equal to what was read back.
        self.output, self._wanted = Path(recipe.output), json.loads(json.dumps(_identity(recipe)))
        # Before the lock: of what is refused nothing is touched. After it: another run may have been there between.
        _check(self.output, self._wanted)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output: {self.output} cannot be made: {error.strerror}") from error
        self._lock = _lock(self.output)
        try:
            if (recipe_here := _check(self.output, self._wanted)) is not None:
                write_json(self.output / RECIPE, recipe_here)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)


def _lock(output: Path) -> int:
    """The descriptor of the folder's lock file. The lock ends with this process, however it ends."""
    try:
        descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"output: {output} cannot be written to: {error.strerror}") from error
    if fcntl is None:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
        os.close(descriptor)
        raise InUse(
            f"output: {output} is in use by another run ({holder or 'just started'}); wait for its end, or choose another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("output: %s cannot be locked (%s); take care that no second run uses it", output, error.strerror)
        return descriptor
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def held(lock: Path) -> bool:
    """Whether a run works in the folder of this lock file now; nothing is changed. Unknown, and False, without file locks."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _check(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What the folder's recipe is to become, None: as it is; nothing is changed. A stage that comes after all work may be corrected."""
    file = output / RECIPE
    for name in (LOCK, SAMPLES):  # the latter is written when a stage begins
        regular(output / name, "output")
    if not file.exists():
        if foreign := [name for name in (*STAGES, "model") if (output / name).exists()]:
            raise ValueError(
                f"output: {output} holds {foreign} but no {RECIPE}: it is not a training run; choose another folder"
            )
        return wanted
    try:
        found = read_json(file)
    except ValueError as error:
        raise ValueError(f"output: {error}, or choose another output folder") from error
    if not {"encoder", "llm", "stages"} <= found.keys():
        raise ValueError(f"output: {file} was not written by a training run; choose another output folder")
    worked = STAGES if (output / "model").exists() else _through_the_last(output)
    if not worked:
        return wanted
    before, now = ({**values, "stages": _of(values, worked)} for values in (found, wanted))
    _refuse_other(_flat(before), _flat(now), output)
    corrected = found | {"stages": before["stages"] | _of(wanted, [name for name in STAGES if name not in worked])}
    return None if corrected == found else corrected


def _through_the_last(output: Path) -> Sequence[str]:
    """The stages up to the last one with work."""
    done = [place for place, name in enumerate(STAGES) if has_work(output / name)]
    return STAGES[: done[-1] + 1] if done else ()


def _of(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: stage for name, stage in values["stages"].items() if name in names}


def has_work(folder: Path) -> bool:
    """Whether a stage's folder holds a checkpoint or a result. Before that, a run that failed may begin anew, corrected."""
    return (folder / "final").exists() or any(folder.glob("checkpoint-*"))


def check_data(
    folder: str | os.PathLike, name: str, records: EncodedRecords, skipped: int, evaluated: EncodedRecords | None = None
) -> None:
    """Write down what a stage trains on, or compare with what was written down.

    Args:
        folder: the stage's.
        name: the stage.
        records: tokenised.
        skipped: how many bad lines were left out.
        evaluated: what `eval_data` holds, tokenised.

    Raises:
        ValueError: the stage began with other data.
    """
    file = Path(folder) / DATA
    found = {"records": len(records), "skipped": skipped, "sha256": records.digest()}
    later = {} if evaluated is None else {"eval_sha256": evaluated.digest()}
    found |= later
    if file.exists() and has_work(file.parent):
        before = later | read_json(file)  # a run that an older version began does not say it
        if differing := [key for key, value in found.items() if before.get(key) != value]:
            of = "eval_data" if differing == ["eval_sha256"] else "data"
            raise ValueError(
                f"stages.{name}.{of}: no longer the data this run began with, as {file} says "
                f"({before.get('records')} records then, {len(records)} now, "
                "or other texts or tokenizers); restore it, or choose another output folder"
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)


def _identity(recipe):
    values = _values(recipe)
    if recipe.init_from is not None:
        # What was loaded counts, not where it lies.
        initial = InitialWeights(recipe.init_from.path, recipe.init_from.only)
        values["init_from"] = {
            "init_path": recipe.init_from.path,
            "only": ", ".join(sorted(initial.only)),
            "sha256": initial.digest(),
        }
    return values


def digest(recipe: Recipe) -> str:
    """A SHA-256 over the settings of a recipe that decide what is trained; of data and initial weights, their places."""
    values = _flat(json.loads(json.dumps(_values(recipe))))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _values(recipe):
    """A recipe's settings, records that are in memory by their hash."""
    recipe = copy.copy(recipe)
    recipe.stages = {name: copy.copy(stage) for name, stage in recipe.stages.items()}
    for stage in recipe.stages.values():
        stage.data = [_described(source) for source in stage.data]
        stage.eval_data = stage.eval_data and [_described(source) for source in stage.eval_data]
    return dataclasses.asdict(recipe)


def _described(source):
    """A source with its records' hash in their place. What lazy ones are, only data.json says."""
    if source.records is None:
        return source
    source = copy.copy(source)
    if source.in_memory:
        text = json.dumps(source.records, sort_keys=True, default=str)
        records = f"{len(source.records)} records, {hashlib.sha256(text.encode()).hexdigest()}"
    else:
        records = "read lazily"
    source.records = records
    return source


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
    # A base that lies elsewhere now is told by its weights and by the tokens it makes of the data, when the run goes on; quantised
    # weights tell nothing.
    for role in ("encoder", "llm"):
        if wanted.get("quantization") is None and found.get(role) and Path(wanted.get(role) or "").is_dir():
            found[role] = wanted[role]
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
