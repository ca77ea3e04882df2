"""The budget of an experiment: what was asked for, and how many steps that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from layalign.train.demo.driver import kept
from layalign.train.demo.real.data import REAL_SHARE
from layalign.train.processes import precision_of
from layalign.train.recipe import Recipe
from layalign.train.stages import build

DEFAULT_MINUTES = 40
SHARES = {"translation": 0.2, "task": 0.8}
PLAN = "plan.json"
# What --data may hold: sentence pairs to train on, and what is tested on.
SETS = ("tatoeba_pairs", "tatoeba_laser", "mgsm", "msvamp", "gsm8k")
TIMED_PASSES = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an experiment is asked for; `arguments` checks it.

    Attributes:
        data: folder with tatoeba_pairs/, tatoeba_laser/, mgsm/, msvamp/ and gsm8k/, those there are; None: generated text
            alone.
        steps: optimizer steps of each run over both stages, 2 or more.
        minutes: instead of a LayAlign run, from which the steps are found once by timing; 40 where neither is given.
        precision: "fp32" or "bf16" in training, None for the recipe's own; whatever is answered is fp32.
        questions, benchmark_questions, sentences: a language: generated problems, MSVAMP and MGSM questions, and LASER
            sentences that are translated.
        real_share: share of real sentence pairs in the translation stage's records, where there are so many.
        interfaces: real pairs are also those of `interface_pairs`, which are fetched.
    """

    data: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    precision: str | None = None
    questions: int = 50
    benchmark_questions: int = 5
    sentences: int = 16
    real_share: float = REAL_SHARE
    interfaces: bool = False

    def arguments(self) -> dict:
        """As plan.json holds them, steps or minutes None.

        Raises:
            ValueError: a wrong one.
        """
        counts = {name: getattr(self, name) for name in ("questions", "benchmark_questions", "sentences")}
        for name, value in counts.items():
            check_count(name, value, 2)
        if self.precision not in (None, "fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, takes 'fp32' or 'bf16'")
        if not 0 <= self.real_share <= 1:
            raise ValueError(f"real_share: got {self.real_share}, takes a number from 0 to 1")
        if self.data is not None:
            check_folder(self.data)
        place = None if self.data is None else str(self.data.resolve())
        given = {"precision": self.precision, "data": place, "real_share": self.real_share}
        given |= {"interfaces": True} if self.interfaces else {}  # plans without it are older than it
        return budget(self.minutes, self.steps) | given | counts


def budget(minutes: float | None, steps: int | None) -> dict:
    """{"minutes", "steps"}, one of them None; 40 minutes where neither is given.

    Raises:
        ValueError: both, or one that is none.
    """
    if minutes is not None and steps is not None:
        raise ValueError("steps: give minutes or steps, not both")
    if steps is not None:
        check_count("steps", steps, 2)
        return {"minutes": None, "steps": steps}
    minutes = DEFAULT_MINUTES if minutes is None else minutes
    if not 0 < minutes < float("inf"):
        raise ValueError(f"minutes: got {minutes}, takes a number above 0")
    return {"minutes": minutes, "steps": None}


def check_folder(data: Path) -> None:
    """Raises ValueError unless `data` is a folder with one of SETS: of a misspelt one, hours of training would have read nothing."""
    if not data.is_dir():
        raise ValueError(f"data: {data} is not a folder")
    if not any((data / name).is_dir() for name in SETS):
        raise ValueError(f"data: {data} holds none of {', '.join(SETS)}")


def check_count(name: str, value: object, least: int) -> None:
    """Raises ValueError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, takes a whole number of at least {least}")


def check_rate(value: float) -> None:
    """Raises ValueError unless `value` can be a learning rate."""
    if not 0 < value < 1:
        raise ValueError(f"learning_rate: got {value}, takes a number above 0 and below 1")


def read_plan(output: Path, arguments: dict) -> dict | None:
    """The plan of an earlier call with the same arguments, or None.

    Raises:
        ValueError: the folder of another run.
    """
    file = output / PLAN
    if not file.exists():
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"output: {output} is not empty and holds no {PLAN} of a real run; choose another folder")
        return None
    try:
        plan = kept(file)
        before = plan["arguments"]
    except (KeyError, TypeError):
        raise ValueError(f"output: {file} is damaged, or of another version; choose another folder") from None
    differing = [
        f"{key} {before.get(key)!r} there, {arguments.get(key)!r} here"
        for key in dict.fromkeys([*arguments, *before])
        if before.get(key) != arguments.get(key)
    ]
    if differing:
        raise ValueError(f"output: {output} holds a run with {'; '.join(differing)}; choose another folder")
    return plan


def plan_steps(arguments: dict, recipe: Callable[[], Recipe], records: list[dict]) -> dict[str, int]:
    """{stage: optimizer steps} of the budget; a budget in minutes is turned into steps by timing a few.

    Args:
        arguments: of `Settings.arguments`.
        recipe: makes the recipe that is timed.
        records: what it is timed on.
    """
    total = arguments["steps"]
    if total is None:
        total = 60 * arguments["minutes"] / seconds_per_step(recipe(), records)
    return shared_steps(total)


def shared_steps(total: float) -> dict[str, int]:
    """{stage: optimizer steps} of so many in all, by SHARES."""
    translation = max(1, round(total * SHARES["translation"]))
    return {"translation": translation, "task": max(1, round(total) - translation)}


def seconds_per_step(recipe: Recipe, records: list[dict]) -> float:
    """Median seconds of a forward and backward pass of the task stage's model and batches, the first pass left out."""
    model, processor = build(recipe)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    stage, seconds = recipe.stages["task"], []
    for place in range(TIMED_PASSES + 1):
        rows = records[place * stage.batch_size : (place + 1) * stage.batch_size]
        batch = processor([row["source"] for row in rows], prompt=None, target=[row["target"] for row in rows])
        started = time.monotonic()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision_of(recipe, stage) == "bf16"):
            loss = model(**batch.to(model.device)).loss
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])
