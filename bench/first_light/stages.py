"""The stages and their steps: what is run, in the order in which its figures are missed most, should the time end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.first_light.supervise import pytest_command

KERNEL_TESTS = ("tests/kernels", "tests/model/test_model_gpu.py")  # all that a machine without the extras can collect
ADDRESSES, SANITIZER = "addresses_past", "compute_sanitizer"
# FlexAttention compiles half a minute a case; of the two static generations each compiles its model for longer than that.
SLOW_TO_START = ("flex", "bare static", "layalign static")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that a stage does.

    command: a program, run once; or arguments of pytest, for `processes` at once, each with a share of the tests.
    seconds: of the step at most, whatever is left of its stage. limit: of one attempt of a test. records: whether its rows are kept.
    goes_on_from: an earlier step whose tests are not run again.
    """

    name: str
    what: str
    command: Sequence[str] = ()
    tests: Sequence[str] = ()
    processes: int = 1
    seconds: float = float("inf")
    limit: float = 90.0
    records: bool = False
    goes_on_from: str | None = None

    def pytest(self, results: str, more: Sequence[str]) -> list[str]:
        """Its command, for one process. results: the folder of rows. more: arguments of every step."""
        recorded = ["--record", results, "--benchmark-columns=median"] if self.records else []
        # What benchmarks do not use takes a second and a half at every start, and a process that ended is started anew.
        lean = ["-p", "no:hypothesispytest"] if self.tests[0].startswith("bench/") else []
        return pytest_command(*self.tests, *lean, *recorded, *more)


@dataclass(frozen=True)
class Stage:
    """name: "A", ...; seconds: by default."""

    name: str
    what: str
    seconds: float
    steps: Sequence[Step] = field(default_factory=list)


def stages(jobs: int, workers: int) -> list[Stage]:
    """All of them. jobs: compilations at a time; workers: processes that share the GPU where nothing is timed."""
    return [
        Stage("A", "what the goals ask for", 540, _first(jobs, workers)),
        Stage("B", "whether it is right", 540, _tests(workers)),
        Stage("C", "what else there is to measure", 540, _sweeps(workers)),
    ]


def _first(jobs, workers):
    compiling = [sys.executable, "-m", "layalign", "kernels", "--head-dim", "128", "--jobs", str(jobs), "--json"]
    operators = "bench/test_aligner_operators.py"
    kernels = ["bench/test_attention.py::test_forward", "bench/test_decode.py", f"{operators}::test_layer_mix"]
    kernels += ["bench/test_attention.py::test_forward_and_backward", f"{operators}::test_folding"]
    kernels += [f"{operators}::test_stream_linear"]
    models = ["bench/test_model.py::test_training_step", "bench/test_model.py::test_generation", "--full"]
    models += ["-k", "llama_2_7b and not llama_2_7b_1- and not llama_2_7b_32"]
    return [
        Step(
            name="compile", what="the kernels, ahead of time, for the launches to find", command=compiling, seconds=120
        ),
        Step(
            name="smoke",
            what="a call of every kernel in every form",
            tests=["bench/first_light/smoke.py"],
            processes=max(1, workers // 2),
            seconds=150,
            limit=60,
        ),
        Step(name="kernels", what="the kernels' goals", tests=[*kernels, *_without()], records=True),
        Step(name="host cost", what="of calls", tests=["bench/test_host_cost.py"], records=True, seconds=90),
        Step(name="models", what="the model's goals at 7B", tests=[*models, *_without()], records=True, limit=120),
    ]


def _tests(workers):
    apart = f"not {ADDRESSES} and not {SANITIZER}"
    shared = {"processes": workers, "limit": 180.0}
    return [
        Step(
            name="gpu tests",
            what="what needs a GPU, but for the two below",
            tests=[*KERNEL_TESTS, "-m", "gpu", "-k", apart],
            seconds=300,
            **shared,
        ),
        Step(name="addresses", what="past 32 bits", tests=[*KERNEL_TESTS, "-m", "gpu", "-k", ADDRESSES]),
        Step(
            name="sanitizer",
            what="memcheck and racecheck",
            tests=[*KERNEL_TESTS, "-m", "gpu", "-k", SANITIZER],
            limit=240,
        ),
        Step(
            name="operators",
            what="the tests that a CPU interprets, compiled",
            tests=["tests/kernels", "-m", "not gpu and not slow"],
            **shared,
        ),
    ]


def _sweeps(workers):
    candidates = ["bench/first_light/candidates.py"]
    smaller = ["bench/test_model.py", "-k", "gpu_1b"]
    return [
        Step(
            name="candidates compiled",
            what="of the launch table",
            tests=[*candidates, "--compile-only"],
            processes=workers,
            seconds=200,
        ),
        Step(name="candidates", what="of the launch table, timed", tests=candidates, records=True),
        Step(name="1B", what="the 1B model", tests=[*smaller, *_without()], records=True, limit=120),
        Step(
            name="7B",
            what="the models of 7B and 8B",
            tests=["bench/test_model.py", "--full", "-k", "llama", *_without()],
            goes_on_from="models",
            records=True,
            limit=150,
        ),
        Step(
            name="all peers",
            what="the kernels with FlexAttention",
            tests=["bench/test_attention.py", "bench/test_decode.py", "bench/test_aligner.py"],
            records=True,
            limit=150,
        ),
        Step(
            name="sweeps",
            what="over lengths, widths and heads",
            tests=["bench/test_attention.py", "bench/test_decode.py", "--full", *_without()],
            records=True,
        ),
        Step(
            name="static",
            what="generation with static caches",
            tests=[*smaller[:-1], "generation"],
            records=True,
            limit=300,
        ),
    ]


def _without():
    return [word for name in SLOW_TO_START for word in ("--leave-out", name)]
