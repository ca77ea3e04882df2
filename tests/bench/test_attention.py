"""The attention suites: what they count as work, that their peers are right, and that only what is right gets a figure."""

import sys
import types
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import attention_suite
from bench.cases import attention as attention_cases
from bench.cases.attention import CASES, DECODING, AttentionCase, exact_results, last_token, results_of
from bench.measuring import Effort, Measurement, Missing
from bench.peers.attention import flash_attention
from bench.peers.attention.flex import flex

SIZES = {"batch": 2, "heads": 6, "kv_heads": 2, "width": 16, "queries": 9, "keys": 9, "cross": 5}
CASE = AttentionCase(device="cpu", dtype=torch.float32, **SIZES)
EFFORT = Effort(rounds=2, seconds=0.0, clock=iter(range(10000)).__next__)


@pytest.mark.parametrize(
    ("case", "gigaflops", "megabytes"),
    [
        (CASES["gpu_a_mha"], 34.4, 169),
        (CASES["gpu_a_gqa"], 34.4, 93),
        (CASES["gpu_b_mha"], 137.5, 338),
        (DECODING["gpu_c_gqa"], 0.67, 168),
        (DECODING["gpu_c_mha"], 0.67, 672),
    ],
)
def test_counted_work(case, gigaflops, megabytes):
    """Figures worked out by hand, which count the log-sum-exps that training keeps."""
    log_sum_exps = 0 if case.queries == 1 else 2 * 4 * case.batch * case.heads * case.queries
    assert case.forward_flops() / 1e9 == pytest.approx(gigaflops, abs=0.05 if gigaflops > 1 else 0.005)
    assert (case.forward_bytes() + log_sum_exps) / 1e6 == pytest.approx(megabytes, abs=0.51)
    assert case.key_value_bytes() < case.forward_bytes()


def test_counted_work_of_gradients():
    """481 GFLOP by kernels that compute the scores and their gradients twice, in seven products instead of five."""
    case = CASES["gpu_b_mha"]
    assert case.backward_flops() * 7 / 5 / 1e9 == pytest.approx(481, abs=0.5)
    inputs = case.key_value_bytes() + case.query_bytes()
    assert case.backward_bytes() == 2 * inputs + 2 * case.query_bytes()  # and the output with its gradient


@pytest.mark.parametrize("case", [CASE, last_token(CASE)], ids=["prefill", "decode"])
@pytest.mark.parametrize("trained", [False, True])
def test_exact_results(case, trained):
    """Head by head as all at once."""
    torch.manual_seed(1)
    inputs, grad = case.inputs(), case.output_gradient() if trained else None
    whole = [x.double().requires_grad_(trained) for x in inputs]
    expected = results_of(attention_cases._reference, whole, None if grad is None else grad.double())
    found = exact_results(case, inputs, grad)
    assert len(found) == (7 if trained else 1)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize("case", [CASE, last_token(CASE)], ids=["prefill", "decode"])
@pytest.mark.parametrize("trained", [False, True])
def test_all_that_are_here_are_right(case, trained):
    found = attention_suite.measure_attention(case, trained, case.queries == 1, EFFORT)
    assert list(found) == attention_suite.names("decode" if case.queries == 1 else "attention")
    errors = [measurement.error for measurement in found.values() if measurement.error]
    assert not errors
    timed = {name for name, measurement in found.items() if measurement.seconds}
    assert timed >= {"torch", "published eager", "published sdpa", "two calls"}
    assert all(name in found[name].missing for name in found.keys() - timed)
    assert found["torch"].peak_bytes is None or trained


@pytest.mark.parametrize("wrong", ["gate", "mask", "cross"])
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_wrong_gets_no_figure(monkeypatch, wrong, trained):
    """Ours with a gate that is off by 1e-5, without the causal mask, or with a cross key that nothing sees."""
    right = attention_suite.implementations(CASE)["torch"]
    broken = {
        "gate": lambda *inputs: right(*inputs[:5], inputs[5] * (1 + 1e-5)),
        "mask": partial(right, causal=False),
        "cross": lambda q, k, v, cross_k, cross_v, gate: right(q, k, v, cross_k[:, :, 1:], cross_v[:, :, 1:], gate),
    }[wrong]
    several = attention_suite.implementations(CASE) | {"torch": broken}
    monkeypatch.setattr(attention_suite, "implementations", lambda case: several)
    found = attention_suite.measure_attention(CASE, trained, False, EFFORT)
    assert "torch is wrong" in found["torch"].error and not found["torch"].seconds
    assert len(found["two calls"].seconds) == EFFORT.rounds


def test_a_peer_that_refuses_the_call_is_missing(monkeypatch):
    def refuse(*inputs):
        raise AssertionError("head dim 16 is not supported")

    several = attention_suite.implementations(CASE) | {"flex": refuse}
    monkeypatch.setattr(attention_suite, "implementations", lambda case: several)
    found = attention_suite.measure_attention(CASE, False, False, EFFORT)["flex"]
    assert found.missing == "flex refuses the call: AssertionError: head dim 16 is not supported" and not found.seconds


@pytest.mark.parametrize("as_tuple", [False, True])
def test_flash_attn_where_installed(monkeypatch, as_tuple):
    """Tensors go there with positions before heads; a version that returns a tuple has the output first."""
    assert flash_attention.flash_attn("flash-attn-of-nobody", "flash_attn") == Missing(
        "flash-attn-of-nobody is not installed"
    )

    def flash_attn_func(q, k, v, causal):
        assert q.shape == (2, q.shape[1], 6, 16) and k.shape == (2, k.shape[1], 2, 16)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (out, None) if as_tuple else out

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash_attention, "version", lambda distribution: "2.8.3")
    inputs = CASE.inputs()
    found = flash_attention.flash_attn("flash-attn", "flash_attn")(*inputs)
    torch.testing.assert_close(found, exact_results(CASE, inputs)[0].float())


@pytest.mark.parametrize("case", [CASE, last_token(CASE)], ids=["prefill", "decode"])
def test_flex(monkeypatch, case):
    """In one graph, traced as on a GPU; its kernels need one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    inputs = case.inputs()
    torch.testing.assert_close(flex(case)(*inputs), exact_results(case, inputs)[0].float())


def test_the_best_two_calls():
    found = {name: Measurement() for name in attention_suite.names("attention")}
    times = {"torch": [3, 30], "published sdpa": [1, 10], "two calls": [4, 40], "sdpa cudnn": [2, 20]}
    for name, seconds in times.items():
        found[name].seconds = seconds
    assert attention_suite.over_best_two_calls(found, "torch") == 1.5
