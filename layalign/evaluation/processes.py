"""One evaluation by several processes (torchrun, accelerate launch): who they are, and the one folder they write into.

The first process writes records.jsonl; each other one has a journal of its own beside it, whose lines the first takes over: at the
end, and at the beginning those that a killed run left, whatever number of processes it had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from layalign.evaluation.settings import GenerationSettings
from layalign.journal import Check, Journal, checked_lines
from layalign.tasks.task import Problem, Record

RECORDS, JOB = "records.jsonl", "evaluation.json"
_PARTS = "records-*.jsonl"

Key = tuple[str, str, int]
Make = Callable[[set[Key], Callable[[list[Record]], Any]], None]


def key(problem: Problem) -> Key:
    """What tells a problem from all others of an evaluation: task, language, place in its language."""
    return problem["task"], problem["lang"], problem["index"]


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many there are."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As torchrun's or accelerate's environment says; several are connected by gloo.

        Raises:
            ValueError: an environment that says it in part.
        """
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
            raise ValueError(f"WORLD_SIZE is {count}, but RANK or MASTER_ADDR is not set; start processes by torchrun")
        import torch.distributed as dist

        if not dist.is_initialized():  # a process that has no more to do waits for the others, however long they take
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what all have in common."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def placed(self, settings: GenerationSettings) -> GenerationSettings:
        """`settings`, with this process's own GPU where they name no device and there are GPUs."""
        import torch

        if self.count == 1 or settings.device is not None or not torch.cuda.is_available():
            return settings
        if settings.devices is not None:
            raise ValueError(
                f"devices: got {settings.devices!r} in {self.count} processes; one process takes all devices"
            )
        place = int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count()
        return replace(settings, device=f"cuda:{place}")


def answered(
    make: Make,
    problems: list[Problem],
    folder: Path,
    job: dict[str, Any],
    processes: Processes,
) -> list[Record]:
    """The records of all problems, in their order, which records.jsonl then has too.

    Args:
        make: called with the keys of problems that have a record, and a function that keeps new records; makes this process's
            share of the others.
        problems: of the whole evaluation.
        folder: of the results.
        job: tells this evaluation from others.
        processes: who takes part.

    Raises:
        ValueError: the folder is of another evaluation, or one in use.
    """
    if not processes.first:
        return _share(make, problems, folder, job, processes)
    with Journal(folder / RECORDS, job, folder / JOB, _checker(problems)) as journal:
        _take_over(journal, problems, folder, job)
        processes.wait()  # for the others to read what there is
        processes.wait()
        make({key(record) for record in journal.records}, journal.append)
        processes.wait()  # for the others to be done
        _take_over(journal, problems, folder, job)
        found = {key(record): record for record in journal.records}
        journal.replace([found[key(problem)] for problem in problems])
    processes.wait()
    return journal.records


def _share(
    make: Make, problems: list[Problem], folder: Path, job: dict[str, Any], processes: Processes
) -> list[Record]:
    """The same in a process that is not the first."""
    processes.wait()
    kept = {key(record) for record in records_of(folder)}
    processes.wait()
    with Journal(folder / f"records-{processes.rank}.jsonl", job, check=_checker(problems)) as part:
        make(kept, part.append)
    processes.wait()
    processes.wait()
    return records_of(folder)


def records_of(folder: Path) -> list[Record]:
    """The records of an evaluation's folder.

    Raises:
        ValueError: it holds none, or a line that is broken or has changed.
    """
    path = folder / RECORDS
    if not path.is_file():
        raise ValueError(f"{folder} holds no evaluation (no {RECORDS})")
    with open(path, "rb") as file:
        return list(checked_lines(path, file.readlines()))


def _checker(problems: list[Problem]) -> Check:
    """Finds a record that is none of the problems', or stands there twice."""
    asked = {key(problem): json.loads(json.dumps(problem)) for problem in problems}
    seen: set[Key] = set()

    def wrong(_: int, record: Record) -> str | None:
        if not {"task", "lang", "index", "prediction"} <= record.keys():
            return "no record of an evaluation"
        problem = asked.get(key(record))
        if problem is None or any(record.get(name) != value for name, value in problem.items()):
            return "not a question of this evaluation, or another text of it"
        if key(record) in seen:
            return "a question that stands there twice"
        seen.add(key(record))
        return None

    return wrong


def _take_over(journal: Journal, problems: list[Problem], folder: Path, job: dict[str, Any]) -> None:
    """Add what other processes' journals have, and remove them."""
    known = {key(record) for record in journal.records}
    for path in sorted(folder.glob(_PARTS)):
        with Journal(path, job, check=_checker(problems)) as part:
            journal.append([record for record in part.records if key(record) not in known])
            known |= {key(record) for record in part.records}
        part.remove()
