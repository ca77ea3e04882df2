"""A table's rows as points: accuracy against the number of trained parameters (the paper's Figure 10, of Table 10)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import floor, log10, prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from layalign.figures import BESIDE, GRID, MANY_COLOURS, MARKERS, new_figure, save_figure, write_csv
from layalign.fonts import legible
from layalign.saving import LLM_FOLDER
from layalign.train.tables.table import COUNTED, WORDS
from layalign.train.tables.text import heading

TRAINED = "trained_millions"
HEADER = ("part", "row", "whose", "trained (M)", "measure", "accuracy (%)")
# From so many times on, between the least and the most parameters, places are by powers of ten.
_FAR = 30


class Point(NamedTuple):
    """A row's figure in a part: published ("paper") or measured ("here")."""

    part: str
    row: str
    whose: str
    millions: float
    measure: str
    accuracy: float


def trained_millions(model: Path) -> float:
    """Trained parameters in a saved model's folder, in millions; an LLM that was trained whole among them."""
    count = 0
    for file in (*model.glob("*.safetensors"), *(model / LLM_FOLDER).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 it is no mapping
                count += prod(weights.get_slice(name).get_shape())
    return count / 1e6


def points(result: Mapping[str, Any]) -> Iterator[Point]:
    """The points of a table.

    Args:
        result: of `make_table`. The accuracy is that of the first column that is one, the average where there is one; rows of which
            either figure is not known are left out.
    """
    for part in result["parts"]:
        columns = part["columns"]
        measures = [column for column in columns if column not in (*COUNTED, *WORDS)]
        if not measures:
            continue
        measure = "avg" if "avg" in measures else measures[0]
        for row in part["rows"]:
            published, measured = (
                dict(zip(columns, row[key] or (), strict=False)) for key in ("published", "measured")
            )
            found = {"paper": published, "here": {TRAINED: row.get(TRAINED)} | measured}
            for whose, figures in found.items():
                millions, accuracy = figures.get(TRAINED), figures.get(measure)
                if millions is not None and accuracy is not None:
                    yield Point(part["name"], row["name"], whose, millions, measure, accuracy)


def write_figure(result: Mapping[str, Any], stem: Path) -> bool:
    """Write a table's figure as PNG and SVG, and its points as CSV; without points, remove what an earlier call wrote. -> whether there
    are points.

    Args:
        result: of `make_table`.
        stem: the files' path, without what says of which kind they are.
    """
    found = list(points(result))
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg", "csv")]
    if not found:
        for file in files:
            file.unlink(missing_ok=True)
        return False
    parts = list(dict.fromkeys(point.part for point in found))
    places = {row: place for place, row in enumerate(dict.fromkeys(point.row for point in found))}
    figure, panels = new_figure(5.2 * len(parts) + 2.4, 4.2, len(parts))
    for axes, part in zip(panels, parts, strict=True):
        own = [point for point in found if point.part == part]
        for point in own:
            colour = MANY_COLOURS[places[point.row] % len(MANY_COLOURS)]
            face = colour if point.whose == "here" else "none"
            mark = {"marker": MARKERS[places[point.row] % len(MARKERS)], "color": colour, "markerfacecolor": face}
            axes.plot([point.millions], [point.accuracy], linestyle="none", markersize=8, **mark)
        counts = [point.millions for point in own]
        above = [count for count in counts if count]
        if above and max(above) > _FAR * min(above):
            least = 10.0 ** floor(log10(min(above)))
            axes.set_xscale("symlog", linthresh=least) if 0 in counts else axes.set_xscale("log")
        axes.set_xlabel("trained parameters (M)")
        axes.set_ylabel(f"{heading(own[0].measure)} (%)")
        axes.set_title(part if len(parts) > 1 else "")
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.margins(0.12)
    for row, place in places.items():
        mark = {"marker": MARKERS[place % len(MARKERS)], "color": MANY_COLOURS[place % len(MANY_COLOURS)]}
        panels[-1].plot([], [], linestyle="none", markersize=8, label=legible(row), **mark)
    for whose, face in (("here", "0.4"), ("paper", "none")):
        if any(point.whose == whose for point in found):
            name = {"here": "filled: measured here", "paper": "hollow: published"}[whose]
            panels[-1].plot([], [], "o", color="0.4", markerfacecolor=face, markersize=8, label=name)
    panels[-1].legend(frameon=False, **BESIDE)
    figure.suptitle(f"Table {result['table']}: {result['title']}")
    save_figure(figure, files[:2])
    write_csv(files[2], HEADER, found)
    return True
