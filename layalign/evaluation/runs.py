"""Finished evaluations side by side: one table with a column a system, and paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from layalign.evaluation import comparison, report
from layalign.evaluation.processes import RECORDS, records_of
from layalign.figures import markdown_table
from layalign.kernels.files import read_json, write_json, write_text
from layalign.tasks import find_task
from layalign.tasks.registry import NAMES
from layalign.tasks.task import Record, Task

RESULTS = "results.json"
# The task whose results are called by its file's name.
OF_A_FILE = "problems"


class Run(NamedTuple):
    """A finished evaluation: its folder's name and system, its results, and its records by task."""

    name: str
    results: Mapping[str, Any]
    records: Mapping[str, list[Record]]


def read_run(folder: str | PathLike) -> Run:
    """The evaluation in a folder.

    Raises:
        ValueError: it holds none, or one that is not finished.
    """
    path = Path(folder)
    if not (path / RESULTS).is_file():
        unfinished = " (it is not finished; the same command goes on with it)" if (path / RECORDS).is_file() else ""
        raise ValueError(f"{path} holds no finished evaluation: no {RESULTS}{unfinished}")
    try:
        results = read_json(path / RESULTS)
        tasks = results["tasks"]
        name = f"{results['system']} ({path.name})"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / RESULTS}: not the results of an evaluation: {error!r}") from None
    records: dict[str, list[Record]] = {task: [] for task in tasks}
    for record in records_of(path):
        records.setdefault(record["task"], []).append(record)
    return Run(name, results, records)


def task_of(run: Run, name: str) -> Task:
    """The task that a run's results call `name`: one of the package's, or that of a file of problems, given as a task or as the data of
    the task "problems"."""
    asked = run.results["config"]["tasks"]
    of_a_file = OF_A_FILE if OF_A_FILE in asked and name not in NAMES else name
    return find_task(next((task for task in asked if task == name or Path(task).stem == name), of_a_file))


def against(run: Run, other: Run, draws: int = 1000) -> dict[str, dict[str, Any]]:
    """{task: the result of `comparison.compare`} of two runs on the same problems.

    Raises:
        ValueError: no task that both have, or other problems.
    """
    shared = [task for task in run.records if task in other.records]
    if not shared:
        raise ValueError(
            f"runs: {run.name} has the tasks {', '.join(run.records)}, {other.name} {', '.join(other.records)}; takes two "
            "that share one"
        )
    found = {}
    for name in shared:
        task = task_of(run, name)
        found[name] = comparison.compare(run.records[name], other.records[name], task.scoring, task.groups, draws=draws)
    return found


def write_against(folder: Path, run: Run, other: Run) -> str:
    """Write `against` as against.json and against.md -> the latter's text."""
    found = against(run, other)
    tables = [comparison.comparison_table(result, run.name, other.name, task) for task, result in found.items()]
    write_json(folder / "against.json", {"run": run.name, "against": other.name, "tasks": found}, indent=2)
    write_text(folder / "against.md", "\n".join(tables))
    return "\n".join(tables)


def compare_runs(folders: Sequence[str | PathLike], output: str | PathLike) -> str:
    """Write several evaluations of the same problems side by side: a table a task and scorer with a column a system, as Markdown and
    JSON, and a plot each; every system after the first is compared with it.

    Args:
        folders: of finished evaluations, at least two.
        output: a folder for comparison.md, comparison.json and compared_<task>_<scorer>.png.

    Returns:
        The text of comparison.md.

    Raises:
        ValueError: fewer than two, a folder without a finished evaluation, or runs on other problems.
    """
    if len(folders) < 2:
        raise ValueError(f"runs: got {len(folders)}, takes at least two folders of finished evaluations")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=f"{place}: {run.name}") for place, run in enumerate(runs, 1)]
    paired = {run.name: against(run, runs[0]) for run in runs[1:]}
    lines: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for name in [task for task in runs[0].records if all(task in run.records for run in runs)]:
        task = task_of(runs[0], name)
        of_task = {run.name: run.results["tasks"][name] for run in runs}
        scorers = [
            scorer
            for scorer in of_task[runs[0].name]["accuracy"]
            if all(scorer in x["accuracy"] for x in of_task.values())
        ]
        for scorer in scorers:
            table = {system: result["accuracy"][scorer] for system, result in of_task.items()}
            intervals = {system: result.get("intervals", {}).get(scorer, {}) for system, result in of_task.items()}
            lines += [f"## {name}, {scorer} scorer", "", *_columns(table, intervals, task), ""]
            path = Path(output) / f"compared_{name}_{scorer.replace('+', 'p')}.png"
            look: dict[str, Any] = {"groups": task.groups, "intervals": intervals, "measure": task.measure}
            report.plot_accuracy(table, path, f"{name}, {scorer} scorer", **look)
            found.setdefault(name, {})[scorer] = {"scores": table, "intervals": intervals}
    for system, results in paired.items():
        lines += [comparison.comparison_table(result, system, runs[0].name, task) for task, result in results.items()]
    text = "\n".join(lines)
    write_json(
        Path(output) / "comparison.json",
        {"runs": [run.name for run in runs], "tasks": found, "paired": paired},
        indent=2,
    )
    write_text(Path(output) / "comparison.md", text)
    return text


def _columns(table: report.Table, intervals: report.Intervals, task: Task) -> list[str]:
    """The rows of a Markdown table: averages, then languages; a column a system."""
    names = [*task.groups, *report.ordered_languages(table, task.groups)]
    values = {system: {**scores, **report.summarize(scores, task.groups)} for system, scores in table.items()}

    def cell(system: str, name: str) -> str:
        value, ends = values[system].get(name), intervals.get(system, {}).get(name)
        if value is None:
            return "-"
        return f"{value:.1f}" if ends is None else f"{value:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"

    rows = [[report.AVERAGES.get(name, name), *[cell(system, name) for system in table]] for name in names]
    return markdown_table(["", *table], [row for row in rows if set(row[1:]) != {"-"}])
