"""`layer_mix` against the published way and copying, `stream_linear` against a plain product, and the aligner folded against unfolded.

    pytest bench/test_aligner_operators.py

On a GPU in bf16 at the sizes of mT5-xl with a 7B LLM, up to 20 GB of its memory; on a CPU in fp32 at small ones.
"""

import dataclasses
from functools import partial

import pytest
import torch
from aligner_case import FOLDING, OPERATORS, cases_here
from measuring import CLOCK, Missing, measure
from published_aligner import published_mix
from torch.nn.functional import linear

from layalign.kernels.layerwise_aligner import (
    cross_key_values,
    cross_key_values_reference,
    fold_key_values,
    layer_mix,
    layer_mix_reference,
    stream_linear,
    stream_linear_reference,
)

pytestmark = pytest.mark.benchmark(timer=CLOCK)
BACKENDS = ("torch", "triton")
# Of the time over the yardstick's, on a GPU.
MIX_GOALS = {"forward": 1 / 0.85, "backward": 1 / 0.75}
LINEAR_GOAL = 1 / 0.95
FOLDING_GOALS = {"gpu_gqa": 0.19, "gpu_mha": 0.36}


@pytest.fixture
def sized(small):
    """sized(case): itself, tiny under --small."""
    return lambda case: case.small() if small else case


@pytest.fixture
def effort(effort):
    """Half the time of larger works, for many of few milliseconds."""
    return dataclasses.replace(effort, seconds=effort.seconds / 2)


def without_triton(case, works):
    """The works, without those by Triton where there is no GPU."""
    return works if case.device == "cuda" else works | {"triton": Missing("triton needs a CUDA device")}


def copy_of(case, tensors):
    """Copying as many bytes as `tensors` (B, T, De) of the case hold, half of them read and half written."""
    source = case.draw(tensors * case.tokens * case.encoder_width // 2)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    return copy


def outputs(function, inputs):
    return lambda: [function(*inputs).detach()]


def gradients(function, inputs, grad):
    """A function without arguments that computes the gradients of the inputs; the forward runs at its first call."""
    trained = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    done = []

    def backward():
        if not done:
            done.append(function(*inputs))
        return torch.autograd.grad(done[0], trained, grad, retain_graph=True)

    return backward


def measure_mix(case, direction, effort):
    torch.manual_seed(0)
    inputs, grad = [case.states(), *case.mix()], case.draw(case.streams, case.batch, case.length, case.encoder_width)
    exact_inputs = [torch.stack(inputs[0]).double(), *(x.detach().double().requires_grad_() for x in inputs[1:])]
    reference = partial(layer_mix_reference, upcast=False)
    functions = {"published": published_mix, **{name: partial(layer_mix, backend=name) for name in BACKENDS}}
    if direction == "forward":
        works = {name: outputs(function, inputs) for name, function in functions.items()}
        exact = outputs(reference, exact_inputs)
    else:
        works = {name: gradients(function, inputs, grad) for name, function in functions.items()}
        exact = gradients(reference, exact_inputs, grad.double())
    works["copy"] = copy_of(case, case.encoder_layers + case.streams)  # either direction reads or writes each once
    return measure(without_triton(case, works), exact, "published", torch.device(case.device), effort)


@pytest.mark.parametrize("name", ["published", "copy", *BACKENDS])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case_name", cases_here(OPERATORS))
def test_layer_mix(row, sized, measured_once, effort, case_name, direction, name):
    """The backward computes what training asks for, the gradients of weight and bias."""
    case = sized(OPERATORS[case_name])
    row(
        f"layer_mix {direction}",
        case,
        name,
        measured_once(measure_mix, case, direction, effort),
        yardstick="copy" if case.device == "cuda" else "published",  # a CPU is busy computing, not moving
        ours=name in BACKENDS,
        dtype=case.dtype,
        flops=2 * case.encoder_layers * case.streams * case.tokens * case.encoder_width,
        moved=(case.encoder_layers + case.streams) * case.tokens * case.encoder_width * case.dtype.itemsize,
        sizes=case.sizes,
        **({"goal": MIX_GOALS[direction]} if name == "triton" else {}),
    )


def measure_linear(case, weights, direction, effort):
    torch.manual_seed(0)
    shared = weights == "shared"
    streams = case.draw(case.streams, case.batch, case.length, case.encoder_width).requires_grad_()
    leading = () if shared else (case.streams,)
    weight = case.draw(*leading, case.llm_width, case.encoder_width, scale=case.encoder_width**-0.5).requires_grad_()
    inputs, grad = [streams, weight], case.draw(case.streams, case.batch, case.length, case.llm_width)

    def plain(streams, weight):
        flat = streams.flatten(0, 2) if shared else streams.flatten(1, 2)
        return (linear(flat, weight) if shared else flat @ weight.mT).view(grad.shape)

    functions = {"plain product": plain} | {name: partial(stream_linear, backend=name) for name in BACKENDS}
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    reference = partial(stream_linear_reference, upcast=False)
    if direction == "forward":
        works = {name: outputs(function, inputs) for name, function in functions.items()}
        exact = outputs(reference, exact_inputs)
    else:
        works = {name: gradients(function, inputs, grad) for name, function in functions.items()}
        exact = gradients(reference, exact_inputs, grad.double())
    return measure(without_triton(case, works), exact, "plain product", torch.device(case.device), effort)


@pytest.mark.parametrize("name", ["plain product", *BACKENDS])
@pytest.mark.parametrize("weights", ["shared", "per_stream"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case_name", cases_here(OPERATORS))
def test_stream_linear(row, sized, measured_once, effort, case_name, direction, weights, name):
    """The plain product is cuBLAS's on a GPU: one for a shared weight, a batched one for a weight per stream."""
    case = sized(OPERATORS[case_name])
    products = 1 if direction == "forward" else 2
    row(
        f"stream_linear {direction}",
        f"weights {weights}, {case}",
        name,
        measured_once(measure_linear, case, weights, direction, effort),
        yardstick="plain product",
        ours=name in BACKENDS,
        dtype=case.dtype,
        flops=products * 2 * case.streams * case.tokens * case.encoder_width * case.llm_width,
        sizes=case.sizes,
        **({"goal": LINEAR_GOAL} if name == "triton" else {}),
    )


def measure_folding(case, backend, effort):
    torch.manual_seed(0)
    names = ("unfolded", "folded", "folded before")
    if backend == "triton" and case.device != "cuda":
        missing = Missing("triton needs a CUDA device")
        return measure(dict.fromkeys(names, missing), list, names[0], torch.device(case.device), effort)
    states, mix, projection, weights = case.states(), case.mix(), case.projection(), case.key_value_weights()
    call = torch.no_grad()(partial(cross_key_values, states, *mix, backend=backend))
    key_weights, value_weights, key_biases, value_biases = fold_key_values(*projection, *weights, backend=backend)
    works = {
        "unfolded": lambda: call(*projection, *weights, folded=False),
        "folded": lambda: call(*projection, *weights, folded=True),
        "folded before": lambda: call(None, None, key_weights, value_weights, key_biases, value_biases),
    }

    def exact():
        with torch.no_grad():
            stacked = [torch.stack(x).double() for x in (states, *weights)]
            parameters = [x.double() for x in (*mix, *projection)]
            return cross_key_values_reference(stacked[0], *parameters, *stacked[1:], upcast=False)

    return measure(works, exact, "unfolded", torch.device(case.device), effort)


@pytest.mark.parametrize("name", ["unfolded", "folded", "folded before"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case_name", cases_here(FOLDING))
def test_folding(row, sized, measured_once, effort, case_name, backend, name):
    """Folded before: the weights are multiplied once for many calls, as at inference."""
    case = sized(FOLDING[case_name])
    goal = FOLDING_GOALS.get(case_name) if (backend, name) == ("triton", "folded before") else None
    row(
        "aligner folded",
        f"{backend}, {case}",
        name,
        measured_once(measure_folding, case, backend, effort),
        yardstick="unfolded",
        ours=True,
        dtype=case.dtype,
        sizes=case.sizes,
        **({"goal": goal} if goal else {}),
    )
