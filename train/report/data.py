"""What a run's folder tells of the run, whatever of it is there: under way, interrupted, ended or damaged."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layalign.configuration import STAGES
from layalign.folders import damage
from layalign.kernels.files import read_json
from layalign.train.checkpoints import newest
from layalign.train.run_folder import DATA, LOCK, RECIPE, SAMPLES, held
from layalign.train.stage_log import LOG, read_log

HISTORY = "history.json"


@dataclass
class StageReport:
    """One stage.

    Attributes:
        name: of the stage.
        settings: of it in the recipe.
        logs: dicts with step and figures, by rising step; evaluations among them.
        starts: what each process that worked on it began with.
        warnings: (step, text).
        data: what it was trained on.
        ended: whether its result is there, whole.
        steps: that it is to have; None: not known.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    steps: int | None = None

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return max((log["step"] for log in self.logs), default=0)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one figure."""
        return [(log["step"], log[key]) for log in self.logs if _is_number(log.get(key))]

    def keys(self, prefix: str) -> list[str]:
        """Names of the figures that begin so, in the order of the logs."""
        return list(dict.fromkeys(key for log in self.logs for key in log if key.startswith(prefix)))

    @property
    def seconds(self) -> float | None:
        """Time worked on it, waits between processes left out; None where the log tells no times."""
        total, since, before = 0.0, None, None
        entries = [entry for entry in (*self.starts, *self.logs) if _is_number(entry.get("time"))]
        for entry in sorted(entries, key=lambda entry: entry["time"]):
            if "start" in entry:
                total += before - since if since is not None and before is not None else 0
                since = entry["time"]
            before = entry["time"]
        return None if since is None or before is None else total + before - since


@dataclass
class RunReport:
    """A run.

    Attributes:
        folder: where it is.
        state: "ended", "under way" or "interrupted".
        recipe: its settings.
        stages: those of the recipe, or found in the folder.
        samples: held-out questions with answers, if there are any.
        problems: what could not be read, and why.
    """

    folder: Path
    state: str
    recipe: dict[str, Any]
    stages: list[StageReport]
    samples: list[dict[str, Any]]
    problems: list[str]


def read_run(folder: str | os.PathLike) -> RunReport:
    """Read a run's folder.

    Raises:
        ValueError: no folder, or one that no training run has written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"report: {folder} is {'a file' if folder.exists() else 'not there'}, takes the folder of a training run"
        )
    if not (folder / RECIPE).exists() and not any((folder / name / LOG).exists() for name in STAGES):
        raise ValueError(f"report: {folder} holds no training run (no {RECIPE}); it takes a recipe's output folder")
    problems: list[str] = []
    recipe = _json(folder / RECIPE, problems)
    settings = recipe.get("stages")
    settings = settings if isinstance(settings, dict) else {}
    stages = []
    for name in STAGES:
        if name in settings or (folder / name).is_dir():
            stages.append(_stage(folder / name, name, settings.get(name), problems))
    whole = damage(folder / "model") if (folder / "model").exists() else "not there"
    if whole not in (None, "not there"):
        problems.append(f"model: {whole}")
    state = "under way" if held(folder / LOCK) else "ended" if whole is None else "interrupted"
    samples = _json(folder / SAMPLES, problems, list) if (folder / SAMPLES).exists() else []
    return RunReport(folder, state, recipe, stages, [row for row in samples if isinstance(row, dict)], problems)


def _stage(folder: Path, name: str, settings: Any, problems: list[str]) -> StageReport:
    stage = StageReport(name, settings if isinstance(settings, dict) else {})
    if (folder / DATA).exists():
        stage.data = _json(folder / DATA, problems)
    if (folder / "final").exists():
        reason = damage(folder / "final")
        stage.ended = reason is None
        if reason:
            problems.append(f"{name}/final: {reason}")
    found = list(read_log(folder / LOG))
    stage.starts = [line for line in found if isinstance(line.get("start"), dict)]
    stage.warnings = [(line["step"], line["warning"]) for line in found if isinstance(line.get("warning"), str)]
    # Of a step that was logged twice, by a process that was killed and the one after it, the last counts.
    by_step = {(line["step"], "eval_loss" in line): line for line in found if "loss" in line or "eval_loss" in line}
    stage.logs = [by_step[key] for key in sorted(by_step)]
    if not stage.logs:
        stage.logs = _logs_elsewhere(folder, problems)
    told = [line["max_steps"] for line in stage.starts if isinstance(line.get("max_steps"), int)]
    stage.steps = told[-1] if told else stage.settings.get("steps")
    if not isinstance(stage.steps, int):
        stage.steps = stage.step if stage.ended else None
    return stage


def _logs_elsewhere(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Those of a run that wrote no log: of its result, or of its newest checkpoint."""
    checkpoint = newest(folder)
    places = [folder / "final" / HISTORY] + ([checkpoint / "trainer_state.json"] if checkpoint else [])
    for place in places:
        if place.exists():
            read = _json(place, problems, (list, dict))
            logs = read.get("log_history", []) if isinstance(read, dict) else read
            return [log for log in logs if isinstance(log, dict) and isinstance(log.get("step"), int)]
    return []


def _json(file: Path, problems: list[str], kind: Any = dict) -> Any:
    """What a JSON file holds; empty, and a problem, where it cannot be read."""
    empty = (kind[0] if isinstance(kind, tuple) else kind)()
    try:
        found = read_json(file, object)
    except (OSError, ValueError) as error:
        problems.append(f"{file.parent.name}/{file.name} cannot be read: {error}")
        return empty
    if not isinstance(found, kind):
        problems.append(f"{file.parent.name}/{file.name} holds {type(found).__name__}, nothing that a run writes")
        return empty
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
