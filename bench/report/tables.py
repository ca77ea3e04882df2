"""Markdown from results: every figure of one machine, and the README's short tables."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.goals import goal_table
from bench.report.results import Results
from layalign.figures import markdown_table

SUITES = (
    "training step",
    "generation",
    "prefill",
    "attention forward",
    "attention forward and backward",
    "decode",
    "aligner",
    "aligner folded",
    "layer_mix forward",
    "layer_mix backward",
    "stream_linear forward",
    "stream_linear backward",
)
SHORT_SUITES, SHORT_CASES = SUITES[:7], 4  # what the README shows, and cases of each
NOTATION = (
    "B: batch; H: query/key heads of width D; S, N, T: queries, keys, cross keys; L: LLM layers; E: encoder states; De, Dl: "
    "their widths; kv: width of all key heads; tokens of a row: encoder + prompt + target."
)
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLUMNS = {  # figure -> (head of its column, how it is written)
    "time_over_yardstick": ("x yardstick", "{:.2f}".format),
    "teraflops": ("TFLOP/s", lambda value: in_figures(value)),
    "gigabytes_per_second": ("GB/s", lambda value: in_figures(value)),
    "share_of_floor": ("of floor", "{:.0%}".format),
    "peak_bytes": ("peak memory", lambda value: in_bytes(value)),
    "saved_bytes": ("kept for backward", lambda value: in_bytes(value)),
}
UNSHOWN = ("floor_seconds",)


def full_report(results: Results, plots: Sequence[str] = ()) -> str:
    """All rows of one machine: the plots (names of files beside), then a section a suite, a table a case."""
    lines = [f"# {results.machine['device']}", "", described(results), ""]
    lines += [
        "Times are medians over rounds in which all implementations of a case take turns; spread is the interquartile range "
        "over the median; x yardstick is the median of the ratios within rounds, below 1 is faster; the floor is the larger "
        "of operations over the measured product rate and bytes over the measured copy bandwidth.",
    ]
    lines += ["", NOTATION]
    if goals := goal_table(results):
        lines += ["", "## Goals", "", *goals]
    if results.failures:
        failures = (f"- {one.fullname.partition('::')[2] or one.fullname}: {one.error}" for one in results.failures)
        lines += ["", "## Without a figure", "", *failures]
    lines += ["", *(f"![{plot.removesuffix('.png')}]({plot})" for plot in plots)]
    suite = None
    for (name, case), rows in sorted(results.tables().items(), key=lambda table: _place(table[0][0])):
        if name != suite:
            suite = name
            lines += ["", f"## {name}"]
        lines += ["", f"### {case}", "", *_case_table(rows)]
    return "\n".join(lines) + "\n"


def readme_section(all_results: Sequence[Results]) -> str:
    """The markers and what stands between them: what each machine reached, and which suites no GPU has run."""
    lines = [BEGIN]
    for results in sorted(all_results, key=lambda results: not results.on_gpu):
        lines += ["", f"### On {results.machine['device']}", "", described(results), ""]
        lines += [
            f"The yardstick's time, and the others' over it; below 1.00 is faster. In bold: this library. {NOTATION}",
            "",
        ]
        lines += _short_tables(results)
    seen = {row.suite for results in all_results if results.on_gpu for row in results.rows}
    if missing := [suite for suite in SUITES if suite not in seen]:
        lines += ["", f"**No GPU figures yet:** {', '.join(missing)}."]
    return "\n".join([*lines, "", END])


def replace_section(text: str, section: str) -> str:
    """`text` with `section` in place of what its markers enclose.

    Raises:
        ValueError: there is not one pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise ValueError(f"one line {BEGIN} and below it one line {END} are needed, to put results between")
    return before + section + after


def described(results: Results) -> str:
    """Machine, versions, days and commits, in one paragraph; of no row, that nothing was measured."""
    machine = results.machine
    cpu = machine.get("cpu", {}).get("brand_raw") or "processor unknown"
    parts = [f"{cpu}, {machine['cores']} cores, {machine['torch_threads']} threads"]
    if results.on_gpu:
        parts = [f"{machine['device']}, {machine['gpu_memory_bytes'] / 2**30:.0f} GiB"]
        parts += [f"driver {machine['gpu_driver']}"] if "gpu_driver" in machine else []
        parts += [f"at most {machine['gpu_clock_most_mhz']} MHz"] if "gpu_clock_most_mhz" in machine else []
    parts += _versions([row.versions for row in results.rows] or [machine["versions"]])
    parts += [f"Python {machine['python_version']}"] if "python_version" in machine else []
    if not results.rows:
        return f"{'; '.join(parts)}. Not measured: no row has a figure."
    days, commits = sorted({row.date for row in results.rows}), list(dict.fromkeys(row.commit for row in results.rows))
    when = f"{days[0]} to {days[-1]}" if len(days) > 1 else days[0]
    state = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    changed = " (+: with changes not committed)" if any(commit.endswith("+") for commit in commits) else ""
    warning = " **Sizes of `--small`: these figures say nothing.**" if any(row.small for row in results.rows) else ""
    return f"{'; '.join(parts)}. Measured {when}, {state}{changed}.{warning}"


def _versions(found):
    """-> "torch 2.11.0, 2.13.0", ... of what rows were measured with, in their order."""
    names = dict.fromkeys(name for versions in found for name in versions)
    present = {name: dict.fromkeys(versions[name] for versions in found if versions.get(name)) for name in names}
    return [f"{name} {', '.join(versions)}" for name, versions in present.items() if versions]


def in_seconds(value: float) -> str:
    """Three digits with a unit."""
    unit, size = ("s", 1) if value >= 1 else ("ms", 1e-3) if value >= 1e-3 else ("us", 1e-6)
    return f"{_three_digits(value / size)} {unit}"


def in_bytes(value: float) -> str:
    """Three digits with a unit of powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B" if value else "0"


def in_figures(value: float) -> str:
    """Three digits, all of a large number's."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _three_digits(value):
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _place(suite):
    return SUITES.index(suite) if suite in SUITES else len(SUITES)


def _case_table(rows):
    """Columns that no row of the case has are left out; figures without a head of their own come last."""
    present = list(dict.fromkeys(name for row in rows for name in row.figures if name not in UNSHOWN))
    names = [name for name in COLUMNS if name in present] + [name for name in present if name not in COLUMNS]
    heads = [COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ") for name in names]
    heads = [head.replace("yardstick", rows[0].yardstick) for head in heads]
    lines = []
    for row in rows:
        cells = [_cell(name, row.figures.get(name)) for name in names]
        lines.append([_name(row), in_seconds(row.median), f"{row.spread:.1%}", f"{row.rounds}", *cells])
    return markdown_table(["", "median", "spread", "rounds", *heads], lines)


def _name(row):
    return f"**{row.implementation}**" if row.ours else row.implementation


def _cell(name, value):
    if value is None:
        return ""
    write = COLUMNS[name][1] if name in COLUMNS else in_figures if isinstance(value, float) else str
    return write(value)


def _short_tables(results):
    lines, measured = [], {row.suite for row in results.rows}
    for suite in (suite for suite in SHORT_SUITES if suite in measured):
        cases = [rows for (name, _), rows in results.tables().items() if name == suite]
        lines += [*_suite_table(suite, cases[:SHORT_CASES], _time_cell), ""]
        for figure, title in (("peak_bytes", "peak memory"), ("saved_bytes", "kept for the backward pass")):
            told = [rows for rows in cases[:SHORT_CASES] if any(figure in row.figures for row in rows)]
            if told and suite in ("training step", "aligner"):
                lines += [
                    *_suite_table(
                        f"{suite}: {title}", told, lambda row, name=figure: _cell(name, row.figures.get(name))
                    ),
                    "",
                ]
    return [*lines, f"More cases and suites, spreads and plots: `bench/results/{results.kind}/`."]


def _suite_table(title, cases, cell):
    """A line a case, a column an implementation; the yardstick is the first."""
    first = cases[0][0].yardstick
    names = list(dict.fromkeys([first, *(row.implementation for rows in cases for row in rows)]))
    ours = {row.implementation for rows in cases for row in rows if row.ours}
    lines = []
    for rows in cases:
        of = {row.implementation: row for row in rows}
        lines.append([rows[0].case, *(cell(of[name]) if name in of else "" for name in names)])
    return markdown_table([title, *(f"**{name}**" if name in ours else name for name in names)], lines)


def _time_cell(row):
    if row.implementation == row.yardstick or row.ratio is None:
        return in_seconds(row.median)
    return f"{row.ratio:.2f} x"
