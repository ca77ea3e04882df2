"""Tables as a person reads them: published and measured figures, what there is, and what it would take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from layalign.evaluation.report import AVERAGES
from layalign.figures import markdown_table
from layalign.tasks.registry import find_task
from layalign.train.plan.text import duration
from layalign.train.tables.seeds import apart, by_luck
from layalign.train.tables.table import COUNTED, WORDS, Table

HEADINGS = {
    "encoder_millions": "encoder (M)",
    "adapter_millions": "adapter (M)",
    "aligner_millions": "aligner (M)",
    "trained_millions": "trained (M)",
    "backbone": "backbone",
    "training_data": "training data",
    "source": "source",
}


def table_text(result: Mapping[str, Any]) -> str:
    """A table in Markdown, two lines a row: the paper's figures, and below them those measured.

    Args:
        result: of `make_table`.
    """
    lines = [f"# Table {result['table']}: {result['title']} (section {result['section']})", ""]
    for part in result["parts"]:
        header = [part["name"], "", *(heading(column) for column in part["columns"])]
        rows, reasons = [], []
        for row in part["rows"]:
            published = [_cell(value, column) for value, column in zip(row["published"], part["columns"], strict=True)]
            rows.append([row["name"], "paper", *published])
            if row["measured"] is None:
                reasons.append(f"- {row['name']}: as published only; {row['why']}")
            else:
                measured = zip(row["measured"], part["columns"], strict=True)
                rows.append(["", _said_seeds(row), *(_cell(value, column) for value, column in measured)])
                if any(value is not None for value in row.get("spread", ())):
                    spread = zip(row["spread"], part["columns"], strict=True)
                    rows.append(["", "±", *(_spread(value, column) for value, column in spread)])
        lines += [*markdown_table(header, rows, "llr"), ""]
        counts = {sum(row["questions"].values()) for row in part["rows"] if row.get("questions")}
        if counts:
            asked = " or ".join(f"{count:,}" for count in sorted(counts))
            task = part["task"] if part.get("file") is None else f"{part['file']} in place of {part['task']}"
            lines += [f"here: {asked} questions of {task}, the {result['scorer']} scorer{_said_settings(result)}.", ""]
            lines += [*_partial_averages(part)]
        lines += [*reasons, ""] if reasons else []
        spreads = any(value is not None for row in part["rows"] for value in row.get("spread", ()))
        lines += [*_differences(part), ""] if spreads else []
    return "\n".join(lines)


def _said_seeds(row: Mapping[str, Any]) -> str:
    count = len(row.get("seeds", ()))
    return f"here, {count} seeds" if count > 1 else "here"


def _differences(part: Mapping[str, Any]) -> Iterator[str]:
    """What means over seeds say of rows beside the reference, by the first column that takes answers."""
    place = next((place for place, column in enumerate(part["columns"]) if column not in (*COUNTED, *WORDS)), None)
    found = [] if place is None else list(apart(part["rows"], place))
    beside = next((row["name"] for row in part["rows"] if row.get("reference")), None)
    yield f"± is the sample standard deviation over seeds.{f' Beside {beside}, over the seeds that both have:' if found else ''}"
    if found:
        yield ""
    for name, difference, beyond, seeds in found:
        said = f"{heading(part['columns'][place])} {difference:+.1f}"
        if seeds == 1:
            yield f"- {name}: not compared, there are no two seeds of both"
        elif not beyond:
            yield f"- {name}: {said}, within what seeds differ by"
        elif not seeds:
            yield f"- {name}: {said}, on one side of every seed of {beside}"
        else:
            luck = f"which {seeds} seeds each would be by luck in 1 of {round(1 / by_luck(seeds))} rows"
            yield f"- {name}: {said}, every seed's figure lies on one side of all of the other's, {luck}"


def _spread(value: Any, column: str) -> str:
    return "" if value is None or column in COUNTED else f"{value:.1f}"


def _said_settings(result: Mapping[str, Any]) -> str:
    """What was asked for beside the recipes as they are, where that was written down."""
    given = result.get("settings") or {}
    words = [f"over {name}" for name in given.get("recipes", ())] + [*given.get("overrides", ())]
    words += [f"at most {given['limit']} a language"] if given.get("limit") else []
    return f"; {', '.join(words)}" if words else ""


def _partial_averages(part: Mapping[str, Any]) -> Iterator[str]:
    """Which averages are over some of their languages alone, as what was asked had no others."""
    asked = {lang for row in part["rows"] for lang in row.get("questions") or ()}
    groups = find_task(part["task"]).groups
    partial = {
        heading(column): [lang for lang in groups[column] if lang in asked]
        for column in part["columns"]
        if column in groups and not asked.issuperset(groups[column])
    }
    if partial:
        said = "; ".join(f"{name} over {', '.join(langs) or 'none'}" for name, langs in partial.items())
        yield from (f"here, of their languages: {said}.", "")


def heading(column: str) -> str:
    """A column's heading as the paper writes it."""
    return HEADINGS.get(column) or AVERAGES.get(column) or column.capitalize()


def listed_tables(tables: Iterable[Table]) -> str:
    """A line a table: its number, title, section, rows, and what they are settings over."""
    lines = []
    for table in tables:
        tasks = ", ".join(dict.fromkeys(part.task for part in table.parts))
        about = f"section {table.section}; {len(table.rows)} rows; {tasks}; over {', '.join(table.recipes)}"
        lines.append(f"{table.number:>2}  {table.title} ({about})")
    return "\n".join(lines)


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """What a table would take, line by line.

    Args:
        plan: of `plan_table`.
    """
    yield f"Table {plan['table']}: {len(plan['trainings'])} trainings; nothing was loaded or written. Evaluations are not counted."
    for line in plan["trainings"]:
        if line["whole"]:
            yield f"  {line['run']}: done"
        elif "why" in line:
            yield f"  {line['run']}: cannot be planned: {line['why']}"
        else:
            yield from _run_lines(line)
    if plan["seconds"] is not None:
        yield (
            f"to be trained: about {duration(plan['seconds'])} in all"
            if plan["seconds"]
            else "nothing is left to train"
        )
    for row, why in plan["missing"].items():
        yield f"{row}: as published only; {why}"


def _run_lines(line: Mapping[str, Any]) -> Iterator[str]:
    plan = line["plan"]
    trained = plan["parameters"]["trained"]["total"] / 1e6
    for stage in plan["stages"].values():
        steps = "an unknown number of" if stage["steps"] is None else f"{stage['steps']:,}"
        memory = stage["memory"]["total"] / 1e9
        time = "a time not known" if stage["seconds"] is None else f"about {duration(stage['seconds'])}"
        yield f"  {line['run']}: {trained:,.2f} M trained, {steps} steps of {stage['global_batch']}, {memory:,.1f} GB, {time}"
    for note in plan["notes"]:
        yield f"    {note}"


def _cell(value: Any, column: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if column not in COUNTED:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
