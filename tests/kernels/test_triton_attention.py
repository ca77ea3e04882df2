"""What the tiles of the Triton kernels of adaptive_fusion_attention may get wrong, against the oracle."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference
from layalign.kernels.adaptive_fusion_attention.call import Call, flatten

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
# Lengths around the interpreter's tiles of 16 and 32, and primes.
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 53, 65]
DTYPES = [torch.float32, torch.float16]
FP32 = {"dtype": torch.float32, "gate_dtype": torch.float32}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("side", ["self", "cross", "chunk", "decode"])
def test_tile_boundaries(check_attention, random_inputs, side, length):
    queries, keys, cross_keys = {
        "self": (length, length, 3),
        "cross": (5, 5, length),
        "chunk": (17, 17 + length, 0),
        "decode": (1, length, length),
    }[side]
    check_attention(random_inputs(1, 2, 1, queries, keys, cross_keys, 16, (1,), **FP32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 17, 40, 59, 64, 80, 96, 127, 128, 255, 256])
def test_head_widths(check_attention, random_inputs, width, dtype):
    check_attention(random_inputs(1, 2, 1, 19, 19, 18, width, (2,), dtype, torch.float32), return_lse=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("pattern", ["left", "right", "holes", "random", "tiles", "one_row", "nothing", "everything"])
def test_masks(check_attention, cases, pattern, causal):
    inputs = cases.random_inputs(2, 1, 1, 50, 50, 67, 16, (2, 1, 50), **FP32)
    masks = {"key_mask": cases.mask(pattern, 2, 50, 3), "cross_mask": cases.mask(pattern, 2, 67, 4)}
    check_attention(inputs, **masks, causal=causal, return_lse=True)


def test_long_masks(check_attention, random_inputs):
    """A list of used tiles is made 32 at a time."""
    masks = {"key_mask": torch.arange(1100)[None] // 32 % 3 == 1, "cross_mask": torch.arange(600)[None] // 16 % 2 == 0}
    check_attention(random_inputs(1, 1, 1, 2, 1100, 600, 16, (1,), **FP32), **masks)


def test_many_packed_sequences(check_attention, random_inputs):
    """A tile's sequence is looked for among 256 at a time; most are empty here."""
    lengths, cross_lengths = torch.zeros(2, 300, dtype=torch.int32)
    lengths[[0, 3, 255, 256, 257, 299]] = torch.tensor([3, 17, 1, 2, 33, 4], dtype=torch.int32)
    cross_lengths[[3, 100, 256, 299]] = torch.tensor([18, 5, 3, 2], dtype=torch.int32)
    bounds = [torch.cat([x.new_zeros(1), x.cumsum(0, dtype=torch.int32)]) for x in (lengths, cross_lengths)]
    options = dict(zip(("cu_seqlens", "cross_cu_seqlens"), bounds, strict=True))
    check_attention(random_inputs(1, 1, 1, 60, 60, 28, 16, (1, 1, 60), **FP32), **options)


STARTS = {"last": None, "0": 0, "20": 20, "past_the_keys": 70, "per_row": torch.tensor([3, 40])}


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 32, 33, 48, 66, 2**40])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_windows(check_attention, random_inputs, window, start):
    keys = 65 if start is None else 41
    inputs = random_inputs(2, 1, 1, 37, keys, 0, 16, (1,), **FP32)
    check_attention(inputs, window=window, query_start=start)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "start", [2**40, torch.tensor(2**40), torch.tensor([0, 2**62])], ids=["int", "tensor", "per_row"]
)
def test_a_query_start_past_32_bits(check_attention, random_inputs, start, window):
    check_attention(random_inputs(2, 2, 1, 5, 18, 3, 16, (1,), **FP32), query_start=start, window=window)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("gate_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", range(4), ids=["scalar", "head", "query", "head_and_query"])
def test_gates(check_attention, cases, kind, gate_dtype, zero):
    shape = cases.gate_shapes(2, 4, 18)[kind]
    inputs = cases.random_inputs(2, 4, 2, 18, 20, 17, 16, shape, torch.float16, gate_dtype)
    inputs[5] = (inputs[5].detach() * (not zero)).requires_grad_()
    check_attention(inputs)


@pytest.mark.parametrize("gate", [0.0, 50.0])
def test_a_large_gate_leaves_the_self_gradients_exact(attend, random_inputs, gate):
    """Cross keys of 0 give q no gradient: those of q, k and v are the same whatever the gate, and as exact."""
    q, k, v, cross_k, cross_v, _ = (
        x.detach() for x in random_inputs(2, 2, 1, 5, 5, 9, 64, (1,), torch.float16, torch.float32)
    )
    rest = cross_k * 0, cross_v, torch.tensor([gate])

    def gradients(function, *tensors, **options):
        leaves = [x.requires_grad_() for x in tensors[:3]]
        out = function(*leaves, *tensors[3:], scale=0.5, **options)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    ungated = q, k, v, *rest[:2], torch.zeros(1)
    exact = gradients(adaptive_fusion_attention_reference, *(x.double() for x in ungated), upcast=False)
    eager = gradients(adaptive_fusion_attention_reference, *ungated, upcast=False)
    for got, plain, value in zip(gradients(attend, q, k, v, *rest), eager, exact, strict=True):
        rounding = torch.finfo(torch.float16).eps * value.abs().max()
        assert (got - value).abs().max() <= 2 * (plain - value).abs().max() + rounding


@pytest.mark.parametrize("softcap", [None, 0.01, 2.0, 1000.0])
@pytest.mark.parametrize("scale", [0, -0.5, 1e-3, 4.0])
def test_scales(check_attention, random_inputs, scale, softcap):
    masks = {"key_mask": torch.arange(33)[None] != 7, "cross_mask": torch.arange(20)[None] > 2}
    inputs = random_inputs(1, 2, 1, 20, 33, 20, 16, (1,), **FP32)
    check_attention(inputs, scale=scale, softcap=softcap, **masks, return_lse=True)


@pytest.mark.parametrize("layout", ["transposed", "fused", "padded", "strided", "columns", "expanded"])
def test_layouts(check_attention, cases, layout):
    inputs = cases.random_inputs(2, 4, 2, 17, 17, 18, 24, (2, 1, 17), **FP32)
    inputs = [x.detach().requires_grad_() for x in cases.laid_out([x.detach() for x in inputs], layout)]
    check_attention(inputs, key_mask=cases.mask("holes", 2, 17))


def test_masks_and_bounds_of_any_strides(attend, random_inputs, random_mask):
    masks = {"key_mask": random_mask((33, 2), 1).T, "cross_mask": random_mask((1, 40), 2)[:, ::2].expand(2, -1)}
    masks["query_start"] = torch.tensor([4, 0, 9, 0])[::2]
    inputs = random_inputs(2, 2, 1, 18, 33, 20, 16, (1,), **FP32)
    dense = {name: x.contiguous() for name, x in masks.items()}
    assert torch.equal(attend(*inputs, **masks), attend(*inputs, **dense))
    inputs = random_inputs(1, 2, 1, 33, 33, 20, 16, (1,), **FP32)
    bounds = torch.tensor([[0, 0], [5, 3], [33, 20]], dtype=torch.int32)
    bounds = {"cu_seqlens": bounds[:, 0], "cross_cu_seqlens": bounds[:, 1]}
    dense = {name: x.contiguous() for name, x in bounds.items()}
    assert torch.equal(attend(*inputs, **bounds), attend(*inputs, **dense))


@pytest.mark.parametrize("kind", ["sum", "transposed", "strided"])
def test_output_gradients_of_any_strides(attend, random_inputs, kind):
    inputs = random_inputs(2, 4, 2, 17, 17, 5, 16, (1,), **FP32)
    out = attend(*inputs)
    if kind == "sum":  # out.sum() hands over one number, expanded
        grad_out = torch.ones(()).expand(out.shape)
    elif kind == "transposed":
        grad_out = torch.randn(2, 17, 4, 16).transpose(1, 2)
    else:
        grad_out = torch.randn(2, 4, 17, 32)[..., ::2]
    expected = torch.autograd.grad(out, inputs, grad_out.contiguous(), retain_graph=True)
    results = torch.autograd.grad(out, inputs, grad_out)
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_backward_twice_and_after_an_input_changed(attend, random_inputs):
    inputs = random_inputs(1, 2, 1, 17, 17, 5, 16, (1,), **FP32)
    out = attend(*inputs)
    first, second = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with torch.no_grad():
        inputs[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_outputs_without_gradients_are_the_same(attend, random_inputs):
    inputs = random_inputs(1, 2, 1, 17, 17, 5, 16, (1,), **FP32)
    out = attend(*inputs)
    assert out.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = attend(*inputs)
        assert torch.equal(plain, out) and not plain.requires_grad


@pytest.mark.parametrize("keep", [[False, False, False], [False, True, True], [True, True, True]], ids=str)
def test_fakes_have_the_dtypes_of_what_they_stand_for(random_inputs, backend, keep):
    """Of absent results too, where queries and gate have two."""
    operators = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    inputs = [
        x.detach() for x in random_inputs(1, 2, 1, 18, 18, 5, 16, (1,), dtype=torch.float16, gate_dtype=torch.float32)
    ]
    flat = flatten(Call(*inputs, scale=0.25))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators._forward_operator, (*flat, keep), test_utils=checks)
    if not keep[1]:
        return
    out, *terms = operators._forward_operator(*flat, keep)
    for wanted in ([keep[0]] * 2 + [True] * 3 + [False] * 2, [False] * 5 + [True, False]):
        torch.library.opcheck(
            operators._backward_operator, (torch.ones_like(out), *terms, *flat, wanted), test_utils=checks
        )
