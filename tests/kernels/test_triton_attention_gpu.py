"""adaptive_fusion_attention compiled for the GPU, at the sizes of real models: exactness, bits, addresses, memory, waiting."""

from functools import partial

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.adaptive_fusion_attention.packing import repaired

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Batch, heads, key heads, queries, keys, cross keys, head width.
SHAPES = {
    "gqa": (8, 32, 8, 512, 512, 256, 128),
    "mha": (2, 32, 32, 1024, 1024, 256, 64),
    "long": (1, 32, 8, 2048, 2048, 256, 128),
    "chunk": (2, 32, 8, 512, 700, 256, 96),
    "wide": (2, 8, 4, 1024, 1024, 256, 256),
    "odd": (3, 6, 2, 777, 777, 203, 80),
    "decode": (8, 32, 8, 1, 1024, 256, 128),
    "no_cross": (4, 32, 8, 512, 512, 0, 128),
    "small": (4, 32, 8, 512, 512, 256, 128),
}
DTYPES = [torch.bfloat16, torch.float16]
OPTIONS = {
    "full": {"causal": False},
    "window": {"window": 200},
    "softcap": {"softcap": 3.0},
    "start": {"query_start": 40},
    "scale": {"scale": -0.2},
    "lse": {"return_lse": True},
}
RUNS = 1000
BIG = 2**31  # elements


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="triton")


def gradients(inputs, options, grad_out):
    out = attend(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, grad_out)]


@pytest.fixture
def make(cases):
    """make(shape, dtype, gate="head_and_query") -> the six inputs on the device, with gradients."""

    def build(shape, dtype, gate="head_and_query"):
        batch, heads, _, queries = SHAPES[shape][:4]
        kind = ("scalar", "head", "query", "head_and_query").index(gate)
        gate_shape = cases.gate_shapes(batch, heads, queries)[kind]
        inputs = cases.random_inputs(*SHAPES[shape], gate_shape, dtype, torch.float32)
        return [x.detach().to(DEVICE).requires_grad_() for x in inputs]

    return build


@pytest.fixture
def check(check_by_row):
    return partial(check_by_row, attend)


def masks(cases, shape, pattern):
    batch, _, _, _, keys, cross_keys, _ = SHAPES[shape]
    found = {"key_mask": cases.mask(pattern, batch, keys, 1), "cross_mask": cases.mask(pattern, batch, cross_keys, 2)}
    return {name: mask.to(DEVICE) for name, mask in found.items()}


def packing(inputs, *parts):
    """Cut the only batch row at these parts of its length. -> one batch row of inputs, cu_seqlens, cross_cu_seqlens"""
    inputs = [x.detach()[:1].requires_grad_() for x in inputs]
    lengths = inputs[0].shape[2], inputs[3].shape[2]
    bounds = [[0, *(int(part * length) for part in parts), length] for length in lengths]
    bounds = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in bounds)
    return inputs, dict(zip(("cu_seqlens", "cross_cu_seqlens"), bounds, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "small"])
def test_real_sizes(make, check, shape, dtype):
    check(make(shape, dtype, gate="scalar"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(make, check, options, dtype):
    check(make("small", dtype, gate="head"), **options)


@pytest.mark.parametrize("pattern", ["left", "right", "holes", "tiles", "one_row", "nothing"])
def test_masks(make, check, cases, pattern):
    check(make("small", torch.bfloat16, gate="query"), **masks(cases, "small", pattern))


@pytest.mark.parametrize("window", [None, 50])
def test_packed_sequences(make, check, window):
    inputs, bounds = packing(make("odd", torch.bfloat16), 0.1, 0.1, 0.35, 0.9)
    check(inputs, **bounds, window=window)


def test_wrong_bounds_are_read_as_good_ones_and_reported_later(make):
    """By a word of host memory that the device writes; nothing waits for it but this test."""
    inputs, good = packing(make("odd", torch.bfloat16), 0.2, 0.2, 0.6)
    wrong = {name: bounds.flip(0) for name, bounds in good.items()}
    read_as = {name: repaired(bounds, bounds[0].item()) for name, bounds in wrong.items()}
    grad_out = torch.randn_like(inputs[0])
    expected = gradients(inputs, read_as, grad_out)
    results = gradients(inputs, wrong, grad_out)
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
    with pytest.raises(ValueError, match=r"^cu_seqlens: got bounds in an earlier call"):
        attend(*inputs, **good)
    attend(*inputs, **good)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf], ids=str)
def test_masked_keys_never_leak(make, cases, junk):
    inputs, options = make("small", torch.bfloat16), masks(cases, "small", "holes")
    grad_out = torch.randn_like(inputs[0])
    expected = gradients(inputs, options, grad_out)
    hidden = [~options[name][:, None, :, None] for name in ("key_mask", "key_mask", "cross_mask", "cross_mask")]
    planted = [
        x.detach().masked_fill(places, junk).requires_grad_() for x, places in zip(inputs[1:5], hidden, strict=True)
    ]
    results = gradients([inputs[0], *planted, inputs[5]], options, grad_out)
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_the_same_bits_every_run(make, cases, kind):
    inputs, options = make("small", torch.bfloat16, gate="scalar"), {}
    if kind == "masked":
        options = masks(cases, "small", "random")
    if kind == "packed":
        inputs, options = packing(inputs, 0.2, 0.7)
    grad_out = torch.randn_like(inputs[0])
    first = gradients(inputs, options, grad_out)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(RUNS):
        for got, want in zip(gradients(inputs, options, grad_out), first, strict=True):
            same &= (got == want).all()  # nothing here is NaN
    assert same


@pytest.mark.parametrize("shape", ["small", "odd", "decode"])
def test_a_row_has_the_same_bits_in_any_batch(make, cases, shape):
    inputs, options = make(shape, torch.bfloat16), masks(cases, shape, "random")
    grad_out = torch.randn_like(inputs[0])
    together = gradients(inputs, options, grad_out)
    batch = inputs[0].shape[0]
    for rows in ([batch - 1], [1, 0], list(range(batch))[::-1]):
        part = [x.detach()[rows].requires_grad_() for x in inputs]
        alone = gradients(part, {name: mask[rows] for name, mask in options.items()}, grad_out[rows])
        assert all(torch.equal(got, whole[rows]) for got, whole in zip(alone, together, strict=True))


def test_a_packed_sequence_has_the_same_bits_alone(make):
    """Alone it is far shorter than the packing, which must not choose it other tiles."""
    inputs, bounds = packing(make("long", torch.bfloat16), 0.01, 0.03, 0.5)
    grad_out = torch.randn_like(inputs[0])
    together = gradients(inputs, bounds, grad_out)
    own, cross = (bounds[name].tolist() for name in ("cu_seqlens", "cross_cu_seqlens"))
    for index in range(len(own) - 1):
        mine, other = slice(*own[index : index + 2]), slice(*cross[index : index + 2])
        places = [mine, mine, mine, other, other, mine]
        part = [x.detach()[:, :, place].requires_grad_() for x, place in zip(inputs, places, strict=True)]
        _, lone_bounds = packing(part)
        alone = gradients(part, lone_bounds, grad_out[:, :, mine])
        for got, whole, place in zip(alone, together, [mine, *places], strict=True):
            assert torch.equal(got, whole[:, :, place])


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_addresses_past_32_bits(cases, axis):
    """q, k, v, the cross pair and the output's gradient: over 2^31 elements from one row, head or batch row to the last."""
    shape, strides = (2, 2, 70, 64), [2 * 70 * 64, 70 * 64, 64, 1]
    size = 2 * strides[0]
    strides[axis] = BIG // (shape[axis] - 1) + 6 * size
    span = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    memory = torch.zeros(span + 6 * size, dtype=torch.float16, device=DEVICE)  # 4.3 GB for all six, interleaved
    values = cases.random_inputs(2, 2, 2, 70, 70, 70, 64, (2, 2, 70), torch.float16, torch.float16)
    *values, gate = (x.detach().to(DEVICE) for x in values)
    values.append(torch.randn_like(values[0]))
    spread = [memory.as_strided(shape, strides, index * size).copy_(value) for index, value in enumerate(values)]
    results = []
    for *tensors, grad_out in (values, spread):
        results.append(gradients([x.detach().requires_grad_() for x in (*tensors, gate)], {}, grad_out))
    assert span > BIG and all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_nothing_waits_for_the_device(make, cases, kind):
    inputs, options = make("odd", torch.bfloat16), masks(cases, "odd", "left")
    options["query_start"] = torch.zeros(len(inputs[0]), dtype=torch.int64, device=DEVICE)
    if kind == "packed":
        inputs, options = packing(inputs, 0.5)
    grad_out = torch.randn_like(inputs[0])
    gradients(inputs, options, grad_out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(inputs, options, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_grows_with_the_length_only(make):
    """Three tensors like q (both outputs, its gradient) and the other gradients; one head's scores would be q / 2."""
    inputs = make("long", torch.bfloat16, gate="scalar")
    grad_out = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(inputs, {}, grad_out)
    taken = torch.cuda.max_memory_allocated() - before
    q_bytes, kv_bytes = (x.numel() * x.element_size() for x in (inputs[0], inputs[1]))
    assert taken <= 3.25 * q_bytes + 3 * kv_bytes
