"""Bounds of packed sequences that nobody may look at, as on a GPU: whatever they hold, no address outside the tensors, no row
without a value, and a later call that says what was wrong."""

import contextlib

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention, call, torch_backend
from layalign.kernels.adaptive_fusion_attention.packing import repaired

LENGTH, CROSS = 70, 37
LAST, LEAST = 2**31 - 1, -(2**31)
GOOD = ([0, 20, 20, 70], [0, 5, 37, 37])
# The bounds, and what they are read as.
WRONG = {
    "falling": ([0, 50, 30, 70], [0, 50, 50, 70]),
    "negative": ([0, -3, 30, 70], [0, 0, 30, 70]),
    "past_the_end": ([0, 20, 90, 70], [0, 20, 70, 70]),
    "begins_late": ([9, 20, 30, 70], [0, 20, 30, 70]),
    "ends_early": ([0, 20, 30, 60], [0, 20, 30, 70]),
    "ends_late": ([0, 20, 30, 71], [0, 20, 30, 70]),
    "farthest": ([LAST, LEAST, LAST, LEAST], [0, 0, 70, 70]),
    "nonsense": ([7, LEAST, 33, 12], [0, 0, 33, 70]),
}


def bounds(values):
    return torch.tensor(values, dtype=torch.int32)


def options(own, cross):
    masks = {"key_mask": torch.arange(LENGTH)[None] % 3 > 0, "cross_mask": torch.arange(CROSS)[None] % 5 > 0}
    return {"cu_seqlens": bounds(own), "cross_cu_seqlens": bounds(cross), "return_lse": True, **masks}


def outputs_and_gradients(attend, inputs, options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, *lse = attend(*inputs, **options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *lse, *torch.autograd.grad(out, inputs, grad_out)]


@pytest.fixture
def inputs(random_inputs):
    return random_inputs(1, 2, 1, LENGTH, LENGTH, CROSS, 16, (1, 2, LENGTH), torch.float32, torch.float32)


@pytest.fixture
def unseen(monkeypatch):
    """The values of tensors may not be looked at, as those on a GPU."""
    monkeypatch.setattr(call, "may_look", lambda bounds: False)
    monkeypatch.setattr(torch_backend, "_can_look", lambda tensor: False)


@pytest.fixture
def guarded(request, backend):
    """A context in which no address may lie outside the tensors; where there is no interpreter nobody can tell."""
    interpreting = request.getfixturevalue("interpreted") if backend == "triton" else None
    return getattr(interpreting, "guarded_addresses", contextlib.nullcontext)


@pytest.fixture
def faults(backend):
    """Where calls leave their notes, without one from before the test; none of the test's stays."""
    if backend != "triton":
        yield None
        return
    from layalign.kernels.adaptive_fusion_attention.gpu import packing

    packing._faults.cache_clear()
    yield packing._faults(torch.device("cpu"))
    packing._faults.cache_clear()


@pytest.mark.usefixtures("unseen", "faults")
@pytest.mark.parametrize("side", ["cu_seqlens", "cross_cu_seqlens"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_any_bounds_are_read_as_good_ones(backend, attend, inputs, guarded, wrong, side):
    given, read_as = wrong
    if side == "cu_seqlens":
        given, read_as = (given, GOOD[1]), (read_as, GOOD[1])
    else:
        given, read_as = ([x if abs(x) > 10**6 else x - 33 * (x >= 60) for x in values] for values in wrong)
        given, read_as = (GOOD[0], given), (GOOD[0], [min(x, CROSS) for x in read_as])
    expected = outputs_and_gradients(attend, inputs, options(*read_as))
    with guarded():
        results = outputs_and_gradients(attend, inputs, options(*given))
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want) and not got.isnan().any()


@pytest.mark.usefixtures("unseen", "faults")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["cu_seqlens", "cross_cu_seqlens"])
def test_a_later_call_says_what_was_wrong(backend, attend, inputs, name):
    good = options(*GOOD)
    wrong = good | {name: good[name].flip(0)}
    attend(*inputs, **good)
    attend(*inputs, **wrong)  # on a GPU it has not run yet when it returns
    with pytest.raises(ValueError, match=rf"^{name}: got bounds in an earlier call .+, takes .+"):
        attend(*inputs, **good)
    attend(*inputs, **good)


@pytest.mark.usefixtures("unseen", "faults")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_first_call_may_be_in_inference_mode(backend, attend, inputs):
    """Its note is read, and taken down, by one that is not."""
    from layalign.kernels.adaptive_fusion_attention.gpu import packing

    packing._faults.cache_clear()
    good = options(*GOOD)
    with torch.inference_mode():
        attend(*inputs, **good | {"cu_seqlens": good["cu_seqlens"].flip(0)})
    with pytest.raises(ValueError, match=r"^cu_seqlens: got bounds in an earlier call"):
        attend(*inputs, **good)
    attend(*inputs, **good)


def test_good_bounds_stay_as_they_are():
    for count, length in ((1, 0), (1, 5), (4, 0), (4, 7), (600, 1000)):
        cuts = torch.randint(length + 1, (count - 1,), generator=torch.Generator().manual_seed(count)).sort().values
        good = torch.cat([torch.tensor([0]), cuts, torch.tensor([length])]).int()
        assert torch.equal(repaired(good, length), good)
    assert torch.equal(repaired(bounds([0]), 0), bounds([0]))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_kernel_repairs_as_the_operators_do(backend, unseen, faults, inputs):
    """More bounds than the kernel takes at a time."""
    from layalign.kernels.adaptive_fusion_attention.call import Call
    from layalign.kernels.adaptive_fusion_attention.gpu.packing import repaired_bounds

    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 255, 256, 257, 600):
        given = [torch.randint(-20, 110, (count + 1,), generator=generator).int() for _ in range(2)]
        read = repaired_bounds(Call(*inputs, cu_seqlens=given[0], cross_cu_seqlens=given[1]))
        for got, values, length in zip(read, given, (LENGTH, CROSS), strict=True):
            assert torch.equal(got, repaired(values, length))
        faults.zero_()


@pytest.mark.parametrize("name", ["cu_seqlens", "cross_cu_seqlens"])
def test_no_sequence_holds_no_position(monkeypatch, inputs, name):
    monkeypatch.setattr(call, "may_look", lambda bounds: False)
    empty = [x[:, :, :0] if name == "cross_cu_seqlens" and place < 3 else x for place, x in enumerate(inputs[:5])]
    gate = inputs[5][:, :, : empty[0].shape[2]]
    with pytest.raises(ValueError, match=rf"^{name}: got no sequence for \d+ positions, takes .+"):
        adaptive_fusion_attention(*empty, gate, cu_seqlens=bounds([0]), cross_cu_seqlens=bounds([0]), backend="torch")


@pytest.mark.parametrize("own", [{"softcap": 3.0}, {"sink": True}, {}], ids=["softcap", "sink", "plain"])
def test_a_sequence_without_cross_keys_beside_one_with_some(attend, random_inputs, own):
    """What is computed by hand has a log-sum-exp for the one and none for the other."""
    inputs = random_inputs(1, 2, 1, 6, 6, 3, 16, (1,), torch.float32, torch.float32)
    own = own | ({"sink": torch.tensor([0.3, -1.0])} if "sink" in own else {})
    own |= {"cu_seqlens": bounds([0, 3, 6]), "cross_cu_seqlens": bounds([0, 3, 3])}
    with torch.no_grad():
        found = attend(*inputs, **own)
        torch.testing.assert_close(found, adaptive_fusion_attention(*inputs, **own, backend="reference"))
