"""Files of results: pytest-benchmark's JSON, whose rows carry what bench/conftest.py's `row` says of them in extra_info."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation at one case. Times in seconds; figures: whatever else was measured, by name.

    spread: interquartile range over the median, from `rounds` rounds. ceilings: bytes and flops a second that the machine
    reached in that run with copies and with products of this dtype. versions: of the packages then, by name.
    """

    fullname: str
    suite: str
    case: str
    implementation: str
    yardstick: str
    ours: bool
    dtype: str
    sizes: dict[str, int]
    median: float
    spread: float
    rounds: int
    date: str
    commit: str
    small: bool
    ceilings: dict[str, float] | None
    figures: dict[str, Any]
    versions: dict[str, str | None]

    @property
    def ratio(self) -> float | None:
        """Its time over the yardstick's, None where the yardstick has none."""
        return self.figures.get("time_over_yardstick")

    def work(self) -> tuple[float, float]:
        """Operations and bytes moved that the case cannot do without; 0 where not told."""
        figures = self.figures
        flops, moved = figures.get("teraflops", 0) * 1e12, figures.get("gigabytes_per_second", 0) * 1e9
        return flops * self.median, moved * self.median


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A row without a figure: its test's name and why; suite and the like are "" where it failed before they were known."""

    fullname: str
    error: str
    suite: str = ""
    case: str = ""
    implementation: str = ""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling ahead of time has said. spill_bytes: of all `kernels` that compiled. failing: that do not pass a gate, with those
    `without_figures`. whole: whether it came to its end. note: in words."""

    kernels: int = 0
    without_figures: int = 0
    failing: int = 0
    spill_bytes: int = 0
    whole: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Results:
    """The rows of one file, and pytest-benchmark's machine_info with what bench/recording.py adds; failures: of the last runs."""

    path: Path
    machine: dict[str, Any]
    rows: list[Row]
    failures: list[Failure] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Of machine: the name of its folder."""
        return self.machine["kind"]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return "gpu_memory_bytes" in self.machine

    def tables(self) -> dict[tuple[str, str], list[Row]]:
        """{(suite, case): rows}, in the order of the file."""
        tables: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            tables.setdefault((row.suite, row.case), []).append(row)
        return tables


def kind_of(device: str) -> str:
    """The name of the folder of a device's results."""
    return re.sub(r"[^a-z0-9_]+", "-", device.lower()).strip("-")


NAMES = ("suite", "case", "implementation", "yardstick", "ours", "dtype", "sizes")
APART = {*NAMES, "datetime", "commit", "dirty", "versions", "small", "ceilings"}


def read_file(path: str | Path) -> dict[str, Any]:
    """The JSON of one file as it is.

    Raises:
        ValueError: it is not a file of pytest-benchmark's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; `pytest bench/ --record FOLDER` writes results") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as results: {error}") from error
    try:
        for row in content["benchmarks"]:
            row["fullname"], row["stats"]["median"], row["extra_info"]["suite"]
        content["machine_info"]["kind"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not results of `pytest bench/`: {type(error).__name__} {error}") from error
    return content


def read_results(path: str | Path) -> Results:
    """The rows of one file.

    Raises:
        ValueError: with the file's name and what it lacks.
    """
    content = read_file(path)
    try:
        rows = [_row(row, content) for row in content["benchmarks"]]
        names = [field.name for field in fields(Failure)]
        failures = [
            Failure(**{name: one[name] for name in names if name in one}) for one in content.get("failures", [])
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not results of `pytest bench/`: a row lacks {error}") from error
    return Results(Path(path), content["machine_info"], rows, failures)


def compiled_kernels(results: Results) -> Compiled | None:
    """What `make gpu` compiled on the same kind of machine, from its record in the folder of all results; None: it compiled nothing."""
    path = results.path.resolve().parents[1] / "first_light.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    step = record["steps"].get("compile")
    if step is None or kind_of(record["gpu"]) != results.kind:
        return None
    figures = step["figures"]
    whole = step["status"] == "done" or (step["status"] == "failed" and figures.get("failing", 0) > 0)
    return Compiled(**figures, whole=whole, note=step["note"])


def _row(row, content):
    """A row of a recorded file has its own date and commit; one of `--benchmark-json` has its file's."""
    info, stats = row["extra_info"], row["stats"]
    commit, dirty = content["commit_info"]["id"], content["commit_info"].get("dirty")
    return Row(
        fullname=row["fullname"],
        **{name: info[name] for name in NAMES},
        median=stats["median"],
        spread=stats["iqr"] / stats["median"],
        rounds=stats["rounds"],
        date=info.get("datetime", content["datetime"])[:10],
        commit=info.get("commit", commit)[:12] + ("+" if info.get("dirty", dirty) else ""),
        small=info.get("small", False),
        ceilings=info.get("ceilings"),
        figures={name: value for name, value in info.items() if name not in APART and "clock" not in name},
        versions=info.get("versions", content["machine_info"]["versions"]),
    )
