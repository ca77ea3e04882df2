"""One new token behind a cache of keys and values, and the cross keys and values of its input: what reads memory, and little else.

pytest bench/test_decode.py [--full]
"""

import dataclasses

import pytest
from attention_case import DECODING, DECODING_SWEEP, cases_here
from measuring import CLOCK
from peers import IMPLEMENTATIONS, OURS, YARDSTICK, cpu_limit, measure_attention, over_best_two_calls

GOAL = 0.8  # of time over the fastest two calls; and as much of the copy bandwidth, or more: `share_of_floor`
GOAL_CASES = ("gpu_c_gqa", "gpu_c_mha")


def pytest_generate_tests(metafunc):
    groups = [DECODING, DECODING_SWEEP] if metafunc.config.getoption("full") else [DECODING]
    metafunc.parametrize(["case_name", "case"], [pytest.param(*x, id=x[0]) for x in cases_here(*groups).items()])
    metafunc.parametrize("name", IMPLEMENTATIONS)


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(row, measured_once, effort, small, case_name, case, name):
    """Captured in a CUDA graph on a GPU, as generation with a static cache runs it."""
    case = case.small() if small else case
    if not small:  # a call takes a millisecond at most
        effort = dataclasses.replace(effort, seconds=effort.seconds / 2)
    measurements = measured_once(measure_attention, case, False, True, effort)
    figures = {}
    if name in OURS and measurements[name].seconds:
        figures["time_over_best_two_calls"] = over_best_two_calls(measurements, name)
    if name == "triton" and case_name in GOAL_CASES:
        figures["goal"] = GOAL
    mine = row(
        "decode",
        case,
        name,
        measurements,
        yardstick=YARDSTICK,
        ours=name in OURS,
        dtype=case.dtype,
        flops=case.forward_flops(),
        moved=case.key_value_bytes() if case.device == "cuda" else 0,  # a CPU's caches hold them from call to call
        sizes=case.sizes,
        **figures,
    )
    if name == "torch" and case.device == "cpu" and not small:
        assert mine.ratio_to(measurements[YARDSTICK]) <= cpu_limit(measurements)
