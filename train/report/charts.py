"""Charts as SVG inside a page: colours by CSS variables, so that one drawing serves light and dark; text in the page's font."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from layalign.train.report.style import COLOURS

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 250
_LEFT, _TOP, _BOTTOM = 52, 12, 34
_LABEL = 13  # px between direct labels
_MOST_POINTS = 300
_SMOOTH_FROM = 60


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: its direct label.
        points: (x, y) by rising x; y that is no finite number leaves a gap.
        colour: number of a colour variable, from 1; beyond the last they begin again, with dashed lines.
        dots: whether single points are marked: where they are few.
        smooth: whether it is drawn over its means, where points are many and scatter.
    """

    name: str
    points: Points
    colour: int = 1
    dots: bool = False
    smooth: bool = False

    @property
    def classes(self) -> str:
        """Of its path."""
        return f"line s{_hue(self)}" + (" dashed" if self.colour > COLOURS else "")


def line_chart(title: str, unit: str, series: Sequence[Series], log_scale: bool = False) -> str:
    """A figure with its title, and the lines named at their ends. Empty where there is nothing to draw.

    Args:
        title: of the figure.
        unit: of y, said beside the title.
        series: to draw.
        log_scale: logarithmic y, where all values are above 0.
    """
    series = [line for line in series if any(math.isfinite(y) for _, y in line.points)]
    if not series:
        return ""
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(y)]
    ys = [y for _, y in finite]
    log_scale = log_scale and min(ys) > 0 and max(ys) > 3 * min(ys)
    right = 22 + max(7 * len(_short(line.name)) for line in series) if len(series) > 1 else 14
    x_of = _Axis(min(x for x, _ in finite), max(x for x, _ in finite), _LEFT, _WIDTH - right)
    low, high = _padded(min(ys), max(ys), log_scale)
    y_of = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP, log_scale)
    parts = list(_axes(x_of, y_of))
    ends: list[_End] = []
    for line in series:
        parts += _line(line, x_of, y_of)
        x, y = [(x, y) for x, y in _smoothed(line) if math.isfinite(y)][-1]
        ends.append((y_of(y), x_of(x), line))
    if len(series) > 1:
        for place, (y, x, line) in _apart(ends):
            at = _WIDTH - right + 14
            parts.append(f'<path class="leader s{_hue(line)}" d="M{x + 2:.1f} {y:.1f}L{at - 3} {place:.1f}"/>')
            parts.append(
                f'<text class="end c{_hue(line)}" x="{at}" y="{place + 4:.1f}">{escape(_short(line.name))}</text>'
            )
    return _figure(title, unit, "".join(parts), _summary(series))


def heat_map(
    title: str, unit: str, rows: Sequence[str], columns: Sequence[float], values: Sequence[Sequence[float]]
) -> str:
    """A figure of a matrix, one hue by strength: rows by name, columns by step.

    Args:
        title, unit: as of `line_chart`.
        rows: names, from the top.
        columns: steps.
        values: of each row one for each column, 0 or above.
    """
    finite = [value for row in values for value in row if math.isfinite(value)]
    if not finite or not columns:
        return ""
    most = max(finite) or 1.0
    count = min(len(columns), 48)
    chosen = [round(index * (len(columns) - 1) / max(count - 1, 1)) for index in range(count)]
    wide, tall = (_WIDTH - _LEFT - 14) / count, (_HEIGHT - _TOP - _BOTTOM) / len(rows)
    parts = []
    for row, found in enumerate(values):
        for place, column in enumerate(chosen):
            value = found[column]
            if not math.isfinite(value):
                continue
            parts.append(
                f'<rect class="heat" x="{_LEFT + place * wide:.2f}" y="{_TOP + row * tall:.2f}" width="{wide:.2f}" '
                f'height="{tall:.2f}" fill-opacity="{0.04 + 0.96 * value / most:.3f}"/>'
            )
    every = max(1, math.ceil(len(rows) * 14 / (_HEIGHT - _TOP - _BOTTOM)))
    for row in range(0, len(rows), every):
        parts.append(
            f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{_TOP + (row + 0.5) * tall + 4:.1f}">{escape(rows[row])}</text>'
        )
    first, last = columns[0], columns[-1]
    bottom = _HEIGHT - _BOTTOM
    parts.append(f'<text class="tick" x="{_LEFT}" y="{bottom + 16}">{_number(first)}</text>')
    parts.append(f'<text class="tick" text-anchor="end" x="{_WIDTH - 14}" y="{bottom + 16}">{_number(last)}</text>')
    parts.append(
        f'<text class="tick" text-anchor="middle" x="{(_LEFT + _WIDTH - 14) / 2}" y="{bottom + 30}">step</text>'
    )
    summary = (
        f"the strongest {_number(most)}, row {rows[max(range(len(rows)), key=lambda row: values[row][-1])]} at the end"
    )
    return _figure(title, f"{unit}; full colour is {_number(most)}", "".join(parts), summary)


# Where a line ends, y and x, and the line.
_End = tuple[float, float, Series]


class _Axis:
    """From a value to its place."""

    def __init__(self, low, high, start, end, log_scale=False):
        self.low, self.high, self.start, self.end, self.log_scale = low, high, start, end, log_scale
        if self.low == self.high:
            self.high = self.low + 1

    def __call__(self, value):
        low, high = self.low, self.high
        if self.log_scale:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count):
        if self.log_scale:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(exponents) > 3 else (1, 2, 5)
            found = [step * 10.0**exponent for exponent in exponents for step in steps]
        else:
            rough = (self.high - self.low) / count
            scale = 10 ** math.floor(math.log10(rough))
            step = scale * next(nice for nice in (1, 2, 5, 10) if nice * scale >= rough)
            first = math.ceil(self.low / step - 1e-9)
            found = [(first + index) * step for index in range(count + 3)]
        return [tick for tick in found if self.low - 1e-12 <= tick <= self.high * (1 + 1e-12) + 1e-300]


def _axes(x_of: _Axis, y_of: _Axis) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for tick in y_of.ticks(4):
        place = y_of(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{x_of.end}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{place + 4:.1f}">{_number(tick)}</text>'
    ticks = [tick for tick in x_of.ticks(4) if tick == int(tick)] or [x_of.low]
    for tick in ticks:
        yield f'<text class="tick" text-anchor="middle" x="{x_of(tick):.1f}" y="{bottom + 16}">{_number(tick)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{x_of.end}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text class="tick" text-anchor="middle" x="{(_LEFT + x_of.end) / 2:.0f}" y="{bottom + 30}">step</text>'


def _line(line: Series, x_of: _Axis, y_of: _Axis) -> list[str]:
    smoothed = _smoothed(line)
    parts = []
    if smoothed is not line.points:
        parts.append(f'<path class="{line.classes} faint" d="{_path(line.points, x_of, y_of)}"/>')
    parts.append(f'<path class="{line.classes}" d="{_path(smoothed, x_of, y_of)}"/>')
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    if line.dots or len(finite) == 1:
        parts += [f'<circle class="f{_hue(line)}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5"/>' for x, y in finite]
    return parts


def _path(points: Points, x_of: _Axis, y_of: _Axis) -> str:
    step = max(1, math.ceil(len(points) / _MOST_POINTS))
    thinned = [*points[::step], *points[-1:]] if step > 1 else points
    commands, pen = [], "M"
    for x, y in thinned:
        if not math.isfinite(y):
            pen = "M"
            continue
        commands.append(f"{pen}{x_of(x):.1f} {y_of(y):.1f}")
        pen = "L"
    return "".join(commands)


def _hue(line: Series) -> int:
    return (line.colour - 1) % COLOURS + 1


def _smoothed(line: Series) -> Points:
    """Means over neighbours where there are many points."""
    points = line.points
    if not line.smooth or len(points) < _SMOOTH_FROM:
        return points
    half = max(2, len(points) // 50)
    smoothed = []
    for index, (x, y) in enumerate(points):
        near = [value for _, value in points[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        smoothed.append((x, sum(near) / len(near) if math.isfinite(y) and near else math.nan))
    return smoothed


def _apart(ends: list[_End]) -> list[tuple[float, _End]]:
    """Places of direct labels, from the top, none on another and none below the axis."""
    ends = sorted(ends, key=lambda end: end[0])
    places: list[float] = []
    for place, *_ in ends:
        places.append(max(place, places[-1] + _LABEL) if places else place)
    bottom = float(_HEIGHT - _BOTTOM)
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], bottom)
        bottom = places[index] - _LABEL
    return list(zip(places, ends, strict=True))


def _padded(low: float, high: float, log_scale: bool) -> tuple[float, float]:
    if log_scale:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.2 * high else low - room), high + room


def _figure(title: str, unit: str, drawing: str, summary: str) -> str:
    said = escape(f"{title}: {summary}", quote=True)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">{drawing}</svg></figure>'
    )


def _summary(series: Sequence[Series]) -> str:
    parts = []
    for line in series:
        finite = [y for _, y in line.points if math.isfinite(y)]
        parts.append(f"{line.name} from {_number(finite[0])} to {_number(finite[-1])}")
    return ", ".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _number(value: float) -> str:
    """A figure for an axis."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g} M"
    if size >= 1e4:
        return f"{value / 1e3:.3g} k"
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}"
