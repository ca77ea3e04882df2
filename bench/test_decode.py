"""One new token behind a cache of keys and values, and the cross keys and values of its input: what reads memory, and little else.

pytest bench/test_decode.py [--full]
"""

import pytest

from bench.attention_suite import YARDSTICK, cpu_limit, enter_row, measure_attention, names, shorter
from bench.cases import cases_here
from bench.cases.attention import DECODING, DECODING_SWEEP
from bench.measuring import CLOCK, Table


def pytest_generate_tests(metafunc):
    groups = [DECODING, DECODING_SWEEP] if metafunc.config.getoption("full") else [DECODING]
    metafunc.parametrize(["case_name", "case"], [pytest.param(*x, id=x[0]) for x in cases_here(*groups).items()])
    metafunc.parametrize("name", names("decode"))


@pytest.mark.benchmark(timer=CLOCK)
def test_decode(row, measured_once, effort, small, case_name, case, name):
    """Captured in a CUDA graph on a GPU, as generation with a static cache runs it."""
    case = case.small() if small else case
    measurements = measured_once(measure_attention, case, False, True, effort if small else shorter(effort))
    moved = case.key_value_bytes() if case.device == "cuda" else 0  # a CPU's caches hold them from call to call
    about = {"dtype": case.dtype, "flops": case.forward_flops(), "moved": moved, "sizes": case.sizes}
    table = Table(suite="decode", case=str(case), yardstick=YARDSTICK, **about)
    mine = enter_row(row, table, name, measurements)
    if name == "torch" and case.device == "cpu" and not small:
        assert mine.ratio_to(measurements[YARDSTICK]) <= cpu_limit(measurements)
