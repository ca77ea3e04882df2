"""A training step, prefill and generation of LayAlign against the bare LLM and the published scheme.

    pytest bench/test_model.py

All systems run over the same weights, on the same positions and labels, and the encoder's forward is in each. Training
is forward, backward and an AdamW step of what a system trains; the bare LLM trains nothing.
"""

import pytest

from bench.cases import cases_here
from bench.cases.model import CASES
from bench.measuring import CLOCK, Table
from bench.model_suite import PACKED, STATIC, SYSTEMS, measure_call, measure_generation, prefill, train

STEP_LIMIT, GENERATION_LIMIT, PEAK_LIMIT = 1.20, 1.10, 0.5  # on a CPU; of "layalign" over "bare", and the published way
PACKED_LIMIT = 1.5  # times the tokens per second of padded rows


def pytest_generate_tests(metafunc):
    """The cases of this machine, and with --full or --small those of --full."""
    option = metafunc.config.getoption
    suite = metafunc.function.__name__.removeprefix("test_")
    every = option("full") or option("small")
    cases = {name: case for name, case in cases_here(CASES[suite]).items() if every or not case.full}
    names = SYSTEMS + {"generation": STATIC, "training_step": PACKED}.get(suite, ())
    sized = [case.small() if option("small") else case for case in cases.values()]
    metafunc.parametrize("case", sized, ids=list(cases))
    metafunc.parametrize("name", names)


def enter(row, suite, case, name, measurements, **figures):
    """The row, with the ratio of peaks where both are known. -> its time over the bare LLM's, None where that has none"""
    mine, published = measurements[name], measurements["published eager"]
    if mine.peak_bytes and published.peak_bytes:
        figures["peak_over_published"] = mine.peak_bytes / published.peak_bytes
    sizes = case.sizes(suite == "training step")
    table = Table(suite=suite, case=str(case), yardstick="bare", dtype=case.dtype, sizes=sizes)
    row(table, name, measurements, ours=name.startswith("layalign"), **figures)
    bare = measurements["bare"]
    return mine.ratio_to(bare) if bare.seconds else None


def promised(case, small):
    """Whether the limits are those of this case: the figures of a GPU are reported."""
    return case.device == "cpu" and not case.full and not small


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(row, measured_once, effort, small, case, name):
    measurements = measured_once(measure_call, case, effort, train, True)
    seconds = measurements[name].seconds
    rate = {"tokens_per_second": case.real_tokens() / measurements[name].median()} if seconds and case.skewed else {}
    ratio = enter(row, "training step", case, name, measurements, **rate)
    if name == "layalign packed" and case.skewed and promised(case, small):
        assert measurements["layalign"].ratio_to(measurements[name]) >= PACKED_LIMIT
    if name == "layalign" and promised(case, small) and not case.skewed:
        if case.rounds is None:
            assert ratio <= STEP_LIMIT
        else:  # a case that is there for its memory
            assert measurements[name].peak_bytes <= PEAK_LIMIT * measurements["published eager"].peak_bytes


@pytest.mark.benchmark(timer=CLOCK)
def test_prefill(row, measured_once, effort, case, name):
    enter(row, "prefill", case, name, measured_once(measure_call, case, effort, prefill, False))


@pytest.mark.benchmark(timer=CLOCK)
def test_generation(row, measured_once, effort, small, case, name):
    measurements = measured_once(measure_generation, case, effort)
    seconds = measurements[name].seconds
    rate = {"tokens_per_second": case.batch * case.new_tokens / measurements[name].median()} if seconds else {}
    ratio = enter(row, "generation", case, name, measurements, **rate)
    if name == "layalign" and promised(case, small):
        assert ratio <= GENERATION_LIMIT
