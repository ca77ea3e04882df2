"""The fused attention against two attention calls and a combine: forward, and forward with all gradients.

    pytest bench/test_attention.py [--full]

On a GPU bf16 at the sizes of 7B LLMs, on a CPU fp32 at a small one's; --full also sweeps over lengths, widths and heads.
"""

import dataclasses

import pytest
from attention_case import CASES, FORWARD_SWEEP, SWEEP, cases_here
from measuring import CLOCK
from peers import IMPLEMENTATIONS, OURS, YARDSTICK, cpu_limit, measure_attention, over_best_two_calls

pytestmark = pytest.mark.benchmark(timer=CLOCK)
GOALS = {  # of time over the fastest two calls
    "attention forward": {"gpu_a_mha": 0.7, "gpu_a_gqa": 0.7, "gpu_b_mha": 0.9},
    "attention forward and backward": {"gpu_b_mha": 0.9},
}


def pytest_generate_tests(metafunc):
    groups = [CASES]
    if metafunc.config.getoption("full"):
        groups += [SWEEP, FORWARD_SWEEP] if metafunc.function is test_forward else [SWEEP]
    metafunc.parametrize(["case_name", "case"], [pytest.param(*x, id=x[0]) for x in cases_here(*groups).items()])
    metafunc.parametrize("name", IMPLEMENTATIONS)


@pytest.fixture
def enter(row, measured_once, effort, small):
    """enter(suite, case name, case, name, trained=): measures, and enters the row of one implementation."""
    if not small:  # a call takes milliseconds: many rounds in half the time of other suites
        effort = dataclasses.replace(effort, seconds=effort.seconds / 2)

    def enter(suite, case_name, case, name, *, trained):
        case = case.small() if small else case
        measurements = measured_once(measure_attention, case, trained, False, effort)
        flops = case.forward_flops() + (case.backward_flops() if trained else 0)
        moved = case.forward_bytes() + (case.backward_bytes() if trained else 0)
        figures = {}
        if name in OURS and measurements[name].seconds:
            figures["time_over_best_two_calls"] = over_best_two_calls(measurements, name)
        if name == "triton" and case_name in GOALS[suite]:
            figures["goal"] = GOALS[suite][case_name]
        mine = row(
            suite,
            case,
            name,
            measurements,
            yardstick=YARDSTICK,
            ours=name in OURS,
            dtype=case.dtype,
            flops=flops,
            moved=moved,
            sizes=case.sizes,
            **figures,
        )
        if name == "torch" and case.device == "cpu" and not small:
            assert mine.ratio_to(measurements[YARDSTICK]) <= cpu_limit(measurements)

    return enter


def test_forward(enter, case_name, case, name):
    enter("attention forward", case_name, case, name, trained=False)


def test_forward_and_backward(enter, case_name, case, name):
    enter("attention forward and backward", case_name, case, name, trained=True)
