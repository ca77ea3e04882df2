"""Plots of one machine's results. matplotlib is loaded when the first is drawn, and needs no display."""

from math import ceil
from pathlib import Path
from statistics import median
from textwrap import fill

from .tables import in_figures

# Okabe and Ito's palette, told apart by readers with any common colour vision, and four of Tol's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999933")
COLOURS += ("#882255", "#44AA99", "#BBBBBB", "#332288")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
LENGTHS = ("S", "N", "T")  # sizes that are lengths, in the order in which a sweep over several is named
ALONE = 6.4  # inches a panel


def draw_all(results, folder):
    """Write speedup, roofline, memory and tokens .png into `folder`, those that the results have figures for. -> paths"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(results.rows)
    written = []
    for name, draw in (("speedup", speedups), ("roofline", rooflines), ("memory", memory), ("tokens", tokens)):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # of earlier results, which may have had figures for it
        if (figure := draw(results, colours)) is not None:
            figure.suptitle(f"{results.machine['device']}, {max(row.date for row in results.rows)}")
            figure.savefig(path, dpi=100)
            written.append(path)
    return written


def speedups(results, colours):
    """Yardstick's time over each other one's: a panel a sweep, and bars for suites that have none."""
    told = [row for row in results.rows if row.ratio is not None and row.implementation != row.yardstick]
    panels = []
    for suite in dict.fromkeys(row.suite for row in told):
        rows = [row for row in told if row.suite == suite]
        found = sweeps(rows)
        for size, fixed, family in found:
            panels.append((_lines, family, size, f"{suite} by {size}\n{fixed}"))
        if not found:
            panels.append((_bars, rows, None, suite))
    figure, axes = _panels(len(panels))
    for (draw, rows, size, title), one in zip(panels, axes, strict=True):
        values = {id(row): 1 / row.ratio for row in rows}
        draw(one, rows, size, values, colours)
        one.axhline(1, color="0.4", linewidth=1, linestyle="--")
        one.set_ylabel(f"times as fast as {rows[0].yardstick}")
        one.set_title(title, fontsize="medium")
    return figure


def rooflines(results, colours):
    """Ours and the yardsticks: useful operations a second by useful operations a byte, under what copies and products
    reached; a panel a dtype."""
    told = [row for row in results.rows if row.ceilings and all(row.work())]
    told = [row for row in told if row.ours or row.implementation == row.yardstick]
    dtypes = list(dict.fromkeys(row.dtype for row in told))
    figure, axes = _panels(len(dtypes))
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
        one.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def memory(results, colours):
    """Peak bytes of a call, else bytes kept for the backward pass: by size where swept, by system elsewhere."""
    panels = []
    for suite in dict.fromkeys(row.suite for row in results.rows):
        for figure_name, title in (("peak_bytes", "peak of a call"), ("saved_bytes", "kept for the backward pass")):
            rows = [row for row in results.rows if row.suite == suite and figure_name in row.figures]
            found = [sweep for sweep in sweeps(rows) if sweep[0] in LENGTHS]
            for size, fixed, family in found:
                panels.append((_lines, family, size, figure_name, f"{suite}: {title} by {size}\n{fixed}"))
            if rows and not found:
                panels.append((_bars, rows, None, figure_name, f"{suite}: {title}"))
    figure, axes = _panels(len(panels))
    for (draw, rows, size, figure_name, title), one in zip(panels, axes, strict=True):
        draw(one, rows, size, {id(row): row.figures[figure_name] / 1e6 for row in rows}, colours)
        one.set_ylabel("MB")
        one.set_title(title, fontsize="medium")
    return figure


def tokens(results, colours):
    """Tokens a second of each system: a panel a suite."""
    told = [row for row in results.rows if "tokens_per_second" in row.figures]
    suites = list(dict.fromkeys(row.suite for row in told))
    figure, axes = _panels(len(suites))
    for suite, one in zip(suites, axes, strict=True):
        rows = [row for row in told if row.suite == suite]
        _bars(one, rows, None, {id(row): row.figures["tokens_per_second"] for row in rows}, colours)
        one.set_ylabel("tokens a second")
        one.set_title(suite, fontsize="medium")
    return figure


def sweeps(rows):
    """[(size, text of the other sizes, rows)] of the cases of one suite that differ in one size alone, three at least."""
    found = []
    sizes = _independent([row.sizes for row in rows])
    for size in sorted(sizes, key=lambda name: LENGTHS.index(name) if name in LENGTHS else len(LENGTHS)):
        families = {}
        for row in rows:
            if size in row.sizes:
                fixed = (
                    row.dtype,
                    *(f"{name} {value}" for name, value in row.sizes.items() if name in sizes and name != size),
                )
                families.setdefault(fixed, []).append(row)
        for fixed, family in families.items():
            if len({row.sizes[size] for row in family}) >= 3:
                found.append((size, ", ".join(fixed), sorted(family, key=lambda row: row.sizes[size])))
    return found


def _independent(all_sizes):
    """Names of sizes but for those which another one equals throughout: as many keys as queries are one length."""
    names = list(dict.fromkeys(name for sizes in all_sizes for name in sizes))
    columns = {name: [sizes.get(name) for sizes in all_sizes] for name in names}
    return [name for place, name in enumerate(names) if all(columns[name] != columns[other] for other in names[:place])]


def _lines(axes, rows, size, values, colours):
    for place, name in enumerate(dict.fromkeys(row.implementation for row in rows)):
        mine = [row for row in rows if row.implementation == name]
        style = {"marker": MARKERS[place % len(MARKERS)], "linewidth": 2.4 if mine[0].ours else 1.2, "markersize": 5}
        style["zorder"] = 3 if mine[0].ours else 2
        points = [[row.sizes[size] for row in mine], [values[id(row)] for row in mine]]
        axes.plot(*points, color=colours[name], label=name, **style)
    ticks = sorted({row.sizes[size] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(size)
    _finish(axes)


def _bars(axes, rows, _, values, colours):
    """Groups of bars, a group a case, whose sizes stand below it."""
    cases, names = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("case", "implementation"))
    width = 0.84 / len(names)
    for place, name in enumerate(names):
        mine = [row for row in rows if row.implementation == name]
        spots = [cases.index(row.case) + (place - (len(names) - 1) / 2) * width for row in mine]
        axes.bar(spots, [values[id(row)] for row in mine], width, color=colours[name], label=name)
    axes.set_xticks(range(len(cases)), [fill(case, 56 // len(cases)) for case in cases], fontsize="x-small")
    _finish(axes)


def _finish(axes):
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _colours(rows):
    """One colour a name in all plots, this library's first; names that meet in a suite have different ones."""
    suites = {}
    for row in sorted(rows, key=lambda row: not row.ours):
        suites.setdefault(row.implementation, set()).add(row.suite)
    colours = {}
    for name, mine in suites.items():
        taken = {colour for other, colour in colours.items() if mine & suites[other]}
        colours[name] = next((colour for colour in COLOURS if colour not in taken), COLOURS[-1])
    return colours


def _panels(count):
    """-> figure and its axes, two panels a row; (None, []) without any."""
    if not count:
        return None, []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 2)
    lines = ceil(count / columns)
    figure = Figure(figsize=(ALONE * columns, 3.6 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]
