"""The goals that a machine's rows speak to: each with its formula, what was measured, and whether that meets it.

Those of a GPU are the ones that matter; a CPU has two of its own. Cases are found by the names that the suites give them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.report.results import Failure, Results, Row
from layalign.figures import markdown_table

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

    def written(self, value: float) -> str:
        """A figure of this goal."""
        return f"{value:.2f}x" if self.unit == "x" else f"{value:.0%}"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'>=' if self.least else '<='} {self.written(self.bound)}"


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured. why: there is no figure. lacking: peers that belong to the comparison, without a row.
    rehearsed: at the sizes of --small."""

    goal: Goal
    value: float | None
    why: str | None = None
    lacking: Sequence[str] = ()
    rehearsed: bool = False

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
    kinds = {case[:3] for _, case, _ in map(_place, _fullnames(results))}
    rows = Rows(results)
    return [_outcome(goal, rows) for goal in GOALS if goal.case[:3] in kinds]


def goal_table(results: Results) -> list[str]:
    """Lines of Markdown; those without a figure say why."""
    lines = []
    for one in outcomes(results):
        measured = "" if one.value is None else one.goal.written(one.value)
        lines.append([str(one.goal.number), one.goal.what, one.goal.wanted, measured, one.verdict])
    return markdown_table(["goal", "what", "wanted", "measured", ""], lines) if lines else []


def _outcome(goal, rows):
    place = (goal.test, goal.case, goal.implementation)
    if (row := rows.row(*place)) is not None:
        value = goal.figure(row, rows)
        lacking = [peer for peer in goal.peers if rows.row(goal.test, goal.case, peer) is None]
        why = None if value is not None else "what it is compared with has none"
        return Outcome(goal, value, why, lacking, row.small)
    failure = rows.failure(*place)
    return Outcome(goal, None, failure.error[:SHOWN] if failure is not None else "not measured")


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
    for case, name, bound in (("a_mha", "(a) MHA", 0.70), ("a_gqa", "(a) GQA", 0.70), ("b_mha", "(b)", 0.90)):
        what = f"attention forward, {name} / best two calls"
        yield Goal(number=3, what=what, test="forward", case=f"gpu_{case}", bound=bound, **over)
    backward = {"test": "forward_and_backward", "case": "gpu_b_mha", "bound": 0.90}
    yield Goal(number=4, what="attention forward + backward, (b) / best two calls", **backward, **over)
    for heads in ("gqa", "mha"):
        case = {"test": "decode", "case": f"gpu_c_{heads}", "bound": 0.80}
        yield Goal(number=5, what=f"decode, (c) {heads.upper()} / best two calls", **case, **over)
        share = {"figure": _named("share_of_floor"), "implementation": "triton", "least": True, "unit": "%"}
        yield Goal(number=5, what=f"decode, (c) {heads.upper()}: of copy bandwidth", **case, **share)


def _aligner() -> Iterable[Goal]:
    ours = {"implementation": "triton", "figure": _inverse, "least": True, "unit": "%"}
    for direction, bound in (("forward", 0.85), ("backward", 0.75)):
        what = f"layer_mix {direction}: of copy bandwidth"
        yield Goal(number=6, what=what, test="layer_mix", case=f"gpu {direction}", bound=bound, **ours)
    for direction in ("forward", "backward"):
        for weights in ("shared", "per_stream"):
            what = f"stream_linear {direction}, weights {weights}: of cuBLAS"
            case = f"gpu {direction} {weights}"
            yield Goal(number=7, what=what, test="stream_linear", case=case, bound=0.95, **ours)
    for heads, bound in (("mha", 0.36), ("gqa", 0.19)):
        folded = {"implementation": "folded before", "figure": _ratio, "case": f"gpu_{heads} triton"}
        what = f"aligner folded / unfolded, {heads.upper()}"
        yield Goal(number=7, what=what, test="folding", bound=bound, **folded)


GOALS: Sequence[Goal] = sorted([*_model(), *_attention(), *_aligner()], key=lambda goal: goal.number)
