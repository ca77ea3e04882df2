"""Rows with nothing to attend to, and masked keys that hold NaN or Inf."""

import pytest
import torch

pytestmark = pytest.mark.parametrize("backend", ["torch", "reference", "triton"], indirect=True)
JUNK = [torch.nan, torch.inf, -torch.inf, 3e38]


def random_inputs(dtype=torch.float32, queries=7, keys=9, cross_keys=5, batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 4, queries, 16), *[(batch, 2, keys, 16)] * 2, *[(batch, 2, cross_keys, 16)] * 2, (1,)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(attend, inputs, options):
    results = attend(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [*results, *torch.autograd.grad(results[0].float().square().sum(), inputs)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nothing_to_attend_to_gives_zero(attend, dtype, return_lse):
    inputs = random_inputs(dtype)
    key_mask, cross_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    key_mask[0] = False
    cross_mask[:] = False
    options = {"key_mask": key_mask, "cross_mask": cross_mask, "return_lse": return_lse}
    out, *rest = outputs_and_gradients(attend, inputs, options)
    grad_q, grad_k, grad_v, grad_cross_k, grad_cross_v, grad_gate = rest[-6:]
    for zero in (out[0], grad_q[0], grad_k[0], grad_v[0], grad_cross_k, grad_cross_v, grad_gate):
        assert torch.equal(zero, torch.zeros_like(zero))
    assert out[1].abs().min() > 0 and grad_q[1].isfinite().all()
    if return_lse:
        assert (rest[0][0] == -torch.inf).all() and (rest[1] == -torch.inf).all() and rest[0][1].isfinite().all()


def test_left_padding_gives_zero_rows_for_the_padded_queries(attend):
    inputs = random_inputs(queries=9, cross_keys=0)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, :4] = False
    out, *grads = outputs_and_gradients(attend, inputs, {"key_mask": key_mask})
    assert torch.equal(out[1, :, :4], torch.zeros(4, 4, 16)) and out[1, :, 4:].abs().min() > 0
    assert all(grad.isfinite().all() for grad in grads)


OPTIONS = {
    "causal": {},
    "not_causal": {"causal": False},
    "softcap_window": {"softcap": 3.0, "window": 4},
    "lse": {"return_lse": True},
    "start_per_row": {"query_start": torch.tensor([2, 0])},
    "start": {"query_start": 1},
}


@pytest.mark.parametrize(
    ("options", "junk"),
    [*((name, torch.nan) for name in OPTIONS), *(("softcap_window", junk) for junk in JUNK[1:])],
    ids=str,
)
def test_masked_keys_never_leak(attend, options, junk):
    inputs = random_inputs()
    key_mask = torch.tensor([[True, False, True, True, False, True, True, True, False], [False] * 3 + [True] * 6])
    cross_mask = torch.tensor([[True, True, False, False, False], [False, True, False, True, True]])
    options = {**OPTIONS[options], "key_mask": key_mask, "cross_mask": cross_mask}
    expected = outputs_and_gradients(attend, inputs, options)
    planted = [x.detach().clone() for x in inputs]
    for tensor, mask in zip(planted[1:5], (key_mask, key_mask, cross_mask, cross_mask), strict=True):
        tensor.masked_fill_(~mask[:, None, :, None], junk)
    planted = [x.requires_grad_() for x in planted]
    for got, want in zip(outputs_and_gradients(attend, planted, options), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("start", [2, torch.tensor(2), torch.tensor([2, 1])], ids=["int", "tensor", "per_row"])
def test_cache_places_that_no_query_reaches_never_leak(attend, start):
    """A static cache is longer than what it holds: places past the last query, and behind the window, hold anything."""
    inputs = random_inputs(queries=3, keys=12)
    options = {"query_start": start, "window": 2}
    expected = outputs_and_gradients(attend, inputs, options)
    planted = [x.detach().clone() for x in inputs]
    for tensor in planted[1:3]:
        tensor[:, :, 5:] = torch.nan
        tensor[:, :, :0] = torch.nan
        tensor[0, :, :1] = torch.nan  # query 2 sees 1 and 2
    planted = [x.requires_grad_() for x in planted]
    for got, want in zip(outputs_and_gradients(attend, planted, options), expected, strict=True):
        assert torch.equal(got, want)


def test_one_packed_sequence_never_leaks_into_another(attend):
    inputs = random_inputs(queries=9, batch=1)
    cuts, cross_cuts = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    options = {"cu_seqlens": cuts, "cross_cu_seqlens": cross_cuts}
    expected = outputs_and_gradients(attend, inputs, options)
    planted = [x.detach().clone() for x in inputs]
    for tensor, start in zip(planted[1:5], (4, 4, 2, 2), strict=True):
        tensor[:, :, start:] = torch.nan
    results = outputs_and_gradients(attend, [x.requires_grad_() for x in planted], options)
    for got, want, cut in zip(results[:6], expected[:6], (4, 4, 4, 4, 2, 2), strict=True):
        assert torch.equal(got[:, :, :cut], want[:, :, :cut]) and got[:, :, cut:].isnan().all()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", [1, 2, 3, 4], ids=["k", "v", "cross_k", "cross_v"])
def test_a_visible_nan_is_shown(attend, which, junk):
    inputs = [x.detach().clone() for x in random_inputs()]
    inputs[which][0, 0, 3] = junk
    masks = {"key_mask": torch.ones(2, 9, dtype=torch.bool), "cross_mask": torch.ones(2, 5, dtype=torch.bool)}
    out, grad_q, *_ = outputs_and_gradients(attend, [x.requires_grad_() for x in inputs], masks)
    first = 1 if which < 3 else 0  # query 1 is the first that sees key 3
    assert not out[0, :2, first:].isfinite().any() and not grad_q[0, :2, first:].isfinite().any()
    assert out[0, 2:].isfinite().all() and grad_q[0, 2:].isfinite().all()
    assert out[1].isfinite().all() and grad_q[1].isfinite().all()
