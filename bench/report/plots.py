"""Plots of one machine's results. matplotlib is loaded when the first is drawn, and needs no display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from bench.report.results import Results, Row
from bench.report.tables import in_figures
from layalign.figures import BESIDE, MANY_COLOURS, MARKERS, draw_bar_grid, draw_bars, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = ("S", "N", "T")  # sizes that are lengths, in the order in which a sweep over several is named
ALONE = 6.4  # inches a panel


def draw_all(results: Results, folder: str | Path) -> list[Path]:
    """Write speedup, roofline, memory and tokens .png into `folder`, those that the results have figures for.

    Returns:
        the paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(results.rows)
    written = []
    for name, draw in (("speedup", speedups), ("roofline", rooflines), ("memory", memory), ("tokens", tokens)):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of earlier results, which may have had figures for it
        if (figure := draw(results, colours)) is not None:
            figure.suptitle(f"{results.machine['device']}, {max(row.date for row in results.rows)}")
            save_figure(figure, path, dpi=100)
            written.append(path)
    return written


def speedups(results: Results, colours: dict[str, str]) -> Figure | None:
    """Yardstick's time over each other one's: a panel a sweep, and bars for suites that have none."""
    told = [row for row in results.rows if row.ratio is not None and row.implementation != row.yardstick]
    panels = []
    for suite in dict.fromkeys(row.suite for row in told):
        rows = [row for row in told if row.suite == suite]
        panels += _panels(suite, rows, lambda row: 1 / row.ratio, f"times as fast as {rows[0].yardstick}")
    figure, all_axes = _draw(panels, colours)
    for axes in all_axes:
        axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    return figure


def rooflines(results: Results, colours: dict[str, str]) -> Figure | None:
    """Ours and the yardsticks: useful operations a second by useful operations a byte, under what copies and products
    reached; a panel a dtype."""
    told = [row for row in results.rows if row.ceilings and all(row.work())]
    told = [row for row in told if row.ours or row.implementation == row.yardstick]
    dtypes = list(dict.fromkeys(row.dtype for row in told))
    figure, axes = _figure(len(dtypes))
    for dtype, one in zip(dtypes, axes, strict=True):
        rows = [row for row in told if row.dtype == dtype]
        suites = list(dict.fromkeys(row.suite for row in rows))
        copied, multiplied = (
            median(row.ceilings[name] for row in rows) for name in ("bytes_per_second", "flops_per_second")
        )
        points = [(flops / moved, flops / row.median, row) for row in rows for flops, moved in [row.work()]]
        ridge = multiplied / copied
        ends = [min(ridge, *(x for x, _, _ in points)) / 2, ridge, max(ridge, *(x for x, _, _ in points)) * 2]
        one.plot(ends, [min(x * copied, multiplied) / 1e12 for x in ends], color="0.3")
        for x, y, row in points:
            marker = MARKERS[suites.index(row.suite) % len(MARKERS)]
            one.plot(x, y / 1e12, marker, color=colours[row.implementation], markersize=6, alpha=0.7)
        names = list(dict.fromkeys(row.implementation for row in rows))
        marks = [(name, {"color": colours[name], "marker": "o"}) for name in names]
        marks += [(suite, {"color": "0.3", "marker": MARKERS[i % len(MARKERS)]}) for i, suite in enumerate(suites)]
        for label, style in marks:
            one.plot([], [], linestyle="", label=label, **style)
        one.loglog()
        one.set_xlabel("operations per byte")
        one.set_ylabel("TFLOP/s")
        one.set_title(
            f"{dtype}: {in_figures(copied / 1e9)} GB/s copied, {in_figures(multiplied / 1e12)} TFLOP/s of products",
            fontsize="medium",
        )
        one.legend(frameon=False, fontsize="small", **BESIDE)
    return figure


def memory(results: Results, colours: dict[str, str]) -> Figure | None:
    """Peak bytes of a call, else bytes kept for the backward pass: by size where swept, by system elsewhere."""
    panels = []
    for suite in dict.fromkeys(row.suite for row in results.rows):
        for name, title in (("peak_bytes", "peak of a call"), ("saved_bytes", "kept for the backward pass")):
            rows = [row for row in results.rows if row.suite == suite and name in row.figures]
            panels += _panels(f"{suite}: {title}", rows, lambda row, name=name: row.figures[name] / 1e6, "MB", LENGTHS)
    return _draw(panels, colours)[0]


def tokens(results: Results, colours: dict[str, str]) -> Figure | None:
    """Tokens a second of each system: a panel a suite."""
    told = [row for row in results.rows if "tokens_per_second" in row.figures]
    panels = []
    for suite in dict.fromkeys(row.suite for row in told):
        rows = [row for row in told if row.suite == suite]
        panels.append(Panel(suite, rows, lambda row: row.figures["tokens_per_second"], "tokens a second"))
    return _draw(panels, colours)[0]


class Panel(NamedTuple):
    """What one pair of axes shows. value: of a row, in `unit`; size: what the rows are drawn over as lines, None for bars."""

    title: str
    rows: list[Row]
    value: Callable[[Row], float]
    unit: str
    size: str | None = None


class Sweep(NamedTuple):
    """Rows whose cases differ in one size alone, in its order. size: its name; fixed: text of the others."""

    size: str
    fixed: str
    rows: list[Row]


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Of the rows of one suite: those over three values at least."""
    found = []
    sizes = _independent([row.sizes for row in rows])
    for size in sorted(sizes, key=lambda name: LENGTHS.index(name) if name in LENGTHS else len(LENGTHS)):
        families: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if size in row.sizes:
                fixed = (
                    row.dtype,
                    *(f"{name} {value}" for name, value in row.sizes.items() if name in sizes and name != size),
                )
                families.setdefault(fixed, []).append(row)
        for fixed, family in families.items():
            if len({row.sizes[size] for row in family}) >= 3:
                found.append(Sweep(size, ", ".join(fixed), sorted(family, key=lambda row: row.sizes[size])))
    return found


def _independent(all_sizes):
    """Names of sizes but for those which another one equals throughout: as many keys as queries are one length."""
    names = list(dict.fromkeys(name for sizes in all_sizes for name in sizes))
    columns = {name: [sizes.get(name) for sizes in all_sizes] for name in names}
    return [name for place, name in enumerate(names) if all(columns[name] != columns[other] for other in names[:place])]


def _panels(title, rows, value, unit, sizes=None):
    """A panel for each sweep of the rows, over any size or one of these; one of bars where there is none."""
    swept = [sweep for sweep in sweeps(rows) if sizes is None or sweep.size in sizes]
    if rows and not swept:
        return [Panel(title, rows, value, unit)]
    return [Panel(f"{title} by {one.size}\n{one.fixed}", one.rows, value, unit, one.size) for one in swept]


def _draw(panels, colours):
    """-> figure and axes, as `_figure` gives them."""
    figure, all_axes = _figure(len(panels))
    for panel, axes in zip(panels, all_axes, strict=True):
        draw = _bars if panel.size is None else _lines
        draw(axes, panel, colours)
        axes.set_ylim(bottom=0)
        draw_bar_grid(axes)
        axes.legend(frameon=False, fontsize="small", **BESIDE)
        axes.set_ylabel(panel.unit)
        axes.set_title(panel.title, fontsize="medium")
    return figure, all_axes


def _lines(axes, panel, colours):
    for place, name in enumerate(dict.fromkeys(row.implementation for row in panel.rows)):
        mine = [row for row in panel.rows if row.implementation == name]
        style = {"marker": MARKERS[place % len(MARKERS)], "linewidth": 2.4 if mine[0].ours else 1.2, "markersize": 5}
        style["zorder"] = 3 if mine[0].ours else 2
        points = [[row.sizes[panel.size] for row in mine], [panel.value(row) for row in mine]]
        axes.plot(*points, color=colours[name], label=name, **style)
    ticks = sorted({row.sizes[panel.size] for row in panel.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(panel.size)


def _bars(axes, panel, colours):
    """Groups of bars, a group a case, whose sizes stand below it."""
    cases, names = (
        list(dict.fromkeys(getattr(row, field) for row in panel.rows)) for field in ("case", "implementation")
    )
    for place, name in enumerate(names):
        mine = [row for row in panel.rows if row.implementation == name]
        spots, heights = [cases.index(row.case) for row in mine], [panel.value(row) for row in mine]
        draw_bars(axes, spots, heights, place, len(names), name, colours[name])
    axes.set_xticks(range(len(cases)), [fill(case, 56 // len(cases)) for case in cases], fontsize="x-small")


def _colours(rows):
    """One colour a name in all plots, this library's first; names that meet in a suite have different ones."""
    suites = {}
    for row in sorted(rows, key=lambda row: not row.ours):
        suites.setdefault(row.implementation, set()).add(row.suite)
    colours = {}
    for name, mine in suites.items():
        taken = {colour for other, colour in colours.items() if mine & suites[other]}
        colours[name] = next((colour for colour in MANY_COLOURS if colour not in taken), MANY_COLOURS[-1])
    return colours


def _figure(count):
    """-> figure and its axes, two panels a row; (None, []) without any."""
    if not count:
        return None, []
    columns = min(count, 2)
    return new_figure(ALONE * columns, 3.6 * ceil(count / columns) + 0.5, panels=count, columns=columns)
