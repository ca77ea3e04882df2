"""The reference of adaptive_fusion_attention against a formula in Python loops that shares no code with it."""

import math

import numpy as np
import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference


def attend_row(query, keys, values, allowed, scale, softcap):
    """One query over the allowed key indices, one number at a time. -> output row, log-sum-exp."""
    scores = {}
    for index in allowed:
        score = scale * sum(float(a) * float(b) for a, b in zip(query, keys[index], strict=True))
        scores[index] = softcap * math.tanh(score / softcap) if softcap else score
    if not scores:
        return np.zeros(len(query)), -math.inf
    total = sum(math.exp(score) for score in scores.values())
    row = sum(math.exp(score) / total * values[index] for index, score in scores.items())
    return row, math.log(total)


def slow_formula(tensors, causal, scale, window, softcap, key_mask, cross_mask, starts):
    q, k, v, cross_k, cross_v, gate = tensors
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out, self_lse, cross_lse = np.zeros(q.shape), np.zeros(q.shape[:3]), np.zeros(q.shape[:3])
    gate = np.broadcast_to(gate.reshape(-1, 1) if gate.ndim == 1 else gate, q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                position = starts[b] + i
                allowed = []
                for j in range(k.shape[2]):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    if causal and (j > position or (window and position - j >= window)):
                        continue
                    allowed.append(j)
                cross_allowed = [t for t in range(cross_k.shape[2]) if cross_mask is None or cross_mask[b, t]]
                own, self_lse[b, h, i] = attend_row(
                    q[b, h, i], k[b, h // group], v[b, h // group], allowed, scale, softcap
                )
                cross, cross_lse[b, h, i] = attend_row(
                    q[b, h, i], cross_k[b, h // group], cross_v[b, h // group], cross_allowed, scale, None
                )
                out[b, h, i] = own + gate[b, h, i] * cross
    return out, self_lse, cross_lse


def random_inputs(batch=2, heads=4, kv_heads=2, queries=3, keys=5, cross_keys=4, width=3, gate_shape=(1,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, width), *[(batch, kv_heads, keys, width)] * 2]
    shapes += [(batch, kv_heads, cross_keys, width)] * 2 + [gate_shape]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


KEY_MASK = torch.tensor([[True, False, True, True, False], [False] * 5])
CROSS_MASK = torch.tensor([[False] * 4, [True, False, True, True]])
CASES = {
    "plain": {},
    "not_causal": {"causal": False},
    "window": {"window": 2},
    "softcap": {"softcap": 0.7},
    "window_softcap_scale": {"window": 1, "softcap": 1.3, "scale": 0.9},
    "start": {"query_start": 1},
    "start_window": {"query_start": 0, "window": 2},
    "start_per_row": {"query_start": torch.tensor([2, 0])},
    "start_zero_dim": {"query_start": torch.tensor(1)},
    "start_beyond": {"query_start": 9, "window": 6},
    "masks": {"key_mask": KEY_MASK, "cross_mask": CROSS_MASK},
    "masks_not_causal": {"key_mask": KEY_MASK, "cross_mask": CROSS_MASK, "causal": False},
    "all": {
        "key_mask": KEY_MASK,
        "cross_mask": CROSS_MASK,
        "window": 2,
        "softcap": 2.0,
        "query_start": 1,
        "scale": -0.4,
    },
}


@pytest.mark.parametrize("gate_shape", [(1,), (4,), (2, 1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_reference_is_the_slow_formula(options, gate_shape):
    inputs = random_inputs(gate_shape=gate_shape)
    start = torch.as_tensor(options.get("query_start", 2)).expand(2).tolist()
    arrays = [x.detach().numpy() for x in inputs]
    masks = [None if options.get(name) is None else options[name].numpy() for name in ("key_mask", "cross_mask")]
    expected = slow_formula(
        arrays,
        options.get("causal", True),
        options.get("scale", 3**-0.5),
        options.get("window"),
        options.get("softcap"),
        *masks,
        start,
    )
    actual = adaptive_fusion_attention_reference(*inputs, **options, return_lse=True)
    np.testing.assert_allclose(actual[0].detach().numpy(), expected[0], rtol=1e-12, atol=1e-13)
    for got, want in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def test_packed_reference_is_the_slow_formula_on_each_sequence():
    q, k, v, cross_k, cross_v, gate = random_inputs(batch=1, queries=6, keys=6, cross_keys=5, gate_shape=(1, 4, 6))
    bounds, cross_bounds = [0, 2, 2, 6, 6], [0, 0, 3, 5, 5]
    actual = adaptive_fusion_attention_reference(
        q,
        k,
        v,
        cross_k,
        cross_v,
        gate,
        window=3,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        cross_cu_seqlens=torch.tensor(cross_bounds, dtype=torch.int32),
        return_lse=True,
    )
    for i in range(len(bounds) - 1):
        own, cross = slice(bounds[i], bounds[i + 1]), slice(cross_bounds[i], cross_bounds[i + 1])
        pieces = [x[:, :, own] for x in (q, k, v)] + [x[:, :, cross] for x in (cross_k, cross_v)] + [gate[:, :, own]]
        arrays = [x.detach().numpy() for x in pieces]
        expected = slow_formula(arrays, True, 3**-0.5, 3, None, None, None, [0])
        for got, want in zip(actual, expected, strict=True):
            np.testing.assert_allclose(got[:, :, own].detach().numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate_shape", [(1,), (4,), (2, 1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_reference_gradcheck(pytestconfig, options, gate_shape):
    """In a random direction; the whole Jacobian, twenty times as long, with --thorough."""
    inputs, fast = random_inputs(gate_shape=gate_shape, width=2), not pytestconfig.getoption("thorough")
    reference = adaptive_fusion_attention_reference
    assert torch.autograd.gradcheck(lambda *x: reference(*x, **options), inputs, fast_mode=fast)


def test_packed_reference_gradcheck():
    inputs = random_inputs(batch=1, heads=2, kv_heads=1, queries=5, keys=5, cross_keys=3, width=2)
    options = {
        "cu_seqlens": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "cross_cu_seqlens": torch.tensor([0, 0, 1, 3], dtype=torch.int32),
    }
    assert torch.autograd.gradcheck(lambda *x: adaptive_fusion_attention_reference(*x, **options), inputs)


def test_upcast_rounds_once_and_not_upcasting_stays_in_the_dtype():
    inputs = [x.detach().to(torch.bfloat16) for x in random_inputs(queries=5, width=16, keys=9)]
    exact = adaptive_fusion_attention_reference(*[x.double() for x in inputs])
    assert torch.equal(adaptive_fusion_attention_reference(*inputs, upcast=True), exact.to(torch.bfloat16))
    eager = adaptive_fusion_attention_reference(*inputs, upcast=False)
    assert eager.dtype == torch.bfloat16 and not torch.equal(eager, exact.to(torch.bfloat16))
