"""Operators under torch.compile without a graph break: the same results as eager."""

import pytest
import torch
import torch._dynamo.testing

from layalign.kernels.adaptive_fusion_attention.call import Call, flatten


def leaf(*shape, number=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(device).requires_grad_()


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def compile_anew(operator):
    """aot_eager: the whole of the capture and of the fake tensors, without minutes of C++."""
    torch.compiler.reset()
    return torch.compile(operator, fullgraph=True, backend="aot_eager")


def check(operator, inputs, **options):
    compiled = compile_anew(operator)
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
def test_attention(attend, device, options):
    shapes = [(2, 6, 7, 16), *[(2, 2, 11, 16)] * 2, *[(2, 2, 5, 16)] * 2, (1,)]
    inputs = [leaf(*shape, number=index, device=device) for index, shape in enumerate(shapes)]
    check(attend, inputs, **on(device, options))


def test_packed_attention(attend, device):
    shapes = [(1, 6, 7, 16), *[(1, 2, 7, 16)] * 2, *[(1, 2, 5, 16)] * 2, (6,)]
    inputs = [leaf(*shape, number=index, device=device) for index, shape in enumerate(shapes)]
    cuts = {"cu_seqlens": [0, 3, 3, 7], "cross_cu_seqlens": [0, 0, 5, 5]}
    cuts = {name: torch.tensor(values, dtype=torch.int32) for name, values in cuts.items()}
    check(attend, inputs, **on(device, cuts), window=3)


def test_decode_without_gradients(attend, device):
    shapes = [(2, 6, 1, 16), *[(2, 2, 9, 16)] * 2, *[(2, 2, 5, 16)] * 2, (1,)]
    inputs = [leaf(*shape, number=index, device=device) for index, shape in enumerate(shapes)]
    with torch.no_grad():
        torch.testing.assert_close(compile_anew(attend)(*inputs), attend(*inputs))


def test_numbers_that_change(attend, device):
    """The second value of a number makes it a symbol."""
    shapes = [(1, 2, 3, 16), *[(1, 1, 3, 16)] * 2, *[(1, 1, 2, 16)] * 2, (1,)]
    inputs = [leaf(*shape, number=index, device=device).detach() for index, shape in enumerate(shapes)]
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for options in ({"scale": 0.3, "softcap": 2.0}, {"scale": 0.4, "softcap": 3.0}, {"scale": -0.5, "softcap": 3.0}):
        torch.testing.assert_close(compiled(*inputs, **options), attend(*inputs, **options))


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_of_heads_that_change(attend, device, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=dynamic)
    for heads, key_heads in ((4, 2), (6, 2)):
        shapes = [(1, heads, 3, 16), *[(1, key_heads, 4, 16)] * 2, *[(1, key_heads, 2, 16)] * 2, (1,)]
        inputs = [leaf(*shape, number=index, device=device).detach() for index, shape in enumerate(shapes)]
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize("wanted", range(6), ids=["q", "k", "v", "cross_k", "cross_v", "gate"])
def test_one_gradient(attend, device, wanted):
    shapes = [(1, 2, 7, 16), *[(1, 1, 9, 16)] * 2, *[(1, 1, 5, 16)] * 2, (1, 2, 7)]
    inputs = [leaf(*shape, number=index, device=device).detach() for index, shape in enumerate(shapes)]
    inputs[wanted].requires_grad_()
    compiled = compile_anew(attend)
    results = [torch.autograd.grad(function(*inputs).square().sum(), inputs[wanted]) for function in (compiled, attend)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused", "padded", "strided", "columns", "expanded"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_operators_and_their_fakes(backend, cases, device, layout):
    """Compiled code trusts the fake operators' shapes, dtypes and strides."""
    operators = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    shapes = [(2, 2, 9, 16), *[(2, 1, 9, 16)] * 2, *[(2, 1, 5, 16)] * 2, (2, 1, 9)]
    inputs = [leaf(*shape, number=index).detach() for index, shape in enumerate(shapes)]
    inputs = [x.to(device) for x in cases.laid_out(inputs, layout)]
    flat = flatten(Call(*inputs, scale=0.25, window=4))
    tests = ("test_schema", "test_faketensor")
    for kept in ([False, False, False], [False, False, True], [False, True, True], [True, True, True]):
        torch.library.opcheck(operators._forward_operator, (*flat, kept), test_utils=tests)
    outputs = operators._forward_operator(*flat, [True, True, True])
    for wanted in ([*[True] * 6, False], [False, True, False, False, True, False, False]):
        arguments = (*outputs, *flat, wanted)
        torch.library.opcheck(operators._backward_operator, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_lengths_that_change_are_compiled_once_more_at_most(attend, device):
    """The second set of lengths makes them symbols; no later set compiles again."""
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    function = torch.compile(attend, fullgraph=True, backend=compiled)
    for queries, keys, cross_keys in ((5, 9, 7), (7, 8, 19), (17, 18, 9), (6, 33, 8)):
        shapes = [(2, 2, queries, 16), *[(2, 1, keys, 16)] * 2, *[(2, 1, cross_keys, 16)] * 2, (2, 1, queries)]
        inputs = [leaf(*shape, number=index, device=device) for index, shape in enumerate(shapes)]
        masks = {"key_mask": torch.arange(keys, device=device) > torch.tensor([[0], [3]], device=device)}
        results = [torch.autograd.grad(each(*inputs, **masks).square().sum(), inputs) for each in (function, attend)]
        torch.testing.assert_close(*results)
    assert compiled.frame_count <= 2


def test_constants_are_marked_as_torch_marks_them():
    from layalign.kernels.launch import constant_when_compiled

    ours, theirs = constant_when_compiled(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
