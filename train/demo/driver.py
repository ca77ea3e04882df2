"""Trains the systems of a comparison and asks them, one after another; what is finished is left alone.

Each run has a folder: a stage's checkpoints, model/, log.jsonl, evaluation/PIECE.json, and done.json, written last.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from layalign.folders import damage
from layalign.kernels.files import append_line, read_json, regular, write_json
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.demo.systems import System
from layalign.train.processes import precision_of
from layalign.train.recipe import Recipe
from layalign.train.stages import train

DONE, LOG = "done.json", "log.jsonl"


@dataclass(frozen=True)
class Run:
    """One system trained with one seed, in a folder of its own."""

    system: System
    seed: int
    folder: Path


class Comparison(ABC):
    """What the driver needs to know of a pair of bases.

    Attributes:
        runs: what is trained, in this order.
        llm_folder: where the answers of the LLM alone go; None where it is not asked.
        progress: whether each run is announced.
    """

    runs: list[Run]
    llm_folder: Path | None
    progress: bool = True

    @abstractmethod
    def recipe(self, run: Run) -> Recipe:
        """How a run is trained, into its folder."""

    @abstractmethod
    def evaluate(self, run: Run, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor) -> None:
        """Ask a trained run, through `made`."""

    @abstractmethod
    def evaluate_llm(self, folder: Path) -> None:
        """Ask the LLM alone, through `made`."""

    def callbacks(self, recipe: Recipe) -> list[TrainerCallback]:
        """Of the trainer, beside the log of the loss."""
        return []

    def finished(self) -> None:  # noqa: B027, a pair need not listen
        """Called when the LLM alone has been asked, and after each run that was made."""

    def make(self) -> None:
        """Ask the LLM alone, then train and ask every run that is not done yet; called again, it goes on."""
        if self.llm_folder is not None:
            self.evaluate_llm(self.llm_folder)
        self.finished()
        for run in self.runs:
            if not is_whole(run.folder):
                self._make(run)
                self.finished()

    def _make(self, run: Run) -> None:
        recipe = self.recipe(run)
        regular(run.folder / LOG, "output")  # before anything is trained
        if self.progress:
            stages = ", then ".join(f"{stage.steps} steps of the {name} stage" for name, stage in recipe.stages.items())
            print(f"\n{run.folder.name}: {stages}", flush=True)
        run.folder.mkdir(parents=True, exist_ok=True)
        model, processor, history = train(recipe, [*self.callbacks(recipe), StepLog(run.folder / LOG)])
        started = time.monotonic()
        self.evaluate(run, model, processor)
        first = next(iter(recipe.stages.values()))
        done = {
            "steps": {name: stage.steps for name, stage in recipe.stages.items()},
            "batch_size": first.batch_size,
            "precision": precision_of(recipe, first),
            "seconds": training_seconds(run.folder) | {"evaluation": round(time.monotonic() - started, 1)},
            "threads": torch.get_num_threads(),
            "device": str(model.device),
            "trained_parameters": model.num_trained_parameters,
            "gates": None if model.aligner is None else model.gates().tolist(),
            "history": history,
            "pieces": pieces_in(run.folder),
        }
        keep(run.folder / DONE, done)


def made(folder: Path, pieces: Mapping[str, Callable[[], Any]], progress: bool = True) -> dict[str, Any]:
    """Every piece of an evaluation, {piece: result}; those that are whole in folder/evaluation are read, not made again."""
    results = {}
    for name, make in pieces.items():
        file = piece_file(folder, name)
        found = kept(file)
        if found is None:
            if progress:
                print(f"{folder.name}: {name}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            keep(file, make())
            found = kept(file)
        results[name] = found
    return results


def keep(file: Path, value: Any) -> None:
    """Write a result down, whole, with its hash."""
    regular(file, "output")
    write_json(file, {"sha256": _hash(value), "value": value})


def kept(file: Path) -> Any:
    """What `keep` wrote; None where there is nothing, or it has been damaged since: it is to be made again."""
    try:
        found = read_json(file)
    except (FileNotFoundError, ValueError):
        return None
    whole = found.keys() == {"sha256", "value"} and found["sha256"] == _hash(found["value"])
    return found["value"] if whole else None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a run is done, and its model and every piece of its evaluation are as they were then."""
    done = kept(folder / DONE)
    if done is None or damage(folder / "model") is not None:
        return False
    pieces = done.get("pieces", pieces_in(folder))  # an earlier version did not say which there were
    return all(kept(piece_file(folder, name)) is not None for name in pieces)


def pieces_in(folder: Path) -> list[str]:
    """The names of a run's pieces."""
    return sorted(file.stem for file in (folder / "evaluation").glob("*.json"))


def piece_file(folder: Path, name: str) -> Path:
    """Where a piece of a run's evaluation is kept."""
    return folder / "evaluation" / f"{name}.json"


class StepLog(TrainerCallback):
    """Adds a JSON line to `path` at every log: stage, step, loss, learning_rate, and the wall seconds since the last.

    A resumed run writes the steps after its checkpoint again; the seconds of all lines add up to the time spent.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        now = time.monotonic()
        line = {"stage": Path(args.output_dir).name, "step": state.global_step, "loss": logs["loss"]}
        line |= {"learning_rate": logs.get("learning_rate"), "seconds": round(now - self.last, 3)}
        self.last = now
        append_line(self.path, json.dumps(line))


def training_seconds(folder: Path) -> dict[str, float]:
    """Wall seconds of a run's training by stage, repeated steps of resumed runs included: {stage: seconds}. Lines that were damaged
    are not counted."""
    seconds: dict[str, float] = {}
    for line in (
        (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines() if (folder / LOG).is_file() else ()
    ):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            seconds[entry["stage"]] = seconds.get(entry["stage"], 0.0) + entry["seconds"]
    return {stage: round(value, 1) for stage, value in seconds.items()}
