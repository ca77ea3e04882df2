"""`cross_key_values` against the published aligner, forward and backward, in time and in saved memory.

    pytest bench/test_aligner.py

As in training: gradients for the mix and the shared projection, none for encoder states and key and value weights.
"""

from functools import partial

import pytest
import torch

from bench.cases import cases_here
from bench.cases.aligner import CASES, flat, in_fp64
from bench.measuring import BACKENDS, CLOCK, Missing, Table, by_backend, measure
from bench.memory import saved_bytes
from bench.peers import peers_of
from layalign.kernels.layerwise_aligner import cross_key_values

YARDSTICK = "published"
PEERS = peers_of("aligner", "cross_key_values")
TIME_LIMITS = {"cpu_gqa": 0.5, "cpu_mha": 0.9}  # of "torch" over the published way
SAVED_LIMIT = 0.5


def forward_and_backward(function, arguments, grads):
    """grads: (2, L, B, T, kv). -> keys and values of each layer, gradients of what is trained"""
    results = function(*arguments)
    outputs, grad_outputs = [], []
    for result, grad in zip(results, grads, strict=True):  # of one tensor, or of a list of layers
        stacked = isinstance(result, torch.Tensor)
        outputs.extend([result] if stacked else result)
        grad_outputs.extend([grad] if stacked else grad)
    trained = [x for x in flat(arguments) if x.requires_grad]
    gradients = torch.autograd.grad(outputs, trained, grad_outputs)
    return [x.detach() for result in results for x in result] + list(gradients)


def measure_training(case, effort):
    torch.manual_seed(0)
    arguments = [case.states(), *case.mix(), *case.projection(), *case.key_value_weights()]
    grads = case.draw(2, case.llm_layers, case.batch, case.length, case.kv)
    functions = {name: make(case) for name, make in PEERS.items()} | by_backend(cross_key_values)
    works = {
        name: f if isinstance(f, Missing) else partial(forward_and_backward, f, arguments, grads)
        for name, f in functions.items()
    }

    def exact():
        return forward_and_backward(functions[YARDSTICK], [in_fp64(x) for x in arguments], grads.double())

    measurements = measure(works, exact, YARDSTICK, torch.device(case.device), effort)
    for name, function in functions.items():
        if measurements[name].seconds:
            measurements[name].saved_bytes = saved_bytes(partial(function, *arguments), flat(arguments))
    return measurements


@pytest.mark.parametrize("name", [*PEERS, *BACKENDS])
@pytest.mark.parametrize("case_name", cases_here(CASES))
@pytest.mark.benchmark(timer=CLOCK)
def test_training(row, measured_once, effort, small, case_name, name):
    case = cases_here(CASES)[case_name]
    case = case.small() if small else case
    measurements = measured_once(measure_training, case, effort)
    table = Table(suite="aligner", case=str(case), yardstick=YARDSTICK, dtype=case.dtype, sizes=case.sizes)
    mine = row(table, name, measurements, ours=name in BACKENDS)
    if name in BACKENDS:
        assert mine.saved_bytes <= SAVED_LIMIT * measurements[YARDSTICK].saved_bytes
    if name == "torch" and case_name in TIME_LIMITS and not small:
        assert mine.ratio_to(measurements[YARDSTICK]) <= TIME_LIMITS[case_name]
