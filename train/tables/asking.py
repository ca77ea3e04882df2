"""How a table's rows are asked, and the evaluation of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layalign.evaluation.report import summarize
from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.kernels.files import MANIFEST
from layalign.loading import torch_device, torch_dtype
from layalign.saving import LLM_FOLDER
from layalign.systems import LLM, LayAlignModel, System, TranslateFirst
from layalign.tasks import find_task, load_tasks
from layalign.tasks.registry import NAMES
from layalign.train.tables.runs import Entry, Sources
from layalign.train.tables.table import Table

SCORER = "official"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rows are asked.

    Attributes:
        data: folder with the tasks' files; None: the usual names on the hub.
        tasks: {a task's name: a file of problems that takes its place}.
        languages, limit: as an evaluation takes them.
        settings: of all systems; the prompt is each row's own.
        known: {a task's name: SHA-256 of its problems}, so that they are read once.
    """

    data: str | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    languages: Sequence[str] | None = None
    limit: int | None = None
    settings: GenerationSettings = DEFAULT_SETTINGS
    known: Mapping[str, str] = field(default_factory=dict)

    def checked(self, table: Table) -> Asking:
        """The same, with the problems of a table's parts known.

        Raises:
            ValueError: problems that cannot be read, an unknown task, dtype or device.
        """
        if unknown := [name for name in self.tasks if name not in NAMES]:
            raise ValueError(
                f"tasks: got {unknown[0]!r}; rows of table {table.number} are asked {', '.join({part.task: None for part in table.parts})}"
            )
        torch_dtype(self.settings.dtype)
        torch_device(self.settings.device)
        tasks = {part.task for part in table.parts if part.is_asked}
        return replace(self, known={task: self.problems(task) for task in sorted(tasks)})

    def problems(self, task: str) -> str:
        """SHA-256 of what is asked for a task. Raises ValueError as `tasks.load_tasks`."""
        if task in self.known:
            return self.known[task]
        file = self.tasks.get(task)
        (found,) = load_tasks([file or task], None if file else self.data, self.languages, self.limit).values()
        return hashlib.sha256(json.dumps(found.problems).encode()).hexdigest()


def ask(entry: Entry, sources: Sources, asking: Asking, progress: bool) -> tuple[dict[str, Any], str, dict[str, int]]:
    """Scores of a row by averages and languages, the folder of its evaluation, and how many questions there were in each language."""
    system = system_of(entry, asking.settings)
    task, folder = evaluation_of(entry, sources, asking)
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


def evaluation_of(entry: Entry, sources: Sources, asking: Asking) -> tuple[str, Path]:
    """What a row is asked, and the folder of that: of another training, other problems or other settings, another one."""
    task = asking.tasks.get(entry.part.task, entry.part.task)
    counts = {
        "system": fingerprint_of(entry),
        "task": Path(task).name,
        "problems": asking.problems(entry.part.task),
        "languages": asking.languages,
        "limit": asking.limit,
        "prompt": entry.prompt,
        "max_new_tokens": asking.settings.max_new_tokens,
        "encoder_max_length": asking.settings.encoder_max_length,
        "dtype": asking.settings.dtype,
    }
    known = hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:12]
    return task, sources.output / "evaluations" / f"{entry.part.task}-{known}"


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
