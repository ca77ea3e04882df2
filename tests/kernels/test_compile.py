"""The torch backend under torch.compile without a graph break: the same results as eager."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.layerwise_aligner import cross_key_values, layer_mix, stream_linear


def leaf(*shape, number=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).requires_grad_()


def check(operator, inputs, **options):
    """aot_eager: the whole of the capture and of the fake tensors, without minutes of C++."""
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    tensors = [x for argument in inputs for x in (argument if isinstance(argument, list) else [argument])]
    results = []
    for function in (operator, compiled):
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(x.square().sum() for x in outputs if x.requires_grad)
        results.append([*outputs, *torch.autograd.grad(total, tensors)])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want)


KEY_MASK = torch.tensor([[True] * 6 + [False] * 5, [False] * 11])
CASES = {
    "plain": {},
    "masks": {"key_mask": KEY_MASK, "cross_mask": torch.tensor([[False] * 5, [True] * 3 + [False] * 2])},
    "all_true_mask": {"key_mask": torch.ones(2, 11, dtype=torch.bool)},
    "start_per_row": {"query_start": torch.tensor([0, 4])},
    "window_softcap_lse": {"window": 3, "softcap": 2.0, "return_lse": True},
    "not_causal": {"causal": False},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attention(options):
    shapes = [(2, 6, 7, 16), *[(2, 2, 11, 16)] * 2, *[(2, 2, 5, 16)] * 2, (1,)]
    inputs = [leaf(*shape, number=index) for index, shape in enumerate(shapes)]
    check(adaptive_fusion_attention, inputs, **options)


def test_packed_attention():
    shapes = [(1, 6, 7, 16), *[(1, 2, 7, 16)] * 2, *[(1, 2, 5, 16)] * 2, (6,)]
    inputs = [leaf(*shape, number=index) for index, shape in enumerate(shapes)]
    cuts = {"cu_seqlens": [0, 3, 3, 7], "cross_cu_seqlens": [0, 0, 5, 5]}
    cuts = {name: torch.tensor(values, dtype=torch.int32) for name, values in cuts.items()}
    check(adaptive_fusion_attention, inputs, **cuts, window=3)


def test_decode_without_gradients():
    inputs = [torch.randn(2, 6, 1, 16), *torch.randn(2, 2, 2, 9, 16), *torch.randn(2, 2, 2, 5, 16), torch.randn(1)]
    torch.compiler.reset()
    compiled = torch.compile(adaptive_fusion_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), adaptive_fusion_attention(*inputs))


@pytest.mark.parametrize("folded", [False, True])
def test_cross_key_values(folded):
    states = [leaf(2, 5, 8, number=index) for index in range(3)]
    weights = [leaf(4, 3), leaf(4), leaf(12, 8), leaf(12), [leaf(6, 12), leaf(6, 12)], leaf(2, 6, 12), leaf(2, 6)]
    check(cross_key_values, [states, *weights, [leaf(6), leaf(6)]], folded=folded)


def test_layer_mix_and_stream_linear():
    check(layer_mix, [[leaf(2, 5, 8, number=index) for index in range(3)], leaf(4, 3), leaf(4)])
    check(stream_linear, [leaf(4, 2, 5, 8), leaf(4, 6, 8), leaf(4, 6)])
    check(stream_linear, [leaf(4, 2, 5, 8), leaf(6, 8), leaf(6)])
