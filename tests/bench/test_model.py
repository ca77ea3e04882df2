"""The model suites' systems compute what they stand for."""

import dataclasses
import time

import pytest
import torch

from bench.cases.model import CASES
from bench.measuring import Effort
from bench.model_suite import Compared, measure_call, measure_generation, prefill, train
from bench.peers.model.published import Published

SYSTEMS = {"bare", "layalign", "published sdpa", "published eager"}


@pytest.fixture
def case():
    return CASES["training_step"]["cpu_ragged"].small()


@pytest.fixture
def effort():
    return Effort(rounds=1, seconds=0.0, clock=time.perf_counter)


@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_system_gets_no_figure(case, effort, training, monkeypatch):
    """The published scheme with one gate changed, as if a layer's cross-attention were computed wrongly."""
    make = Published.__init__

    def make_wrong(self, *arguments, eager):
        make(self, *arguments, eager=eager)
        if eager:
            with torch.no_grad():
                self.trained.gates[1].mul_(1.01)

    monkeypatch.setattr(Published, "__init__", make_wrong)
    call = train if training else prefill
    found = measure_call(case, effort, call, training)
    assert "is wrong" in found["published eager"].error and not found["published eager"].seconds
    assert found["layalign"].error is None and found["layalign"].seconds


def test_generation_is_checked_on_given_tokens(case, effort, monkeypatch):
    """A cross-attention that is wrong only while decoding."""
    attend = Published._attend

    def attend_wrongly(self, query, keys, values):
        out = attend(self, query, keys, values)
        return 1.5 * out if self.eager and query.shape[2] == 1 else out

    monkeypatch.setattr(Published, "_attend", attend_wrongly)
    found = measure_generation(case, effort)
    assert "is wrong" in found["published eager"].error
    assert found["layalign"].error is None and found["published sdpa"].error is None


def test_systems_share_the_frozen_weights_alone(case):
    compared = Compared(case, training=True)
    systems = [compared.systems[name] for name in ("layalign", "published sdpa", "published eager")]
    llms = [systems[0].model.llm, *(system.llm for system in systems[1:])]
    assert len({llm.lm_head.weight.data_ptr() for llm in llms}) == 1
    assert len({llm.model.layers[0].self_attn for llm in llms}) == 3
    trained = [weight.data_ptr() for system in systems for weight in system.trained.parameters()]
    assert len(set(trained)) == len(trained)


def test_bf16_of_a_gpu_case(effort):
    """What a GPU measures, small and on a CPU."""
    case = dataclasses.replace(CASES["training_step"]["gpu_llama_3_8b"].small(), device="cpu")
    for found in (measure_call(case, effort, train, True), measure_generation(case, effort)):
        assert all(found[name].error is None and found[name].seconds for name in SYSTEMS)
