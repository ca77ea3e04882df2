"""What the project's figures and Markdown tables share. matplotlib is loaded when the first figure is made; none needs a display."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from math import ceil
from os import PathLike
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from layalign.fonts import choose_fonts, legible
from layalign.kernels.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a figure is written: a file, whose name says of which kind, or several.
Files = str | PathLike | Sequence[str | PathLike]

# Okabe and Ito's palette, told apart by readers with any common colour vision; hatches serve print in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
# For figures with more names than that: its first seven, and five of Tol's.
MANY_COLOURS = (*COLOURS[:7], "#999933", "#882255", "#44AA99", "#BBBBBB", "#332288")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
GRID = "0.9"
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # arguments of a legend to the right of its axes


def new_figure(
    width: float, height: float, panels: int | None = None, columns: int | None = None
) -> tuple[Figure, Any]:
    """A figure outside pyplot, laid out so that nothing overlaps.

    Args:
        width, height: in inches.
        panels: how many axes; None for a single one.
        columns: panels a row; None for all in one.

    Returns:
        The figure and its axes: one, or with `panels` a list of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    count = panels or 1
    columns = min(count, columns or count)
    axes = figure.subplots(ceil(count / columns), columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count] if panels else axes[0]


def save_figure(figure: Figure, path: Files, dpi: int = 150) -> None:
    """Write the figure as an image, or as several of different kinds; folders that are missing are made. The same figure gives the same
    bytes again.
    """
    from matplotlib import rc_context

    choose_fonts(figure)
    for file in [path] if isinstance(path, (str, PathLike)) else path:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        vector: dict[str, Any] = {"metadata": {"Date": None}} if Path(file).suffix == ".svg" else {}
        with rc_context({"svg.hashsalt": "layalign"}):
            figure.savefig(file, dpi=dpi, **vector)
        figure.set_layout_engine("none")  # it is laid out now, which takes as long as drawing it


def write_csv(path: str | PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a figure's data as UTF-8, every digit of its numbers."""
    with whole_file(path) as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_bars(
    axes: Axes,
    spots: Iterable[float],
    values: Sequence[float],
    place: int,
    count: int,
    label: str,
    colour: str | None = None,
) -> tuple[list[float], float]:
    """Draw one series of grouped bars.

    Args:
        axes: where to draw.
        spots: middles of the groups that have a bar of this series.
        values: the bars' heights, one a spot.
        place, count: which series this is, from 0, of how many side by side in a group.
        label: the series' name in the legend.
        colour: of plain bars; None for the palette's colour and hatch of that place.

    Returns:
        The bars' middles, and their width.
    """
    width = 0.84 / count
    middles = [spot + (place - (count - 1) / 2) * width for spot in spots]
    style: dict[str, Any] = {"color": colour}
    if colour is None:
        hatch = HATCHES[(place + place // len(COLOURS)) % len(HATCHES)]
        style = {"color": COLOURS[place % len(COLOURS)], "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
    axes.bar(middles, values, width, label=label, **style)
    return middles, width


def in_lines(name: str, width: int = 44) -> str:
    """A name for a legend, legible, in two lines of so many letters at most."""
    return legible(fill(name, width, max_lines=2, placeholder=" ..."))


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of some axes below all of a figure, which grows by what it takes: inside, long names would leave no room."""
    handles, labels = axes.get_legend_handles_labels()
    # In inches: a mark with the room about it, and a letter; then a line.
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, int(figure.get_figwidth() / (0.75 + 0.09 * longest)))
    lines = ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.22 * (lines - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def draw_bar_grid(axes: Axes) -> None:
    """Horizontal lines behind the bars."""
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> list[str]:
    """Lines of a Markdown table.

    Args:
        header: the columns' names.
        rows: cells of text, as many a row as there are columns.
        align: "l" or "r" for each column from the left; the last letter holds for all columns that follow.
    """
    letters = align.ljust(len(header), align[-1])[: len(header)]
    rule = ["---:" if letter == "r" else "---" for letter in letters]
    return [markdown_row(cells) for cells in (header, rule, *rows)]


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table; bars inside a cell are escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
