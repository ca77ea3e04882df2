"""The layer-wise aligner's operators: the references against loops, every backend against the oracle."""

import numpy as np
import pytest
import torch

from layalign.kernels.layerwise_aligner import (
    cross_key_values,
    cross_key_values_reference,
    fold_key_values,
    fold_key_values_reference,
    fold_pays,
    layer_mix,
    layer_mix_reference,
    stream_linear,
    stream_linear_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Encoder layers, streams, batch, length, width.
MIX_SIZES = [
    (1, 2, 1, 1, 1),
    (3, 8, 2, 5, 16),
    (12, 24, 1, 17, 40),
    (24, 64, 1, 3, 59),
    (64, 160, 1, 2, 9),
    (5, 4, 2, 0, 8),
]
# Streams, batch, length, width, width of the result.
LINEAR_SIZES = [(1, 1, 1, 1, 1), (2, 2, 7, 24, 40), (6, 1, 17, 59, 31), (3, 1, 0, 8, 4)]
CROSS_SIZES = {
    "small": {},
    "one": dict(batch=1, length=1, encoder_layers=1, encoder_width=1, llm_layers=1, llm_width=1, kv=1),
    "odd": dict(batch=3, length=7, encoder_layers=7, encoder_width=24, llm_layers=3, llm_width=40, kv=33),
    "tall": dict(batch=1, length=41, encoder_width=9, llm_width=17, kv=5),  # folding pays
    "no_tokens": dict(length=0),
}


@pytest.fixture
def check(check_against_oracle, by_backend):
    """check(operator, reference, inputs, **options): the operator by the backend."""

    def check_by_backend(operator, reference, inputs, **options):
        check_against_oracle(by_backend(operator), reference, inputs, **options)

    return check_by_backend


def slow_cross_key_values(hidden_states, mix, mix_bias, proj, proj_bias, *projections):
    """One token, one stream at a time."""
    outputs = []
    for kind in range(2):
        weights, biases = projections[kind], projections[kind + 2]
        layers = []
        for layer in range(len(weights)):
            stream = 2 * layer + kind
            tokens = np.zeros((*hidden_states[0].shape[:2], weights[layer].shape[0]))
            for place in np.ndindex(*tokens.shape[:2]):
                mixed = mix_bias[stream] + sum(mix[stream][e] * state[place] for e, state in enumerate(hidden_states))
                projected = proj.dot(np.maximum(mixed, 0)) + proj_bias
                tokens[place] = weights[layer].dot(projected) + biases[layer]
            layers.append(tokens)
        outputs.append(np.stack(layers))
    return outputs


def test_references_are_the_slow_formula(aligner_cases):
    arguments = aligner_cases.cross_inputs(aligner_cases.Draw())
    arrays = [
        [x.detach().numpy() for x in argument] if isinstance(argument, list) else argument.detach().numpy()
        for argument in arguments
    ]
    wanted = slow_cross_key_values(*arrays)
    folded = fold_key_values_reference(*arguments[3:])
    for results in (
        cross_key_values_reference(*arguments),
        cross_key_values_reference(*arguments[:3], None, None, *folded),
    ):
        for got, want in zip(results, wanted, strict=True):
            np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_reference_gradchecks(aligner_cases, stacked, bias):
    draw = aligner_cases.Draw()
    sizes = dict(batch=1, length=2, encoder_width=3, llm_width=3, kv=2)
    arguments = aligner_cases.cross_inputs(draw, **sizes, bias=bias, stacked=stacked)
    flat = aligner_cases.leaves(arguments)

    def rebuilt(*tensors):
        tensors = iter(tensors)
        return [
            [next(tensors) for _ in a] if isinstance(a, list) else a if a is None else next(tensors) for a in arguments
        ]

    assert torch.autograd.gradcheck(lambda *x: cross_key_values_reference(*rebuilt(*x)), flat)
    mixed = flat[: (1 if stacked else 3) + 1 + bias]
    assert torch.autograd.gradcheck(lambda *x: layer_mix_reference(*rebuilt(*x, *flat[len(mixed) :])[:3]), mixed)
    for shared in (False, True):
        inputs = aligner_cases.linear_inputs(draw, 2, 1, 3, 4, 3, bias=bias, shared=shared)
        assert torch.autograd.gradcheck(stream_linear_reference, [x for x in inputs if x is not None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stacked", "bias"), [(False, True), (True, False)], ids=["list", "stacked_no_bias"])
@pytest.mark.parametrize("sizes", MIX_SIZES, ids=str)
def test_layer_mix(check, aligner_cases, sizes, stacked, bias, dtype):
    inputs = aligner_cases.mix_inputs(aligner_cases.Draw(dtype), *sizes, bias=bias, stacked=stacked)
    check(layer_mix, layer_mix_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
@pytest.mark.parametrize("sizes", LINEAR_SIZES, ids=str)
def test_stream_linear(check, aligner_cases, sizes, shared, bias, dtype):
    inputs = aligner_cases.linear_inputs(aligner_cases.Draw(dtype), *sizes, bias=bias, shared=shared)
    check(stream_linear, stream_linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [None, False, True, "before"], ids=str)
@pytest.mark.parametrize("sizes", CROSS_SIZES.values(), ids=CROSS_SIZES)
def test_cross_key_values(check, aligner_cases, sizes, folded, dtype):
    """folded "before": key and value weights that take the encoder's width."""
    options, projected = ({}, False) if folded == "before" else ({"folded": folded}, True)
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(dtype), **sizes, projected=projected)
    check(cross_key_values, cross_key_values_reference, inputs, **options)


@pytest.mark.parametrize("folded", [False, True, "before"], ids=str)
@pytest.mark.parametrize("layers_at_once", [1, 2, 5])
@pytest.mark.parametrize("stacked", [False, True], ids=["lists", "stacked"])
def test_layers_at_once(check, aligner_cases, stacked, layers_at_once, folded):
    sizes = dict(llm_layers=3, stacked=stacked, projected=folded != "before")
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32), **sizes)
    options = {} if folded == "before" else {"folded": folded}
    check(cross_key_values, cross_key_values_reference, inputs, layers_at_once=layers_at_once, **options)


@pytest.mark.parametrize("folded", [False, True, "before"], ids=str)
@pytest.mark.parametrize(
    "bias", [(), ("mix_bias",), ("proj_bias",), ("key_biases",), ("value_biases", "proj_bias")], ids="+".join
)
def test_some_biases(check, aligner_cases, bias, folded):
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32), bias=bias, projected=folded != "before")
    options = {} if folded == "before" else {"folded": folded}
    check(cross_key_values, cross_key_values_reference, inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_many_layers_are_summed_in_fp32(check, aligner_cases, dtype):
    sizes = dict(llm_layers=48, batch=1, length=3, encoder_width=16, llm_width=16, kv=8)
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(dtype), **sizes)
    check(cross_key_values, cross_key_values_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False, ("key_biases",)], ids=str)
def test_fold_key_values(check, aligner_cases, bias, dtype):
    draw = aligner_cases.Draw(dtype)
    inputs = aligner_cases.cross_inputs(draw, encoder_width=24, llm_layers=3, llm_width=33, kv=17, bias=bias)[3:]
    for argument in inputs:
        for x in aligner_cases.items(argument):
            if x is not None:
                x.requires_grad_(False)
    results = fold_key_values(*inputs)
    assert all(x is None or x.stride(-1) == 1 for x in results)

    def without_none(function):
        return lambda *x, **options: tuple(y for y in function(*x, **options) if y is not None)

    check_fold = without_none(fold_key_values_reference)
    check_against = without_none(fold_key_values)
    assert len(check_fold(*inputs)) == sum(x is not None for x in results)
    check(check_against, check_fold, inputs)


def test_folded_before_is_folded(by_backend, aligner_cases):
    """The same bits, whoever folds: what `fold_key_values` makes is what the call makes itself."""
    arguments = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32))
    weights = by_backend(fold_key_values)(*arguments[3:])
    before = by_backend(cross_key_values)(*arguments[:3], None, None, *weights)
    assert all(map(torch.equal, before, by_backend(cross_key_values)(*arguments, folded=True)))


def test_masked_encoder_tokens_do_not_reach_others(by_backend, aligner_cases):
    arguments = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32))
    expected = by_backend(cross_key_values)(*arguments)
    with torch.no_grad():
        arguments[0][1][0, 2] = torch.nan
    for got, want in zip(by_backend(cross_key_values)(*arguments), expected, strict=True):
        assert got[:, 0, 2].isnan().all()
        torch.testing.assert_close(torch.cat([got[:, 0, :2], got[:, 0, 3:]], dim=1), want[:, 0, [0, 1, 3, 4]])
        torch.testing.assert_close(got[:, 1], want[:, 1])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", [(64, 48, 32), (512, 576, 192), (2048, 4096, 4096), (2048, 4096, 1024)], ids=str)
def test_folding_is_decided_by_the_number_of_operations(sizes, backward):
    encoder_width, llm_width, kv = sizes
    projections = 2 if backward else 1  # backward, a gradient for each product with the projection

    def operations(tokens, folded):
        if folded:
            return projections * (kv * llm_width * encoder_width + tokens * encoder_width * kv)
        return tokens * (projections * encoder_width * llm_width + llm_width * kv)

    decisions = [fold_pays(tokens, *sizes, backward=backward) for tokens in range(0, 16385, 32)]
    fewer = [operations(tokens, True) < operations(tokens, False) for tokens in range(0, 16385, 32)]
    assert decisions == fewer and True in decisions and False in decisions


def test_autocast(by_backend, backend, aligner_cases):
    if backend == "triton":
        pytest.skip("autocast comes before the backend, and its dtype is wrong in Triton's interpreter")
    arguments = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, values = cross_key_values(*arguments)
        mixed = layer_mix(*arguments[:3])
        streams = stream_linear(mixed, arguments[3])
        folded = fold_key_values(*arguments[3:])
    assert all(x.dtype == torch.bfloat16 for x in (keys, values, mixed, streams, *folded))
    wanted = aligner_cases.leaves(arguments)
    grads = torch.autograd.grad(keys.float().sum() + values.float().sum(), wanted)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
