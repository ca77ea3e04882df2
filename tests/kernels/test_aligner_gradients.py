"""Gradients of the layer-wise aligner's operators: only where asked, in any strides, the same bits every run."""

import pytest
import torch

from layalign.kernels.layerwise_aligner import cross_key_values

OPERATORS = ["layer_mix", "stream_linear", "cross_key_values"]
FOLDED = {"unfolded": {"folded": False}, "folded": {"folded": True}, "before": {}}


@pytest.fixture
def check(check_against_oracle, by_backend, aligner_cases):
    """check(name, inputs, **options) of the operator of that name, by the backend."""

    def check_by_backend(name, inputs, **options):
        operator, reference = aligner_cases.OPERATORS[name]
        check_against_oracle(by_backend(operator), reference, inputs, **options)

    return check_by_backend


@pytest.fixture
def make(aligner_cases):
    """make(operator, **sizes) -> its arguments in fp32."""

    def build(operator, **sizes):
        return aligner_cases.MAKE[operator](aligner_cases.Draw(torch.float32), **sizes)

    return build


@pytest.fixture
def outputs_of(by_backend, aligner_cases):
    """outputs_of(operator, inputs, **options): always a tuple."""

    def call(operator, inputs, **options):
        outputs = by_backend(aligner_cases.OPERATORS[operator][0])(*inputs, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), ()], ids=str)
def test_layer_mix_only_where_asked(check, make, aligner_cases, wanted):
    check("layer_mix", aligner_cases.wanting(make("layer_mix"), wanted))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), ()], ids=str)
def test_stream_linear_only_where_asked(check, make, aligner_cases, wanted, shared):
    check("stream_linear", aligner_cases.wanting(make("stream_linear", shared=shared), wanted))


@pytest.mark.parametrize("folded", FOLDED)
@pytest.mark.parametrize("wanted", [(1, 2, 3, 4), (1, 2), (0,), (2,), (3,), (4,), (5,), (6,), (7, 8), ()], ids=str)
def test_cross_key_values_only_where_asked(check, make, aligner_cases, wanted, folded):
    inputs = make("cross_key_values", projected=folded != "before")
    check("cross_key_values", aligner_cases.wanting(inputs, wanted), **FOLDED[folded])


def test_keys_alone(outputs_of, make, aligner_cases):
    """Where a loss does not reach the values, gradients are those of zero gradients for values."""
    inputs = make("cross_key_values")
    keys, values = outputs_of("cross_key_values", inputs)
    leaves = aligner_cases.leaves(inputs)
    alone = torch.autograd.grad(keys.sum(), leaves, retain_graph=True)
    both = torch.autograd.grad(keys.sum() + 0 * values.sum(), leaves)
    for got, want in zip(alone, both, strict=True):
        torch.testing.assert_close(got, want)


def test_one_layer_alone(outputs_of, make, aligner_cases):
    """A layer's keys and values that are used through a view of the results, as attention uses them."""
    inputs = make("cross_key_values", llm_layers=3)
    keys, values = outputs_of("cross_key_values", inputs)
    leaves = aligner_cases.leaves(inputs)
    heads = [x[1].unflatten(-1, (2, -1)).transpose(1, 2) for x in (keys, values)]
    grads = [torch.randn(x.shape) for x in heads]
    whole = [torch.zeros(keys.shape) for _ in grads]
    for into, grad in zip(whole, grads, strict=True):
        into[1] = grad.transpose(1, 2).flatten(2)
    one = torch.autograd.grad(heads, leaves, grads, retain_graph=True)
    for got, want in zip(one, torch.autograd.grad([keys, values], leaves, whole), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", ["columns", "padded", "strided", "expanded"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_of_any_strides(check, make, aligner_cases, operator, layout):
    check(operator, aligner_cases.laid_out(make(operator), layout))


@pytest.mark.parametrize("kind", ["sum", "transposed", "strided"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_output_gradients_of_any_strides(outputs_of, make, aligner_cases, operator, kind):
    inputs = make(operator)
    outputs = outputs_of(operator, inputs)
    shape = outputs[0].shape
    if kind == "sum":  # x.sum() hands over one number, expanded
        grad = torch.ones(()).expand(shape)
    elif kind == "transposed":
        grad = torch.randn(*shape[:2], shape[3], shape[2]).mT
    else:
        grad = torch.randn(*shape[:3], 2 * shape[3])[..., ::2]
    leaves = aligner_cases.leaves(inputs)
    dense = grad.contiguous()
    results = [torch.autograd.grad(outputs, leaves, [x] * len(outputs), retain_graph=True) for x in (grad, dense)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_twice_and_after_an_input_changed(outputs_of, make, aligner_cases, operator):
    inputs = make(operator)
    outputs = outputs_of(operator, inputs)
    leaves, total = aligner_cases.leaves(inputs), sum(x.square().sum() for x in outputs)
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        inputs[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_without_gradients_are_the_same(outputs_of, make, operator):
    inputs = make(operator)
    outputs = outputs_of(operator, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = outputs_of(operator, inputs)
        assert all(map(torch.equal, plain, outputs)) and not any(x.requires_grad for x in plain)


@pytest.mark.parametrize("folded", FOLDED)
def test_results_are_two_views_of_one_buffer(make, folded):
    """What a model that wants keys and values in one tensor relies on."""
    keys, values = cross_key_values(*make("cross_key_values", projected=folded != "before"), **FOLDED[folded])
    assert keys.stride() == values.stride() and keys.stride(-1) == 1
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert values.storage_offset() == keys.storage_offset() + keys[0].numel()
