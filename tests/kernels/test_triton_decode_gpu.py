"""The decode kernel of adaptive_fusion_attention compiled for the GPU: exactness, bits, CUDA graphs, waiting."""

import pytest
import torch

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention, adaptive_fusion_attention_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Batch, heads, key heads, queries, keys, cross keys, head width.
SHAPES = {
    "gqa": (32, 32, 8, 1, 1024, 256, 128),
    "mha": (4, 32, 32, 1, 1000, 250, 128),
    "split": (1, 32, 8, 1, 4001, 77, 128),
    "speculative": (2, 32, 8, 5, 700, 100, 64),
    "rows_of_64": (2, 32, 8, 16, 700, 100, 128),
    "several_tiles": (1, 16, 1, 16, 300, 50, 80),
    "wide": (2, 8, 4, 1, 900, 200, 256),
    "no_cross": (2, 32, 8, 1, 900, 0, 96),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RUNS = 1000


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="triton")


@pytest.fixture
def make(cases):
    """make(shape, dtype=torch.bfloat16) -> the six inputs on the device, without gradients, and masks of every row's own."""

    def build(shape, dtype=torch.bfloat16):
        batch, heads, _, queries, keys, cross_keys, _ = SHAPES[shape]
        inputs = cases.random_inputs(*SHAPES[shape], (batch, heads, queries), dtype, torch.float32)
        masks = {
            "key_mask": cases.mask("left", batch, keys, 1),
            "cross_mask": cases.mask("right", batch, cross_keys, 2),
        }
        return [x.detach().to(DEVICE) for x in inputs], {name: mask.to(DEVICE) for name, mask in masks.items()}

    return build


@pytest.mark.parametrize("options", [{}, {"window": 200, "softcap": 3.0}], ids=["plain", "window_softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_sizes(make, check_against_oracle, shape, dtype, options):
    inputs, masks = make(shape, dtype)
    for chosen in ({}, masks):
        check_against_oracle(attend, adaptive_fusion_attention_reference, inputs, **chosen, **options, return_lse=True)


@pytest.mark.parametrize("shape", ["split", "speculative", "wide"])
def test_the_same_bits_in_any_splits(make, monkeypatch, shape):
    decode = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.decode")
    monkeypatch.setattr(plans, "enabled", False)  # in whose keys the number of splits is none
    inputs, masks = make(shape)
    results = []
    for count in (1, 2, 3, 7, 40):
        monkeypatch.setattr(decode, "split_count", lambda *sizes, count=count: count)
        results.append(attend(*inputs, **masks, window=500, return_lse=True))
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@pytest.mark.parametrize("shape", ["gqa", "mha", "speculative"])
def test_a_row_has_the_same_bits_in_any_batch(make, shape):
    inputs, masks = make(shape)
    together = attend(*inputs, **masks)
    batch = len(together)
    for rows in ([batch - 1], [1, 0], list(range(batch))[::-1]):
        alone = attend(*(x[rows] for x in inputs), **{name: mask[rows] for name, mask in masks.items()})
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("shape", ["gqa", "split"])
def test_the_same_bits_every_run(make, shape):
    inputs, masks = make(shape)
    first = attend(*inputs, **masks)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(RUNS):
        same &= (attend(*inputs, **masks) == first).all()  # nothing here is NaN
    assert same


@pytest.mark.parametrize("shape", ["gqa", "split", "speculative"])
def test_a_captured_graph_follows_the_start(make, shape):
    """One capture serves all steps of a static cache, whose unfilled part holds NaN."""
    inputs, masks = make(shape)
    q, k, v, *rest = inputs
    full = k.clone(), v.clone()
    start = torch.full((), 100, device=DEVICE)
    masks.pop("key_mask")

    def step():
        return attend(q, k, v, *rest, **masks, query_start=start)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for first in (0, 63, 64, 301):
        for cache, values in zip((k, v), full, strict=True):
            cache.copy_(values)
            cache[:, :, first + q.shape[2] :] = torch.nan
        start.fill_(first)
        graph.replay()
        assert torch.equal(out, attend(q, *full, *rest, **masks, query_start=first))


@pytest.mark.parametrize("shape", ["gqa", "split"])
def test_nothing_waits_for_the_device(make, shape):
    inputs, masks = make(shape)
    start = torch.full((len(inputs[0]),), 200, device=DEVICE)
    attend(*inputs, **masks, query_start=start)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*inputs, **masks, query_start=start)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_addresses_past_32_bits(cases, axis):
    """k, v and the cross pair: over 2^31 elements from one batch row, head or key to the last."""
    shape, strides = (2, 2, 70, 64), [2 * 70 * 64, 70 * 64, 64, 1]
    size = 2 * strides[0]
    strides[axis] = 2**31 // (shape[axis] - 1) + 4 * size
    span = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    memory = torch.zeros(span + 4 * size, dtype=torch.float16, device=DEVICE)
    inputs = cases.random_inputs(2, 4, 2, 1, 70, 70, 64, (1,), torch.float16, torch.float32)
    q, *values, gate = (x.detach().to(DEVICE) for x in inputs)
    spread = [memory.as_strided(shape, strides, index * size).copy_(value) for index, value in enumerate(values)]
    assert span > 2**31 and torch.equal(attend(q, *spread, gate), attend(q, *values, gate))
