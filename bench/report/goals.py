"""The goals that a machine's rows speak to: each with its formula, what was predicted and measured, and whether that meets it.

Those of a GPU are the ones that matter; a CPU has two of its own. Cases are found by the names that the suites give them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.results import Compiled, Failure, Results, Row, compiled_kernels
from layalign.figures import markdown_table

PREDICTED = Path(__file__).parents[1] / "results" / "predicted.json"  # `python -m bench predicted`
PREDICTED_FOR = "H200"
SPILLS, HOST_COST = "spills", "host_cost"  # no case of theirs is of one kind of machine
UNITS = {"x": "{:.2f}x", "%": "{:.0%}", "us": "{:.1f} us", "B": "{:.0f} B"}
SHOWN = 160  # characters of a reason; the whole stands beside the rows
Figure = Callable[[Row, "Rows"], "float | None"]


class Rows:
    """Rows and failures by suite, name of the case and implementation, from the names of their tests."""

    def __init__(self, results: Results):
        self.rows = {_place(row.fullname): row for row in results.rows}
        self.failures = {_place(failure.fullname): failure for failure in results.failures}

    def row(self, test: str, case: str, implementation: str) -> Row | None:
        """The row of a test's case, if there is one."""
        return self.rows.get((test, case, implementation))

    def failure(self, test: str, case: str, implementation: str) -> Failure | None:
        """Why that row has no figure, if it was tried."""
        return self.failures.get((test, case, implementation))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line: the figure of one row, and its bound.

    number: of the goal; several lines may share it. test, case, implementation: the row, by the names in its test's. figure: of
    that row. least: whether the bound is the least that meets it, else the most. unit: "x" or "%". peers: whose rows belong to it.
    """

    number: int
    what: str
    test: str
    case: str
    implementation: str
    bound: float
    figure: Figure
    least: bool = False
    unit: str = "x"
    peers: Sequence[str] = ()
    predicted: str | None = None

    def written(self, value: float) -> str:
        """A figure of this goal."""
        return UNITS[self.unit].format(value)

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'>=' if self.least else '<='} {self.written(self.bound)}"


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured. why: there is no figure. lacking: what belongs to the comparison and has no row. rehearsed: at
    the sizes of --small. predicted: by the static model, None where it says nothing."""

    goal: Goal
    value: float | None
    why: str | None = None
    lacking: Sequence[str] = ()
    rehearsed: bool = False
    predicted: float | None = None

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.goal.bound if self.goal.least else self.value <= self.goal.bound

    @property
    def verdict(self) -> str:
        """In a word, or the reason."""
        if self.met is None:
            return f"no figure: {self.why}"
        if self.rehearsed:
            return "rehearsed: says nothing"
        return ("met" if self.met else "**not met**") + (
            f" (without {', '.join(self.lacking)})" if self.lacking else ""
        )


def outcomes(results: Results) -> list[Outcome]:
    """Of the goals of the kinds of machine that the rows, or rows that failed, are of; of a machine without any, none."""
    kinds = {case[:3] for _, case, _ in map(_place, _fullnames(results))} & {"cpu", "gpu"}
    rows, predicted, compiled = Rows(results), predictions(), compiled_kernels(results)
    found = []
    for goal in GOALS:
        if goal.test == SPILLS and (results.on_gpu or compiled is not None):
            found.append(_of_spills(goal, compiled))
        elif (goal.test == HOST_COST and kinds) or goal.case[:3] in kinds:
            found.append(_outcome(goal, rows, predicted))
    return found


def goal_table(results: Results) -> list[str]:
    """Lines of Markdown; those without a figure say why."""
    found = outcomes(results)
    with_predictions = any(one.predicted is not None for one in found)
    lines = []
    for one in found:
        predicted, measured = ("" if x is None else one.goal.written(x) for x in (one.predicted, one.value))
        cells = [predicted, measured] if with_predictions else [measured]
        lines.append([str(one.goal.number), one.goal.what, one.goal.wanted, *cells, one.verdict])
    heads = [f"predicted ({PREDICTED_FOR})", "measured"] if with_predictions else ["measured"]
    return markdown_table(["goal", "what", "wanted", *heads, ""], lines) if lines else []


def predictions() -> Mapping[str, float]:
    """{title: ratio, or share} of the present kernels by the static model; {} where none are kept."""
    if not PREDICTED.exists():
        return {}
    rows = json.loads(PREDICTED.read_text(encoding="utf-8"))["after"]["rows"]
    return {title: row["value"] for title, row in rows.items()}


def _of_spills(goal: Goal, compiled: Compiled | None) -> Outcome:
    if compiled is None or not compiled.kernels:
        why = compiled.note if compiled is not None and compiled.note else "not compiled"
        return Outcome(goal, None, why)
    broken = [f"{compiled.without_figures} that did not compile"] if compiled.without_figures else []
    cut = [] if compiled.whole else ["those that were not reached"]
    return Outcome(goal, float(compiled.spill_bytes), lacking=[*broken, *cut])


def _outcome(goal, rows, predicted):
    place, expected = (goal.test, goal.case, goal.implementation), predicted.get(goal.predicted)
    if (row := rows.row(*place)) is not None:
        value = goal.figure(row, rows)
        lacking = [peer for peer in goal.peers if rows.row(goal.test, goal.case, peer) is None]
        why = None if value is not None else "what it is compared with has none"
        return Outcome(goal, value, why, lacking, row.small, expected)
    failure = rows.failure(*place)
    why = failure.error[:SHOWN] if failure is not None else "not measured"
    return Outcome(goal, None, why, predicted=expected)


def _fullnames(results):
    return [one.fullname for one in (*results.rows, *results.failures)]


def _place(fullname):
    """(test, case, implementation) of a test's name, whatever the order of its parameters."""
    found = re.search(r"::test_(\w+)\[(.*)\]$", fullname)
    if found is None:
        return fullname, "", ""
    test, words = found[1], found[2].split("-")
    case = next((word for word in words if re.match(r"(cpu|gpu)(_|$)", word)), "")
    others = [word for word in words if word != case]
    if others and test in ("layer_mix", "stream_linear"):  # direction, and of the latter which weights
        case = " ".join([case, *others[:-1]])
    elif others and test == "folding":
        case = f"{case} {others[0]}"
    return test, case, others[-1] if others else ""


def _ratio(row: Row, rows: Rows) -> float | None:
    return row.ratio


def _inverse(row: Row, rows: Rows) -> float | None:
    return None if row.ratio is None else 1 / row.ratio


def _microseconds(row: Row, rows: Rows) -> float | None:
    return row.figures.get("microseconds_above_least")


def _named(name: str) -> Figure:
    return lambda row, rows: row.figures.get(name)


def _over(test: str, case: str, other: str) -> Figure:
    """Ratio to a row that is not the yardstick, through the yardstick."""

    def figure(row, rows):
        theirs = rows.row(test, case, other)
        return None if theirs is None or not theirs.ratio or row.ratio is None else row.ratio / theirs.ratio

    return figure


def _model() -> Iterable[Goal]:
    step, generated = {"test": "training_step"}, {"test": "generation"}
    ours = {"implementation": "layalign"}
    for name in ("llama_2_7b", "llama_3_8b"):
        what = f"training step, {name} / bare LLM"
        yield Goal(number=1, what=what, case=f"gpu_{name}", bound=1.10, figure=_ratio, **step, **ours)
    yield Goal(number=1, what="training step / bare LLM", case="cpu", bound=1.08, figure=_ratio, **step, **ours)
    for name in ("llama_2_7b_1", "llama_2_7b_8", "llama_2_7b_32", "llama_3_8b"):
        what, case = f"generation, {name} / bare LLM", f"gpu_{name}"
        yield Goal(number=2, what=what, case=case, bound=1.05, figure=_ratio, **generated, **ours)
        static = {"figure": _over("generation", case, "bare static"), "implementation": "layalign static"}
        yield Goal(number=2, what=f"{what}, static caches", case=case, bound=1.05, **generated, **static)
    yield Goal(number=2, what="generation / bare LLM", case="cpu", bound=1.04, figure=_ratio, **generated, **ours)
    for name in ("llama_2_7b", "llama_3_8b"):
        what = f"peak memory of a training step, {name} / published"
        peak = {"figure": _named("peak_over_published"), "bound": 0.5}
        yield Goal(number=8, what=what, case=f"gpu_{name}", **peak, **step, **ours)
    peak = {"figure": _named("peak_over_published"), "bound": 0.5}
    yield Goal(number=8, what="peak memory of a training step / published", case="cpu_memory", **peak, **step, **ours)


def _attention() -> Iterable[Goal]:
    over = {"figure": _named("time_over_best_two_calls"), "implementation": "triton", "peers": ("sdpa cudnn", "flex")}
    for case, name, bound, predicted in (
        ("a_mha", "(a) MHA", 0.70, "(a) forward, MHA"),
        ("a_gqa", "(a) GQA", 0.70, "(a) forward, GQA 8"),
        ("b_mha", "(b)", 0.90, "(b) forward, MHA"),
    ):
        what = f"attention forward, {name} / best two calls"
        yield Goal(number=3, what=what, test="forward", case=f"gpu_{case}", bound=bound, predicted=predicted, **over)
    backward = {"test": "forward_and_backward", "case": "gpu_b_mha", "bound": 0.90}
    backward["predicted"] = "(b) forward + backward, MHA"
    yield Goal(number=4, what="attention forward + backward, (b) / best two calls", **backward, **over)
    for heads, predicted in (("gqa", "(c) decode, GQA 8"), ("mha", "(c) decode, MHA")):
        case = {"test": "decode", "case": f"gpu_c_{heads}", "bound": 0.80}
        two = {"predicted": f"{predicted}: of two calls", **over}
        yield Goal(number=5, what=f"decode, (c) {heads.upper()} / best two calls", **case, **two)
        share = {"figure": _named("share_of_floor"), "implementation": "triton", "least": True, "unit": "%"}
        share["predicted"] = f"{predicted}: of the bandwidth"
        yield Goal(number=5, what=f"decode, (c) {heads.upper()}: of copy bandwidth", **case, **share)


def _aligner() -> Iterable[Goal]:
    ours = {"implementation": "triton", "figure": _inverse, "least": True, "unit": "%"}
    for direction, bound, title in (("forward", 0.85, "mix forward"), ("backward", 0.75, "mix backward, weights")):
        what = f"layer_mix {direction}: of copy bandwidth"
        case = {"test": "layer_mix", "case": f"gpu {direction}"}
        yield Goal(number=6, what=what, bound=bound, predicted=title, **case, **ours)
    products = {"shared": "product, one weight 4096 x 2048", "per_stream": "product, folded, MHA 4096 x 2048"}
    for direction in ("forward", "backward"):
        for weights in ("shared", "per_stream"):
            what = f"stream_linear {direction}, weights {weights}: of cuBLAS"
            case = f"gpu {direction} {weights}"
            title = products[weights] if direction == "forward" else None
            yield Goal(number=7, what=what, test="stream_linear", case=case, bound=0.95, predicted=title, **ours)
    for heads, bound in (("mha", 0.36), ("gqa", 0.19)):
        folded = {"implementation": "folded before", "figure": _ratio, "case": f"gpu_{heads} triton"}
        what = f"aligner folded / unfolded, {heads.upper()}"
        yield Goal(number=7, what=what, test="folding", bound=bound, **folded)


def _without_a_gpu() -> Iterable[Goal]:
    spilled = "registers spilled, all kernels compiled for this GPU"
    yield Goal(
        number=9,
        what=spilled,
        test=SPILLS,
        case="",
        implementation="",
        bound=0,
        figure=lambda row, rows: None,
        unit="B",
    )
    above = {"test": HOST_COST, "case": "", "unit": "us", "figure": _microseconds}
    for call, bound in (("decode", 10), ("forward", 15), ("backward", 30)):
        for name in (call, f"{call}, masks"):
            what = f"host cost of a call above an empty launch: {name}"
            yield Goal(number=10, what=what, implementation=name, bound=bound, **above)


GOALS: Sequence[Goal] = sorted([*_model(), *_attention(), *_aligner(), *_without_a_gpu()], key=lambda goal: goal.number)
