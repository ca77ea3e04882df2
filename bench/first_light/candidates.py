"""The attention's launch configurations against each other, each a row: `pytest bench/first_light/candidates.py --record FOLDER`.

With --compile-only each is launched once and nothing is timed: what `--share` divides among processes while kernels compile.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from bench import attempts
from bench.attention_suite import shorter
from bench.cases.attention import CASES, exact_results, results_of
from bench.machine import machine
from bench.measuring import CLOCK, Table, measure, tried
from bench.peers.attention.published import eager
from layalign.kernels import autotuning, plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

KERNELS = ("forward", "key_value_gradients", "query_gradients")
CASE = CASES["gpu_b_mha"]
MOST = 64  # candidates of a kernel, known only where its GPU is
LIKE = "published eager"


@contextmanager
def launching(kernel, config, seen=None):
    """Within, `kernel` takes this configuration, and every other, or any where it is None, the shipped one. seen: the list that
    gets the kernel's candidates, the shipped one first. Without plans: one would repeat the launches of the first configuration."""

    def tuned(name, key, candidates, run):
        if name == kernel and seen is not None:
            seen[:] = candidates
        return config if name == kernel and config is not None else candidates[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotuning, "enabled", lambda: True)
        patch.setattr(autotuning, "tuned", tuned)
        patch.setattr(plans, "enabled", False)
        yield


def named(config):
    """A configuration in a few words."""
    tile = f"{config.block_m}x{config.block_n}" + (f"x{config.block_k}" if config.block_k else "")
    words = [tile, f"{config.warps} warps", f"{config.stages} stages"]
    return " ".join([*words, *(name for name in ("descriptors", "ahead") if getattr(config, name))])


def all_of(kernel, candidates):
    """As a tuple, in which each has a row.

    Raises:
        ValueError: two have one name, or there are more than tests.
    """
    names = {named(config) for config in candidates}
    if len(names) < len(candidates):
        raise ValueError(f"{kernel}: {len(candidates)} candidates have {len(names)} names")
    if len(names) > MOST:
        raise ValueError(f"{kernel}: {len(candidates)} candidates have tests for {MOST}")
    return tuple(candidates)


def attend(kernel, config, seen, inputs, grad):
    """Results of a call whose `kernel` is launched as `config` says."""
    with launching(kernel, config, seen):
        return results_of(partial(adaptive_fusion_attention, backend="triton"), inputs, grad)


def given(kernel):
    """Inputs and the gradient of the output, None for a forward alone."""
    torch.manual_seed(0)
    trained = kernel != "forward"
    return CASE.inputs(trained=trained), CASE.output_gradient() if trained else None


def measure_candidates(kernel, candidates, effort):
    arguments = given(kernel)
    works = {named(config): partial(attend, kernel, config, None, *arguments) for config in candidates}
    works[LIKE] = partial(results_of, eager, *arguments)
    exact = partial(exact_results, CASE, *arguments)
    return measure(works, exact, LIKE, torch.device(CASE.device), shorter(effort))


@pytest.fixture(scope="session")
def candidates_of():
    """candidates_of(kernel) -> tuple of its configurations here, the shipped one first."""
    found = {}

    def candidates(kernel):
        if kernel not in found:
            seen = []
            attend(kernel, None, seen, *given(kernel))
            found[kernel] = all_of(kernel, seen)
        return found[kernel]

    return candidates


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("index", range(MOST))
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidate(kernel, index, request, candidates_of, measured_once, row, effort):
    if machine().device != "cuda":
        pytest.skip("needs a GPU to be chosen for")
    candidates = candidates_of(kernel)
    if index >= len(candidates):
        pytest.skip(f"{kernel} has {len(candidates)} candidates")
    name = named(candidates[index])
    if request.config.getoption("compile_only"):
        with attempts.case(kernel):
            if (reason := attempts.why_not(name)) is not None:
                pytest.fail(reason, pytrace=False)
            trial = tried(name, partial(attend, kernel, candidates[index], None, *given(kernel)), torch.device("cuda"))
        assert trial.error is None, trial.error
        return
    about = {"dtype": CASE.dtype, "sizes": CASE.sizes, "yardstick": named(candidates[0])}
    table = Table(suite="launch candidates", case=f"{kernel}, {CASE}", **about)
    row(table, name, measured_once(measure_candidates, kernel, candidates, effort), ours=True)
