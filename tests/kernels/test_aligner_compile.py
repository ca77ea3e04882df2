"""The layer-wise aligner's operators under torch.compile without a graph break: the same results as eager."""

import importlib

import pytest
import torch
import torch._dynamo.testing

from layalign.kernels.layerwise_aligner import fold_key_values

OPERATORS = ["layer_mix", "stream_linear", "cross_key_values"]


def compile_anew(operator, backend="aot_eager"):
    """aot_eager: the whole of the capture and of the fake tensors, without minutes of C++."""
    torch.compiler.reset()
    return torch.compile(operator, fullgraph=True, backend=backend)


@pytest.fixture
def make(aligner_cases, device):
    """make(operator, **sizes) -> its arguments in fp32 on the device, as leaves."""

    def build(operator, **sizes):
        arguments = aligner_cases.MAKE[operator](aligner_cases.Draw(torch.float32), **sizes)

        def move(x):
            return x if x is None else x.detach().to(device).requires_grad_()

        return [[move(x) for x in argument] if isinstance(argument, list) else move(argument) for argument in arguments]

    return build


@pytest.fixture
def check(by_backend, aligner_cases):
    """check(operator, inputs, **options): outputs and gradients, compiled and not."""

    def compare(operator, inputs, compiled=None, **options):
        function = by_backend(aligner_cases.OPERATORS[operator][0])
        results = []
        for run in (function, compiled or compile_anew(function)):
            outputs = run(*inputs, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = aligner_cases.leaves(inputs)
            total = sum(x.square().sum() for x in outputs)
            results.append([*outputs, *(torch.autograd.grad(total, leaves) if leaves else ())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)

    return compare


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_layer_mix(check, make, bias, stacked):
    check("layer_mix", make("layer_mix", bias=bias, stacked=stacked))


@pytest.mark.parametrize("shared", [False, True], ids=["per_stream", "shared"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_stream_linear(check, make, bias, shared):
    check("stream_linear", make("stream_linear", bias=bias, shared=shared))


@pytest.mark.parametrize("folded", [None, False, True, "before"], ids=str)
@pytest.mark.parametrize(
    ("bias", "stacked"),
    [
        (True, False),
        (("value_biases",), True),
        pytest.param(True, True, marks=pytest.mark.thorough),
        pytest.param(("value_biases",), False, marks=pytest.mark.thorough),
    ],
    ids=["biases-lists", "value_biases-stacked", "biases-stacked", "value_biases-lists"],
)
def test_cross_key_values(check, make, bias, folded, stacked):
    inputs = make("cross_key_values", bias=bias, projected=folded != "before", stacked=stacked)
    check("cross_key_values", inputs, **({} if folded == "before" else {"folded": folded}), layers_at_once=1)


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [
        *((operator, wanted) for operator in OPERATORS for wanted in ((0,), (1,), (1, 2), ())),
        *(("cross_key_values", wanted) for wanted in ((1, 2, 3, 4), (5,))),
    ],
    ids=str,
)
def test_some_gradients(check, make, aligner_cases, operator, wanted):
    inputs = make(operator)
    check(operator, aligner_cases.wanting(inputs, wanted))


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # of Triton's no operator: it is for loading a model
def test_fold_key_values(by_backend, backend, make):
    inputs, function = make("cross_key_values")[3:], by_backend(fold_key_values)
    with torch.no_grad():
        for got, want in zip(compile_anew(function)(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_lengths_that_change_are_compiled_once_more_at_most(check, by_backend, make, aligner_cases, operator):
    """The second length makes it a symbol; no later one compiles again. Whether folding pays is asked for by hand here."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = compile_anew(by_backend(aligner_cases.OPERATORS[operator][0]), counter)
    options = {"folded": True, "layers_at_once": 1} if operator == "cross_key_values" else {}
    for length in (5, 7, 18, 6):
        check(operator, make(operator, length=length), compiled, **options)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("layout", ["contiguous", "columns", "strided", "expanded"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_operators_and_their_fakes(backend, make, aligner_cases, layout):
    """Compiled code trusts the fake operators' shapes, dtypes and strides."""
    operators = importlib.import_module("layalign.kernels.layerwise_aligner.gpu.operator")
    tests = ("test_schema", "test_faketensor")

    def laid_out(operator):
        arguments = aligner_cases.wanting(aligner_cases.laid_out(make(operator), layout), ())
        return [x if isinstance(x, list) or x is None else x.detach() for x in arguments]

    states, weight, bias = laid_out("layer_mix")
    torch.library.opcheck(operators._mix_operator, (weight, bias, states), test_utils=tests)
    grad = torch.ones((), device=weight.device).expand(len(weight), *states[0].shape)
    for wanted in ([True, True, True], [False, True, False], [True, False, True]):
        arguments = (grad, weight, bias, states, wanted)
        torch.library.opcheck(operators._mix_backward_operator, arguments, test_utils=tests)
    streams, weight, bias = laid_out("stream_linear")
    torch.library.opcheck(operators._linear_operator, (streams, weight, bias), test_utils=tests)
    grad = torch.randn(*streams.shape[:3], weight.shape[-2], device=weight.device)
    for wanted in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(operators._linear_backward_operator, (grad, streams, weight, wanted), test_utils=tests)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_keys_and_values_and_their_fakes(backend, make, aligner_cases, layout, folded):
    module = importlib.import_module("layalign.kernels.layerwise_aligner.key_values")
    tests = ("test_schema", "test_faketensor")
    arguments = aligner_cases.wanting(aligner_cases.laid_out(make("cross_key_values"), layout), ())
    counts = [len(x) if isinstance(x, list) else -1 for x in arguments]
    tensors = [x for argument in arguments for x in aligner_cases.items(argument)]
    options = (backend, folded, 1, counts)
    torch.library.opcheck(module._forward_operator, (tensors, *options), test_utils=tests)
    grad = torch.randn_like(module._forward_operator(tensors, *options))
    for wanted in ([True] * len(tensors), [index % 2 == 0 for index in range(len(tensors))]):
        torch.library.opcheck(module._backward_operator, (grad, tensors, *options, wanted), test_utils=tests)
