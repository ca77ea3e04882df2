"""`layer_mix` against the published way and copying, `stream_linear` against a plain product, and the aligner folded against unfolded.

    pytest bench/test_aligner_operators.py

On a GPU in bf16 at the sizes of mT5-xl with a 7B LLM, up to 20 GB of its memory; on a CPU in fp32 at small ones.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch

from bench.cases import cases_here
from bench.cases.aligner import FOLDING, OPERATORS, in_fp64
from bench.machine import machine
from bench.measuring import BACKENDS, CLOCK, Missing, Table, by_backend, measure
from bench.peers import peers_of
from layalign.kernels import layerwise_aligner as operators

pytestmark = pytest.mark.benchmark(timer=CLOCK)
MIX_PEERS, LINEAR_PEERS = (peers_of("aligner", operator) for operator in ("layer_mix", "stream_linear"))
FOLDED = ("unfolded", "folded", "folded before")


@pytest.fixture
def sized(small):
    """sized(case): itself, tiny under --small."""
    return lambda case: case.small() if small else case


@pytest.fixture
def effort(effort):
    """Half the time of larger works, for many of few milliseconds."""
    return dataclasses.replace(effort, seconds=effort.seconds / 2)


@dataclass(frozen=True)
class Call:
    """Of one operator: its inputs, the gradient of its output, and the function whose fp64 result is the right one."""

    inputs: list[Any]
    grad: torch.Tensor
    reference: Callable

    def work(self, function, direction):
        """Without arguments: the forward, or the backward alone, whose forward runs at its first call."""
        if isinstance(function, Missing):
            return function
        return _outputs(function, self.inputs) if direction == "forward" else _gradients(function, self)

    def exact(self, direction):
        """The work in fp64."""
        return Call(in_fp64(self.inputs), self.grad.double(), self.reference).work(self.reference, direction)


def _outputs(function, inputs):
    return lambda: [function(*inputs).detach()]


def _gradients(function, call):
    trained = [x for x in call.inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    done = []

    def backward():
        if not done:
            done.append(function(*call.inputs))
        return torch.autograd.grad(done[0], trained, call.grad, retain_graph=True)

    return backward


def implementations(operator, peers, case):
    """{name: function of the operator's arguments, or Missing}."""
    return {name: make(case) for name, make in peers.items()} | by_backend(operator)


def copy_of(case, tensors):
    """Copying as many bytes as `tensors` (B, T, De) of the case hold, half of them read and half written."""
    source = case.draw(tensors * case.tokens * case.encoder_width // 2)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    return copy


def measure_mix(case, direction, effort):
    torch.manual_seed(0)
    inputs, grad = [case.states(), *case.mix()], case.draw(case.streams, case.batch, case.length, case.encoder_width)

    def reference(states, weight, bias):
        return operators.layer_mix_reference(torch.stack(states), weight, bias, upcast=False)

    call = Call(inputs, grad, reference)
    functions = implementations(operators.layer_mix, MIX_PEERS, case)
    works = {name: call.work(function, direction) for name, function in functions.items()}
    works["copy"] = copy_of(case, case.encoder_layers + case.streams)  # either direction reads or writes each once
    return measure(works, call.exact(direction), "published", torch.device(case.device), effort)


@pytest.mark.parametrize("name", [*MIX_PEERS, "copy", *BACKENDS])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case_name", cases_here(OPERATORS))
def test_layer_mix(row, sized, measured_once, effort, case_name, direction, name):
    """The backward computes what training asks for, the gradients of weight and bias."""
    case = sized(cases_here(OPERATORS)[case_name])
    table = Table(
        suite=f"layer_mix {direction}",
        case=str(case),
        yardstick="copy" if case.device == "cuda" else "published",  # a CPU is busy computing, not moving
        dtype=case.dtype,
        flops=2 * case.encoder_layers * case.streams * case.tokens * case.encoder_width,
        moved=(case.encoder_layers + case.streams) * case.tokens * case.encoder_width * case.dtype.itemsize,
        sizes=case.sizes,
    )
    row(table, name, measured_once(measure_mix, case, direction, effort), ours=name in BACKENDS)


def measure_linear(case, weights, direction, effort):
    torch.manual_seed(0)
    streams = case.draw(case.streams, case.batch, case.length, case.encoder_width).requires_grad_()
    leading = () if weights == "shared" else (case.streams,)
    weight = case.draw(*leading, case.llm_width, case.encoder_width, scale=case.encoder_width**-0.5).requires_grad_()
    grad = case.draw(case.streams, case.batch, case.length, case.llm_width)
    call = Call([streams, weight], grad, partial(operators.stream_linear_reference, upcast=False))
    functions = implementations(operators.stream_linear, LINEAR_PEERS, case)
    works = {name: call.work(function, direction) for name, function in functions.items()}
    return measure(works, call.exact(direction), "plain product", torch.device(case.device), effort)


@pytest.mark.parametrize("name", [*LINEAR_PEERS, *BACKENDS])
@pytest.mark.parametrize("weights", ["shared", "per_stream"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case_name", cases_here(OPERATORS))
def test_stream_linear(row, sized, measured_once, effort, case_name, direction, weights, name):
    """The plain product is cuBLAS's on a GPU: one for a shared weight, a batched one for a weight per stream."""
    case = sized(cases_here(OPERATORS)[case_name])
    products = 1 if direction == "forward" else 2
    table = Table(
        suite=f"stream_linear {direction}",
        case=f"weights {weights}, {case}",
        yardstick="plain product",
        dtype=case.dtype,
        flops=products * 2 * case.streams * case.tokens * case.encoder_width * case.llm_width,
        sizes=case.sizes,
    )
    row(table, name, measured_once(measure_linear, case, weights, direction, effort), ours=name in BACKENDS)


def measure_folding(case, backend, effort):
    torch.manual_seed(0)
    if backend == "triton" and not machine().has_triton():
        missing = Missing("triton needs a CUDA device")
        return measure(dict.fromkeys(FOLDED, missing), list, FOLDED[0], torch.device(case.device), effort)
    states, mix, projection, weights = case.states(), case.mix(), case.projection(), case.key_value_weights()
    call = torch.no_grad()(partial(machine().by_backend(operators.cross_key_values, backend), states, *mix))
    fold = partial(machine().by_backend(operators.fold_key_values, backend), *projection, *weights)
    folded = cache(fold)  # within its own row: what becomes of it is no matter of the others
    works = {
        "unfolded": lambda: call(*projection, *weights, folded=False),
        "folded": lambda: call(*projection, *weights, folded=True),
        "folded before": lambda: call(None, None, *folded()),
    }

    def exact():
        with torch.no_grad():
            stacked = [torch.stack(x).double() for x in (states, *weights)]
            parameters = [x.double() for x in (*mix, *projection)]
            return operators.cross_key_values_reference(stacked[0], *parameters, *stacked[1:], upcast=False)

    return measure(works, exact, "unfolded", torch.device(case.device), effort)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case_name", cases_here(FOLDING))
def test_folding(row, sized, measured_once, effort, case_name, backend, name):
    """Folded before: the weights are multiplied once for many calls, as at inference."""
    case = sized(cases_here(FOLDING)[case_name])
    about = {"yardstick": "unfolded", "dtype": case.dtype, "sizes": case.sizes}
    table = Table(suite="aligner folded", case=f"{backend}, {case}", **about)
    row(table, name, measured_once(measure_folding, case, backend, effort), ours=True)
