"""`backend="flash"`: what it says to flash-attn, by modules of the same signatures, and what it refuses."""

import sys
from functools import partial

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import (
    adaptive_fusion_attention,
    adaptive_fusion_attention_reference,
    flash_backend,
)

HALF = {"dtype": torch.float16, "gate_dtype": torch.float32}
GATES = ["scalar", "head", "query", "head_and_query"]


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="flash")


@pytest.fixture(params=[2, 3, 4])
def version(request, stand_in, monkeypatch):
    """flash-attn of this version is installed, and takes tensors of CPUs."""
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, module in stand_in.modules(request.param).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_backend, "DEVICES", ("cuda", "cpu"))
    flash_backend._installed.cache_clear()
    yield request.param
    flash_backend._installed.cache_clear()


@pytest.fixture
def nowhere(monkeypatch):
    """flash-attn is not installed; tensors of CPUs would do."""
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(flash_backend, "DEVICES", ("cuda", "cpu"))
    flash_backend._installed.cache_clear()
    yield
    flash_backend._installed.cache_clear()


@pytest.fixture
def check(check_by_row):
    return partial(check_by_row, attend)


CALLS = {
    "plain": ((1, 2, 2, 33, 33, 17, 16), {}),
    "grouped": ((2, 6, 2, 20, 20, 9, 16), {"return_lse": True}),
    "full": ((2, 2, 1, 20, 31, 9, 16), {"causal": False, "return_lse": True}),
    "chunk": ((1, 2, 1, 9, 40, 5, 16), {"return_lse": True}),
    "token": ((2, 4, 2, 1, 30, 5, 16), {"return_lse": True}),
    "start": ((1, 2, 1, 9, 40, 5, 16), {"query_start": 12}),
    "start_past_the_keys": ((1, 2, 1, 9, 40, 5, 16), {"query_start": 35, "return_lse": True}),
    "start_far_past_the_keys": ((1, 2, 1, 9, 12, 5, 16), {"query_start": 10**12}),
    "window": ((1, 2, 1, 40, 40, 5, 16), {"window": 7, "return_lse": True}),
    "window_of_one": ((1, 2, 1, 9, 9, 5, 16), {"window": 1}),
    "window_endless": ((1, 2, 1, 9, 9, 5, 16), {"window": 2**40}),
    "window_start": ((1, 2, 1, 9, 40, 5, 16), {"window": 7, "query_start": 20}),
    "window_past_the_keys": ((1, 2, 1, 9, 40, 5, 16), {"window": 7, "query_start": 35, "return_lse": True}),
    "softcap": ((1, 2, 1, 20, 20, 9, 16), {"softcap": 2.0, "scale": 0.7}),
    "negative_scale": ((1, 2, 1, 20, 20, 9, 16), {"scale": -0.3}),
    "no_cross": ((1, 2, 1, 20, 20, 0, 16), {"return_lse": True}),
    "odd_width": ((1, 2, 1, 20, 20, 9, 13), {"return_lse": True}),
    "no_query": ((1, 2, 1, 0, 5, 9, 16), {"return_lse": True}),
}


@pytest.mark.parametrize(("sizes", "options"), CALLS.values(), ids=CALLS)
def test_calls(version, check, random_inputs, sizes, options):
    check(random_inputs(*sizes, (1,), **HALF), **options)


@pytest.mark.parametrize("kind", range(4), ids=GATES)
def test_gates(version, check, cases, kind):
    gate_shape = cases.gate_shapes(2, 4, 19)[kind]
    check(cases.random_inputs(2, 4, 2, 19, 19, 7, 16, gate_shape, torch.float16, torch.float16))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cuts", [((0, 5, 5, 20, 30), (0, 3, 9, 9, 20)), ((0, 30), (0, 20))], ids=["some", "one"])
def test_packed_sequences(version, check, random_inputs, cuts, window):
    own, cross = (torch.tensor(values, dtype=torch.int32) for values in cuts)
    inputs = random_inputs(1, 4, 2, 30, 30, 20, 16, (1, 4, 30), **HALF)
    check(inputs, cu_seqlens=own, cross_cu_seqlens=cross, window=window, return_lse=True)


def spans(*rows):
    return torch.tensor(rows, dtype=torch.int32)


# Spans of the keys end where they do: what lies past it is another matter, see below.
SPANS = {
    "left_padding": (
        20,
        20,
        {"key_span": spans((0, 20), (13, 20), (20, 20)), "cross_span": spans((0, 9), (4, 9), (9, 9))},
    ),
    "cross_alone": (20, 20, {"cross_span": spans((2, 7), (0, 0), (-3, 99))}),
    "outside": (20, 20, {"key_span": spans((-5, 99), (19, 25), (30, 40)), "cross_span": spans((5, 2), (0, 1), (8, 9))}),
    "full": (20, 31, {"key_span": spans((3, 7), (0, 31), (30, 31)), "causal": False}),
    "chunk": (7, 31, {"key_span": spans((0, 31), (29, 31), (12, 40))}),
    "start": (7, 31, {"key_span": spans((0, 17), (5, 17), (12, 40)), "query_start": 10}),
    "window": (20, 20, {"key_span": spans((0, 20), (13, 20), (5, 20)), "window": 4}),
}


@pytest.mark.parametrize(("queries", "keys", "options"), SPANS.values(), ids=SPANS)
def test_spans(version, check, random_inputs, queries, keys, options):
    check(random_inputs(3, 4, 2, queries, keys, 9, 16, (3, 4, queries), **HALF), return_lse=True, **options)


def test_spans_of_shared_cross_rows(version, check, random_inputs):
    inputs = random_inputs(6, 4, 2, 5, 9, 7, 16, (6, 4, 5), **HALF)
    inputs[3:5] = (x.detach()[::3].requires_grad_() for x in inputs[3:5])
    check(inputs, cross_span=spans((2, 7), (0, 3)))


def test_padding_on_the_right(version, random_inputs):
    """Queries past their row's keys get 0; what lies there, NaN too, reaches nothing else."""
    inputs = random_inputs(3, 4, 2, 20, 20, 9, 16, (1,), **HALF)
    span = spans((0, 20), (2, 11), (5, 5))
    plain = adaptive_fusion_attention_reference(*inputs, key_span=span, return_lse=True)
    outside = (torch.arange(20) < span[:, :1]) | (torch.arange(20) >= span[:, 1:])
    planted = [x.detach() for x in inputs]
    planted[1:3] = (x.masked_fill(outside[:, None, :, None], torch.nan) for x in planted[1:3])
    planted = [x.requires_grad_() for x in planted]
    out, self_lse, cross_lse = attend(*planted, key_span=span, return_lse=True)
    past = (torch.arange(20) >= span[:, 1:])[:, None].expand(3, 4, 20)
    cross = adaptive_fusion_attention_reference(*inputs, key_span=spans((0, 0), (0, 0), (0, 0)))
    torch.testing.assert_close(out, torch.where(past[..., None], cross, plain[0]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(self_lse, plain[1].masked_fill(past, -torch.inf))
    torch.testing.assert_close(cross_lse, plain[2])
    grads = torch.autograd.grad(out.float().sum(), planted)
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad.masked_select(outside[:, None, :, None]).any() for grad in grads[1:3])


def test_shared_cross_rows(version, random_inputs):
    """Three beams of two examples read their cross keys without a copy."""
    inputs = random_inputs(6, 4, 2, 5, 9, 7, 16, (6, 4, 5), **HALF)
    shared = [x.detach()[::3].requires_grad_() if place in (3, 4) else x for place, x in enumerate(inputs)]
    copied = [
        x.detach().repeat_interleave(3, 0).requires_grad_() if place in (3, 4) else x for place, x in enumerate(shared)
    ]
    results, expected = (attend(*tensors, return_lse=True) for tensors in (shared, copied))
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)
    got, want = (
        torch.autograd.grad(x[0].float().sum(), (y[3], y[4])) for x, y in ((results, shared), (expected, copied))
    )
    for shared_grad, copied_grad in zip(got, want, strict=True):
        torch.testing.assert_close(shared_grad, copied_grad.unflatten(0, (2, 3)).sum(1), rtol=2e-2, atol=2e-2)


def can_be_said(case):
    """Whether flash-attn takes the call, and no query is past its span, where it gives 0."""
    start = case.options.get("query_start", case.keys - case.queries)
    if case.key_mask or case.cross_mask or isinstance(start, torch.Tensor):
        return False
    if case.options["causal"] and start > case.keys - case.queries + case.options.get("window", 10**9) - 1:
        return False
    spans = case.key_span if case.options["causal"] and case.key_span else ()
    return all(end >= case.keys or end <= begin for begin, end in spans)


@pytest.mark.parametrize("backend", ["flash"], indirect=True)
def test_random_call(rare_fuzz_seed, version, backend, cases, check_attention):
    case = cases.draw(rare_fuzz_seed, [torch.float16], can_be_said)
    print(case)
    check_attention(case.inputs(), **case.keywords())


REFUSED = {
    "key_mask": {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
    "cross_mask": {"cross_mask": torch.ones(2, 7, dtype=torch.bool)},
    "query_start": {"query_start": torch.zeros(2, dtype=torch.int64)},
    "query_start_and_window": {"query_start": 12, "window": 5},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_flash_attn_cannot_say_is_refused_by_name(version, random_inputs, name):
    inputs = random_inputs(2, 4, 2, 5, 9, 7, 16, (1,), **HALF)
    with pytest.raises(ValueError, match=rf'^{name.split("_and")[0]}: got .+, takes .+ with backend="flash"'):
        attend(*inputs, **REFUSED[name])
    attend(*inputs, window=5, query_start=8)


def test_single_precision_and_cpus_are_refused(version, monkeypatch, random_inputs):
    with pytest.raises(ValueError, match=r"^q: got torch.float32, takes float16 or bfloat16"):
        attend(*random_inputs(2, 4, 2, 5, 9, 7, 16, (1,), torch.float32, torch.float32))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^q: got a tensor on cpu, takes a CUDA tensor"):
        attend(*random_inputs(2, 4, 2, 5, 9, 7, 16, (1,), **HALF))


def test_absent_it_says_how_to_install_it(nowhere, random_inputs):
    with pytest.raises(ValueError, match=r'backend="flash" needs flash-attn, .*pip install'):
        attend(*random_inputs(2, 4, 2, 5, 9, 7, 16, (1,), **HALF))


@pytest.mark.parametrize(("major", "expected"), [(8, 2), (9, 3), (10, 4), (12, 2)])
def test_the_version_written_for_a_gpu_comes_first(monkeypatch, stand_in, major, expected):
    for version in (4, 3, 2):
        for name, module in stand_in.modules(version).items():
            monkeypatch.setitem(sys.modules, name, module)
    flash_backend._installed.cache_clear()
    assert flash_backend._installed(major).version == expected
    flash_backend._installed.cache_clear()
