"""Rows with nothing to attend to, and masked slots that hold NaN or Inf."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

BACKENDS = ["torch", "reference"]
JUNK = [torch.nan, torch.inf, -torch.inf, 3e38]


def random_inputs(dtype=torch.float32, queries=7, keys=9, cross_keys=5, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 6, queries, 16), *[(batch, 2, keys, 16)] * 2, *[(batch, 2, cross_keys, 16)] * 2, (1,)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(inputs, options):
    results = adaptive_fusion_attention(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [*results, *torch.autograd.grad(results[0].float().square().sum(), inputs)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to_gives_zero(backend, dtype, return_lse):
    inputs = random_inputs(dtype)
    key_mask, cross_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    key_mask[0] = False
    cross_mask[:] = False
    options = {"key_mask": key_mask, "cross_mask": cross_mask, "backend": backend, "return_lse": return_lse}
    out, *rest = outputs_and_gradients(inputs, options)
    grad_q, grad_k, grad_v, grad_cross_k, grad_cross_v, grad_gate = rest[-6:]
    for zero in (out[0], grad_q[0], grad_k[0], grad_v[0], grad_cross_k, grad_cross_v, grad_gate):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert out[1].abs().min() > 0 and grad_q[1].isfinite().all()
    if return_lse:
        assert (rest[0][0] == -torch.inf).all() and (rest[1] == -torch.inf).all() and rest[0][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_gives_zero_rows_for_the_padded_queries(backend):
    inputs = random_inputs(queries=9, cross_keys=0)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, :4] = False
    out, *grads = outputs_and_gradients(inputs, {"key_mask": key_mask, "backend": backend})
    assert torch.equal(out[1, :, :4], torch.zeros(6, 4, 16)) and out[1, :, 4:].abs().min() > 0
    assert all(grad.isfinite().all() for grad in grads)


OPTIONS = {
    "causal": {},
    "not_causal": {"causal": False},
    "softcap_window": {"softcap": 3.0, "window": 4},
    "lse": {"return_lse": True},
    "start_per_row": {"query_start": torch.tensor([2, 0])},
    "start": {"query_start": 1},
}


@pytest.mark.parametrize("junk", JUNK, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_slots_never_leak(backend, options, junk):
    inputs = random_inputs()
    key_mask = torch.tensor([[True, False, True, True, False, True, True, True, False], [False] * 3 + [True] * 6])
    cross_mask = torch.tensor([[True, True, False, False, False], [False, True, False, True, True]])
    options = {**options, "key_mask": key_mask, "cross_mask": cross_mask, "backend": backend}
    expected = outputs_and_gradients(inputs, options)
    planted = [x.detach().clone() for x in inputs]
    for tensor, mask in zip(planted[1:5], (key_mask, key_mask, cross_mask, cross_mask), strict=True):
        tensor.masked_fill_(~mask[:, None, :, None], junk)
    planted = [x.requires_grad_() for x in planted]
    for got, want in zip(outputs_and_gradients(planted, options), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("start", [2, torch.tensor(2), torch.tensor([2, 1])], ids=["int", "tensor", "per_row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_slots_that_no_query_reaches_never_leak(backend, start):
    """A static cache is longer than what it holds: slots past the last query, and behind the window, hold anything."""
    inputs = random_inputs(queries=3, keys=12)
    options = {"query_start": start, "window": 2, "backend": backend}
    expected = outputs_and_gradients(inputs, options)
    planted = [x.detach().clone() for x in inputs]
    for tensor in planted[1:3]:
        tensor[:, :, 5:] = torch.nan
        tensor[:, :, :0] = torch.nan
        tensor[0, :, :1] = torch.nan  # query 2 sees 1 and 2
    planted = [x.requires_grad_() for x in planted]
    for got, want in zip(outputs_and_gradients(planted, options), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_packed_sequence_never_leaks_into_another(backend):
    inputs = random_inputs(queries=9, batch=1)
    cuts, cross_cuts = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    options = {"cu_seqlens": cuts, "cross_cu_seqlens": cross_cuts, "backend": backend}
    expected = adaptive_fusion_attention(*inputs, **options)
    planted = [x.detach().clone() for x in inputs]
    for tensor, start in zip(planted[1:5], (4, 4, 2, 2), strict=True):
        tensor[:, :, start:] = torch.nan
    out = adaptive_fusion_attention(*planted, **options)
    assert torch.equal(out[:, :, :4], expected[:, :, :4]) and out[:, :, 4:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_is_shown(backend):
    inputs = [x.detach() for x in random_inputs()]
    inputs[1][0, 0, 3] = torch.nan
    out = adaptive_fusion_attention(*inputs, key_mask=torch.ones(2, 9, dtype=torch.bool), backend=backend)
    assert out[0, :3, 1:].isnan().all() and out[1].isfinite().all()
