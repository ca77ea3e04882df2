"""Tables and plots. A table is {system: {lang: per cent}}; matplotlib and rich are loaded only when used.

Tables and plots of a task take its `groups` ({"avg": codes, ...}; the order of "avg" is the languages' order), and
`intervals` as `comparison.intervals` gives them, {system: {lang or group: (low, high)}}, where there are any.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from layalign import figures
from layalign.figures import COLOURS, GRID, MARKERS, Files, draw_bar_grid, draw_bars, new_figure, save_figure
from layalign.languages import MATHEMATICS_GROUPS, PAPER_LANGUAGES, Groups, in_order

if TYPE_CHECKING:
    from rich.console import Console

AVERAGES = {"avg": "Avg.", "lrl": "Lrl.", "hrl": "Hrl."}

Table = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, Sequence[float]]]


def summarize(accuracy: Mapping[str, float], groups: Groups = MATHEMATICS_GROUPS) -> dict[str, float | None]:
    """The paper's averages of {lang: per cent}: one a group, None where none of a group's languages is there.

    For mathematics lrl: bn, th, sw; hrl: ja, zh, de, fr, ru, es, en; avg: those ten. An average is over those of its
    languages that are there. Languages of no group (Telugu, MGSM's eleventh, which the paper leaves out) enter none.
    """
    result: dict[str, float | None] = {}
    for name, languages in groups.items():
        found = [accuracy[lang] for lang in languages if lang in accuracy]
        result[name] = sum(found) / len(found) if found else None
    return result


def ordered_languages(table: Table, groups: Groups = MATHEMATICS_GROUPS) -> list[str]:
    """The languages of a table: the paper's in its order, then the others by code."""
    return in_order((lang for scores in table.values() for lang in scores), groups["avg"])


def markdown_table(
    table: Table,
    title: str | None = None,
    *,
    groups: Groups = MATHEMATICS_GROUPS,
    intervals: Intervals | None = None,
) -> str:
    """A Markdown table with one row per system: averages, then languages; "-" where a figure is missing, and behind a
    figure that has an interval half its width.
    """
    header, rows = _cells(table, groups, intervals)
    lines = [f"## {title}", ""] if title else []
    return "\n".join([*lines, *figures.markdown_table(header, rows), *_footnote(table, groups, intervals)]) + "\n"


def print_table(
    table: Table,
    title: str | None = None,
    console: Console | None = None,
    *,
    groups: Groups = MATHEMATICS_GROUPS,
    intervals: Intervals | None = None,
) -> None:
    """Print the table in the terminal, languages below each other."""
    from rich import console as terminal
    from rich.table import Table as TerminalTable

    header, rows = _cells(table, groups, intervals)
    caption = " ".join(_footnote(table, groups, intervals)).strip()
    output = TerminalTable(title=title, caption=caption or None)
    output.add_column()
    for row in rows:
        output.add_column(row[0], justify="right")
    for place, name in enumerate(header[1:], 1):
        output.add_row(name, *[row[place] for row in rows], end_section=place == len(groups))
    (console or terminal.Console()).print(output)


def plot_accuracy(
    table: Table,
    path: str | PathLike,
    title: str | None = None,
    *,
    groups: Groups = MATHEMATICS_GROUPS,
    intervals: Intervals | None = None,
    measure: str = "accuracy (%)",
) -> None:
    """Grouped bars by language, with the averages to the left, as an image at `path`.

    Args:
        table: {system: {lang: per cent}}.
        path: of the image.
        title: above the bars.
        groups: the task's averages, with its order of languages.
        intervals: drawn as error bars.
        measure: what the bars' heights are.
    """
    header, _ = _cells(table, groups, None)
    names = [*groups, *ordered_languages(table, groups)]
    spots = [place + (0.5 if place >= len(groups) else 0) for place in range(len(names))]
    figure, axes = new_figure(min(14.0, max(6.0, 2 + 0.16 * len(spots) * (len(table) + 1))), 4.4)
    for place, (system, scores) in enumerate(table.items()):
        values: dict[str, float | None] = {**scores, **summarize(scores, groups)}
        bars = [(spot, name, values.get(name)) for spot, name in zip(spots, names, strict=True)]
        drawn = [(spot, name, value) for spot, name, value in bars if value is not None]
        heights = [value for *_, value in drawn]
        middles, _ = draw_bars(axes, [spot for spot, *_ in drawn], heights, place, len(table), system)
        ends = (intervals or {}).get(system, {})
        for middle, (_, name, value) in zip(middles, drawn, strict=True):
            if name in ends:
                low, high = ends[name]
                # An interval of the draws need not hold the score itself.
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar([middle], [value], yerr=error, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=1.5)
    axes.set_xticks(spots, header[1:])
    axes.axvline(len(groups) - 0.25, color="0.6", linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_ylim(0, 100)
    axes.set_ylabel(measure)
    footnote = " ".join(_footnote(table, groups, intervals)).strip()
    axes.set_xlabel(textwrap.fill(footnote, int(13 * figure.get_figwidth())), fontsize="small")
    axes.set_title(textwrap.fill(title or "Accuracy by language", int(9 * figure.get_figwidth())))
    draw_bar_grid(axes)
    figure.legend(loc="outside lower center", ncols=min(len(table), 4), frameon=False)
    save_figure(figure, path)


def plot_losses(
    histories: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: str | PathLike, title: str | None = None
) -> None:
    """Training loss by step, one panel per stage, one line per system.

    Args:
        histories: {system: {stage: [{"step": int, "loss": float, ...}, ...]}}; entries without a loss are passed over,
            an "eval_loss" is drawn dashed.
        path: of the image.
        title: above the panels.

    Raises:
        ValueError: no stage has an entry.
    """
    stages = list(dict.fromkeys(stage for history in histories.values() for stage in history if history[stage]))
    if not stages:
        raise ValueError("histories: got no stage with an entry")
    figure, panels = new_figure(5.2 * len(stages), 4.0, len(stages))
    for stage, axes in zip(stages, panels, strict=True):
        for place, (system, history) in enumerate(histories.items()):
            colour = COLOURS[place % len(COLOURS)]
            for field, style, suffix in (("loss", "-", ""), ("eval_loss", "--", " (held out)")):
                points = [(entry["step"], entry[field]) for entry in history.get(stage, ()) if field in entry]
                if points:
                    marks = {"marker": MARKERS[place % len(MARKERS)], "markevery": max(1, len(points) // 12)}
                    steps, losses = zip(*points, strict=True)
                    axes.plot(steps, losses, style, color=colour, label=system + suffix, linewidth=1.2, **marks)
        axes.set_title(f"{stage} stage")
        axes.set_xlabel("optimizer step")
        axes.set_ylim(bottom=0)
        axes.grid(color=GRID)
        axes.legend(frameon=False)
    panels[0].set_ylabel("loss (nats per target token)")
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def plot_gates(
    gates: Mapping[str, Any],
    path: Files,
    title: str | None = None,
    *,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Gate values by LLM layer.

    Args:
        gates: {system: (L,) or (L, H) numbers}, of H per layer the mean and the range.
        path: see `figures.save_figure`.
        title: above them.
        layers: {system: its L fused layers}; None: the first L.
    """
    figure, axes = new_figure(6.0, 3.8)
    fused: set[int] = set()
    for place, (system, values) in enumerate(gates.items()):
        rows = [row if isinstance(row, list) else [row] for row in _as_list(values)]
        own = list(range(len(rows)) if layers is None else layers[system])
        fused |= set(own)
        colour = COLOURS[place % len(COLOURS)]
        means = [sum(row) / len(row) for row in rows]
        axes.plot(own, means, color=colour, marker=MARKERS[place % len(MARKERS)], label=figures.in_lines(system))
        if any(len(row) > 1 for row in rows):
            axes.fill_between(own, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.2)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xticks(sorted(fused)[:: -(-len(fused) // 16)])
    axes.set_xlabel("LLM layer")
    axes.set_ylabel("gate")
    axes.set_title(title or "Gates by layer")
    axes.grid(color=GRID)
    if len(gates) > 1:
        figures.legend_below(figure, axes)
    save_figure(figure, path)


def _cells(table: Table, groups: Groups, intervals: Intervals | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text; a star marks an average that lacks some of its languages."""
    if not table:
        raise ValueError("table: got no system")
    languages = ordered_languages(table, groups)
    rows = []
    for system, scores in table.items():
        ends = (intervals or {}).get(system, {})
        values: dict[str, float | None] = {**scores, **summarize(scores, groups)}
        rows.append([system, *[_cell(values.get(name), ends.get(name)) for name in (*groups, *languages)]])
    star = "" if set(groups["avg"]) <= set(languages) else "*"
    return ["system", *[AVERAGES.get(name, name) + star for name in groups], *languages], rows


def _cell(value: float | None, ends: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if ends is None else f"{value:.1f} ±{(ends[1] - ends[0]) / 2:.1f}"


def _footnote(table: Table, groups: Groups, intervals: Intervals | None) -> list[str]:
    languages = ordered_languages(table, groups)
    notes = []
    if not set(groups["avg"]) <= set(languages):
        every = "the paper's ten" if groups["avg"] == PAPER_LANGUAGES else f"all {len(groups['avg'])}"
        notes.append(f"* over the languages shown, not {every}.")
    if others := [lang for lang in languages if lang not in groups["avg"]]:
        notes.append(f"{', '.join(others)}: in no average, as in the paper.")
    if any((intervals or {}).values()):
        notes.append("±: half the width of a 95 % interval over draws of the questions.")
    return ["", *notes] if notes else []


def _as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)
