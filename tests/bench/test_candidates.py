"""Launch candidates: each is what is launched, and has a row of its own."""

import pytest
import torch

from bench.first_light.candidates import KERNELS, MOST, all_of, launching, named
from layalign.kernels import autotuning, plans
from layalign.kernels.adaptive_fusion_attention.gpu.launch_table import launch_candidates
from layalign.kernels.launch import LaunchConfig


def test_a_candidate_is_launched_and_no_other_kernel_changed():
    shipped, other = (LaunchConfig(block_m=m, block_n=64, warps=4, stages=2) for m in (64, 128))
    seen = []
    with launching("forward", other, seen):
        assert autotuning.enabled()
        assert autotuning.tuned("forward", {}, [shipped, other], None) == other
        assert autotuning.tuned("query_gradients", {}, [shipped, other], None) == shipped
    assert seen == [shipped, other] and not autotuning.enabled()
    assert named(other) == "128x64 4 warps 2 stages"


def test_no_plan_repeats_another_candidate(monkeypatch):
    """A call's plan knows nothing of the configuration that is forced on the next like it."""
    monkeypatch.setattr(plans, "enabled", True)
    arguments, config = (torch.ones(4), torch.ones(4), 1, 2), LaunchConfig(block_m=64, block_n=64, warps=4, stages=2)
    assert plans.Plans().describe(arguments, None) is not None
    with launching("forward", config):
        assert plans.Plans().describe(arguments, None) is None
    assert plans.Plans().describe(arguments, None) is not None


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_candidate_is_timed(kernel, architecture):
    """The shipped one too, which on an H200 differs by `ahead` alone from another."""
    call = {"architecture": architecture, "plain": True, "dtype": torch.bfloat16, "head_dim": 128, "length": 1024}
    candidates = launch_candidates(kernel, **call)
    assert all_of(kernel, candidates) == tuple(candidates)


def test_candidates_without_a_row_are_refused():
    line = LaunchConfig(block_m=64, block_n=64, warps=4, stages=2)
    with pytest.raises(ValueError, match="forward: 2 candidates have 1 names"):
        all_of("forward", [line, line])
    many = [LaunchConfig(block_m=64, block_n=64, warps=4, stages=stages) for stages in range(MOST + 1)]
    with pytest.raises(ValueError, match=f"forward: {MOST + 1} candidates have tests for {MOST}"):
        all_of("forward", many)
