"""The fused attention against two attention calls and a combine: forward, and forward with all gradients.

    pytest bench/test_attention.py [--full]

On a GPU bf16 at the sizes of 7B LLMs, on a CPU fp32 at a small one's; --full also sweeps over lengths, widths and heads.
"""

import pytest

from bench.attention_suite import YARDSTICK, cpu_limit, enter_row, measure_attention, names, shorter
from bench.cases import cases_here
from bench.cases.attention import CASES, FORWARD_SWEEP, SWEEP
from bench.measuring import CLOCK, Table

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def pytest_generate_tests(metafunc):
    groups = [CASES]
    if metafunc.config.getoption("full"):
        groups += [SWEEP, FORWARD_SWEEP] if metafunc.function is test_forward else [SWEEP]
    metafunc.parametrize(["case_name", "case"], [pytest.param(*x, id=x[0]) for x in cases_here(*groups).items()])
    metafunc.parametrize("name", names("attention"))


@pytest.fixture
def enter(row, measured_once, effort, small):
    """enter(suite, case, name, trained=): measures, and enters the row of one implementation."""

    def enter(suite, case, name, *, trained):
        case = case.small() if small else case
        measurements = measured_once(measure_attention, case, trained, False, effort if small else shorter(effort))
        table = Table(
            suite=suite,
            case=str(case),
            yardstick=YARDSTICK,
            dtype=case.dtype,
            flops=case.forward_flops() + (case.backward_flops() if trained else 0),
            moved=case.forward_bytes() + (case.backward_bytes() if trained else 0),
            sizes=case.sizes,
        )
        mine = enter_row(row, table, name, measurements)
        if name == "torch" and case.device == "cpu" and not small:
            assert mine.ratio_to(measurements[YARDSTICK]) <= cpu_limit(measurements)

    return enter


def test_forward(enter, case_name, case, name):
    enter("attention forward", case, name, trained=False)


def test_forward_and_backward(enter, case_name, case, name):
    enter("attention forward and backward", case, name, trained=True)
