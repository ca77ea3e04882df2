"""What the suites of the fused attention share: this library's backends beside all peers, measured on one case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bench import attempts
from bench.cases.attention import AttentionCase, exact_results, results_of
from bench.clocks import DeviceClock
from bench.measuring import Effort, Measurement, Missing, Table, by_backend, measure, tried
from bench.peers import peers_of
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

OURS = ("triton", "torch")
FP32_ROUNDINGS = 20  # PyTorch's fused attention on a CPU takes an exp of so many ulp, as the tests' oracle allows
YARDSTICK = "two calls"
PUBLISHED = ("published eager", "published sdpa")
COMPILED = ("flex",)


def names(suite: str) -> list[str]:
    """Of all implementations; suite: "attention" or "decode"."""
    return [*OURS, *_peers(suite)]


def implementations(case: AttentionCase) -> dict[str, Callable | Missing]:
    """{name: function of `adaptive_fusion_attention`'s tensors, gate (1,), or Missing}."""
    peers = _peers("decode" if case.queries == 1 else "attention")
    found = by_backend(adaptive_fusion_attention, OURS)
    return found | {name: make(case) for name, make in peers.items()}


def measure_attention(case: AttentionCase, trained: bool, captured: bool, effort: Effort) -> dict[str, Measurement]:
    """Of the forward, where `trained` with the gradients of all inputs after it.

    Two sets of inputs take turns. Memory is measured where it is swept over lengths, with gradients.
    """
    torch.manual_seed(0)
    sets = [(case.inputs(trained=trained), case.output_gradient() if trained else None) for _ in range(2)]
    works: dict[str, Any] = {}
    for name, function in implementations(case).items():
        works[name] = function
        if not isinstance(function, Missing):
            works[name] = [partial(results_of, function, *given) for given in sets]
        if may_refuse(name):
            works[name] = _unless_refused(name, works[name], captured and case.device == "cuda")
    return measure(
        works,
        partial(exact_results, case, *sets[0]),
        "published eager",
        torch.device(case.device),
        effort,
        captured=captured,
        memory=True if trained else None,
        roundings=FP32_ROUNDINGS if case.dtype == torch.float32 else 2,
    )


def enter_row(
    row: Callable,
    table: Table,
    name: str,
    measurements: Mapping[str, Measurement],
) -> Measurement:
    """`row` with what an attention suite says of this library: its time over the fastest two calls."""
    figures = {}
    if name in OURS and measurements[name].seconds and (over := over_best_two_calls(measurements, name)) is not None:
        figures["time_over_best_two_calls"] = over
    return row(table, name, measurements, ours=name in OURS, **figures)


def shorter(effort: Effort) -> Effort:
    """A call takes milliseconds at most: many rounds in half the time of other suites."""
    return dataclasses.replace(effort, seconds=effort.seconds / 2)


def may_refuse(name: str) -> bool:
    """Whether it may be missing; ours, the yardstick and the published way take every case."""
    return name not in (*OURS, YARDSTICK, *PUBLISHED)


def cpu_limit(measurements: Mapping[str, Measurement]) -> float:
    """Of the time of "torch" over the two calls that it makes itself.

    Its checks of arguments take 21 us a call in warm caches, up to five times as much behind what empties them.
    """
    return 1.15 + 1e-4 / measurements[YARDSTICK].median()


def over_best_two_calls(measurements: Mapping[str, Measurement], name: str) -> float | None:
    """Time of `name` over that of the fastest composite of two calls in the same run, None where none ran."""
    peers = [mine for peer, mine in measurements.items() if peer == YARDSTICK or may_refuse(peer)]
    return max((measurements[name].ratio_to(composite) for composite in peers if composite.seconds), default=None)


def _peers(suite):
    """Those that compile at their first call stand last: whatever ends a run, it ends what takes longest."""
    peers = peers_of("attention", suite)
    return dict(sorted(peers.items(), key=lambda peer: peer[0] in COMPILED))


def _unless_refused(name, work, captured):
    if isinstance(work, Missing) or attempts.why_not(name) is not None:
        return work
    trial = tried(name, partial(DeviceClock.capture, work[0]) if captured else work[0])
    return work if trial.error is None else Missing(f"{name} refuses the call: {trial.error.partition(': ')[2]}")
