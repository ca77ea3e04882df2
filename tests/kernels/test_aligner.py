"""layer_mix, stream_linear and cross_key_values: the references against loops, the torch backend against the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from layalign.kernels.layerwise_aligner import (
    cross_key_values,
    cross_key_values_reference,
    fold_pays,
    layer_mix,
    layer_mix_reference,
    stream_linear,
    stream_linear_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Draw:
    """Random leaves of one dtype and call."""

    def __init__(self, dtype=torch.float64, number=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(number)

    def __call__(self, *shape, scale=1.0):
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype).requires_grad_()

    def layers(self, count, *shape, stacked, scale=1.0):
        if stacked:
            return self(count, *shape, scale=scale)
        return [self(*shape, scale=scale) for _ in range(count)]


def cross_inputs(
    draw,
    batch=2,
    length=5,
    encoder_layers=3,
    encoder_width=8,
    llm_layers=2,
    llm_width=6,
    kv=4,
    bias=True,
    stacked=False,
):
    """The nine tensor arguments of cross_key_values."""
    streams = 2 * llm_layers
    projections = [draw.layers(llm_layers, kv, llm_width, stacked=stacked, scale=llm_width**-0.5) for _ in range(2)]
    biases = [draw.layers(llm_layers, kv, stacked=stacked) for _ in range(2)] if bias else [None, None]
    return [
        draw.layers(encoder_layers, batch, length, encoder_width, stacked=stacked),
        draw(streams, encoder_layers, scale=encoder_layers**-0.5),
        draw(streams) if bias else None,
        draw(llm_width, encoder_width, scale=encoder_width**-0.5),
        draw(llm_width) if bias else None,
        *projections,
        *biases,
    ]


def leaves(arguments):
    items = [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]
    return [x for x in items if x is not None and x.requires_grad]


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


def test_references_are_the_slow_formula():
    arguments = cross_inputs(Draw())
    arrays = [
        [x.detach().numpy() for x in argument] if isinstance(argument, list) else argument.detach().numpy()
        for argument in arguments
    ]
    for got, want in zip(cross_key_values_reference(*arguments), slow_cross_key_values(*arrays), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_reference_gradchecks(stacked, bias):
    arguments = cross_inputs(Draw(), batch=1, length=2, encoder_width=3, llm_width=3, kv=2, bias=bias, stacked=stacked)
    flat = leaves(arguments)

    def rebuilt(*tensors):
        tensors = iter(tensors)
        return [
            [next(tensors) for _ in a] if isinstance(a, list) else a if a is None else next(tensors) for a in arguments
        ]

    assert torch.autograd.gradcheck(lambda *x: cross_key_values_reference(*rebuilt(*x)), flat)
    mixed = flat[: (1 if stacked else 3) + 1 + bias]
    assert torch.autograd.gradcheck(lambda *x: layer_mix_reference(*rebuilt(*x, *flat[len(mixed) :])[:3]), mixed)
    draw = Draw()
    streams = draw(2, 1, 3, 4)
    for weight, offset in ((draw(3, 4), draw(3)), (draw(2, 3, 4), draw(2, 3))):
        inputs = (streams, weight, *([offset] if bias else []))
        assert torch.autograd.gradcheck(stream_linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("encoder_layers", "streams", "batch", "length", "width"),
    [(1, 2, 1, 1, 1), (3, 8, 2, 5, 16), (12, 24, 2, 17, 40), (24, 64, 1, 31, 59), (5, 4, 2, 0, 8)],
)
def test_layer_mix(check_against_oracle, encoder_layers, streams, batch, length, width, stacked, dtype):
    draw = Draw(dtype)
    states = draw.layers(encoder_layers, batch, length, width, stacked=stacked)
    for bias in (None, draw(streams)):
        weight = draw(streams, encoder_layers, scale=encoder_layers**-0.5)
        check_against_oracle(layer_mix, layer_mix_reference, [states, weight, bias])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("streams", "batch", "length", "width", "out_width"),
    [(1, 1, 1, 1, 1), (4, 2, 7, 24, 40), (24, 2, 13, 59, 31), (3, 1, 0, 8, 4)],
)
def test_stream_linear(check_against_oracle, streams, batch, length, width, out_width, shared, dtype):
    draw = Draw(dtype)
    leading = () if shared else (streams,)
    for bias in (None, draw(*leading, out_width)):
        weight = draw(*leading, out_width, width, scale=width**-0.5)
        check_against_oracle(
            stream_linear, stream_linear_reference, [draw(streams, batch, length, width), weight, bias]
        )


@seed(250211405)
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "length": st.sampled_from([0, 1, 2, 7, 16, 31]),
            "encoder_layers": st.integers(1, 7),
            "encoder_width": st.sampled_from([1, 8, 24, 59]),
            "llm_layers": st.integers(1, 4),
            "llm_width": st.sampled_from([2, 16, 40]),
            "kv": st.sampled_from([1, 8, 33]),
            "bias": st.booleans(),
            "stacked": st.booleans(),
        }
    ),
    dtype=st.sampled_from(DTYPES),
    folded=st.sampled_from([None, False, True]),
    number=st.integers(0, 99),
)
def test_cross_key_values(check_against_oracle, sizes, dtype, folded, number):
    arguments = cross_inputs(Draw(dtype, number), **sizes)
    check_against_oracle(cross_key_values, cross_key_values_reference, arguments, folded=folded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_many_layers_are_summed_in_fp32(check_against_oracle, dtype):
    arguments = cross_inputs(Draw(dtype), llm_layers=48, batch=1, length=3, encoder_width=16, llm_width=16, kv=8)
    check_against_oracle(cross_key_values, cross_key_values_reference, arguments)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("trained", [range(1, 5), [0], [2], [4], [5], [6], [7, 8], range(9)], ids=str)
def test_cross_key_values_gradients_only_where_asked(check_against_oracle, trained, folded):
    arguments = cross_inputs(Draw(torch.float32))
    for index, argument in enumerate(arguments):
        for tensor in argument if isinstance(argument, list) else [argument]:
            tensor.requires_grad_(index in trained)
    check_against_oracle(cross_key_values, cross_key_values_reference, arguments, folded=folded)


def test_cross_key_values_keeps_only_its_arguments():
    arguments = cross_inputs(Draw(torch.float32), llm_layers=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_key_values(*arguments)
    given_memory = {x.data_ptr() for x in leaves(arguments)}
    assert kept and all(x.data_ptr() in given_memory for x in kept)


def test_masked_encoder_tokens_do_not_reach_others():
    arguments = cross_inputs(Draw(torch.float32))
    expected = cross_key_values(*arguments)
    with torch.no_grad():
        arguments[0][1][0, 2] = torch.nan
    for got, want in zip(cross_key_values(*arguments), expected, strict=True):
        assert got[:, 0, 2].isnan().all()
        torch.testing.assert_close(torch.cat([got[:, 0, :2], got[:, 0, 3:]], dim=1), want[:, 0, [0, 1, 3, 4]])
        torch.testing.assert_close(got[:, 1], want[:, 1])


@pytest.mark.parametrize("sizes", [(64, 48, 32), (512, 576, 192), (2048, 4096, 4096), (2048, 4096, 1024)], ids=str)
def test_folding_is_decided_by_the_number_of_operations(sizes):
    encoder_width, llm_width, kv = sizes

    def operations(tokens, folded):
        if folded:
            return kv * llm_width * encoder_width + tokens * encoder_width * kv
        return tokens * (encoder_width * llm_width + llm_width * kv)

    decisions = [fold_pays(tokens, *sizes) for tokens in range(0, 4097, 32)]
    fewer = [operations(tokens, True) < operations(tokens, False) for tokens in range(0, 4097, 32)]
    assert decisions == fewer and True in decisions and False in decisions


def test_autocast():
    arguments = cross_inputs(Draw(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, values = cross_key_values(*arguments)
        mixed = layer_mix(*arguments[:3])
        streams = stream_linear(mixed, arguments[3])
    assert keys.dtype == values.dtype == mixed.dtype == streams.dtype == torch.bfloat16
    wanted = leaves(arguments)
    grads = torch.autograd.grad(keys.float().sum() + values.float().sum(), wanted)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


NAMES = "hidden_states mix_weight mix_bias proj_weight proj_bias key_weights value_weights key_biases value_biases"
CROSS = dict(zip(NAMES.split(), cross_inputs(Draw(torch.float32)), strict=True))
MIX = {"hidden_states": CROSS["hidden_states"], "weight": CROSS["mix_weight"], "bias": CROSS["mix_bias"]}
LINEAR = {"streams": torch.zeros(3, 2, 5, 8), "weight": torch.zeros(3, 4, 8), "bias": torch.zeros(3, 4)}
STATES, KEYS = CROSS["hidden_states"], CROSS["key_weights"]
MALFORMED = {
    "mix_no_states": (layer_mix, MIX, {"hidden_states": []}, "hidden_states"),
    "mix_states_none": (layer_mix, MIX, {"hidden_states": None}, "hidden_states"),
    "mix_states_number": (layer_mix, MIX, {"hidden_states": 3}, "hidden_states"),
    "mix_states_of_numbers": (layer_mix, MIX, {"hidden_states": [1, 2, 3]}, "hidden_states"),
    "mix_states_2d": (layer_mix, MIX, {"hidden_states": [torch.zeros(2, 8)] * 3}, "hidden_states"),
    "mix_stacked_3d": (layer_mix, MIX, {"hidden_states": torch.zeros(3, 5, 8)}, "hidden_states"),
    "mix_uneven_states": (
        layer_mix,
        MIX,
        {"hidden_states": [*STATES[:2], torch.zeros(2, 4, 8)]},
        r"hidden_states\[2\]",
    ),
    "mix_state_dtype": (layer_mix, MIX, {"hidden_states": [*STATES[:2], STATES[2].half()]}, r"hidden_states\[2\]"),
    "mix_weight_columns": (layer_mix, MIX, {"weight": torch.zeros(4, 2)}, "weight"),
    "mix_weight_none": (layer_mix, MIX, {"weight": None}, "weight"),
    "mix_weight_device": (layer_mix, MIX, {"weight": torch.zeros(4, 3, device="meta")}, "weight"),
    "mix_bias": (layer_mix, MIX, {"bias": torch.zeros(3)}, "bias"),
    "mix_double": (layer_mix, MIX, {"hidden_states": torch.zeros(3, 2, 5, 8).double()}, "hidden_states"),
    "mix_backend": (layer_mix, MIX, {"backend": "fast"}, "backend"),
    "linear_streams_3d": (stream_linear, LINEAR, {"streams": torch.zeros(2, 5, 8)}, "streams"),
    "linear_weight_streams": (stream_linear, LINEAR, {"weight": torch.zeros(2, 4, 8)}, "weight"),
    "linear_weight_width": (stream_linear, LINEAR, {"weight": torch.zeros(4, 7)}, "weight"),
    "linear_weight_1d": (stream_linear, LINEAR, {"weight": torch.zeros(8)}, "weight"),
    "linear_bias_shared": (stream_linear, LINEAR, {"weight": torch.zeros(4, 8)}, "bias"),
    "linear_bias_dtype": (stream_linear, LINEAR, {"bias": torch.zeros(3, 4).half()}, "bias"),
    "cross_mix_weight": (cross_key_values, CROSS, {"mix_weight": torch.zeros(3, 3)}, "mix_weight"),
    "cross_mix_bias": (cross_key_values, CROSS, {"mix_bias": torch.zeros(3)}, "mix_bias"),
    "cross_proj_weight": (cross_key_values, CROSS, {"proj_weight": torch.zeros(6, 9)}, "proj_weight"),
    "cross_proj_none": (cross_key_values, CROSS, {"proj_weight": None}, "proj_bias"),
    "cross_proj_bias": (cross_key_values, CROSS, {"proj_bias": torch.zeros(8)}, "proj_bias"),
    "cross_no_keys": (cross_key_values, CROSS, {"key_weights": []}, "key_weights"),
    "cross_keys_none": (cross_key_values, CROSS, {"key_weights": None}, "key_weights"),
    "cross_key_shape": (cross_key_values, CROSS, {"key_weights": [KEYS[0], torch.zeros(4, 5)]}, r"key_weights\[1\]"),
    "cross_key_kv": (cross_key_values, CROSS, {"key_weights": [KEYS[0], torch.zeros(5, 6)]}, r"key_weights\[1\]"),
    "cross_keys_more": (cross_key_values, CROSS, {"key_weights": [KEYS[0]] * 3}, "mix_weight"),
    "cross_values_fewer": (cross_key_values, CROSS, {"value_weights": KEYS[:1]}, "value_weights"),
    "cross_values_stacked": (cross_key_values, CROSS, {"value_weights": torch.zeros(2, 5, 6)}, "value_weights"),
    "cross_key_biases": (cross_key_values, CROSS, {"key_biases": torch.zeros(2, 5)}, "key_biases"),
    "cross_value_biases": (cross_key_values, CROSS, {"value_biases": [torch.zeros(4)]}, "value_biases"),
    "cross_value_bias_none": (cross_key_values, CROSS, {"value_biases": [torch.zeros(4), None]}, r"value_biases\[1\]"),
    "cross_folded": (cross_key_values, CROSS, {"folded": "yes"}, "folded"),
    "cross_dtype": (cross_key_values, CROSS, {"proj_weight": CROSS["proj_weight"].half()}, "proj_weight"),
}


@pytest.mark.parametrize(("operator", "good", "changes", "argument"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_call(operator, good, changes, argument):
    operator(**good)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+, takes .+"):
        operator(**{**good, **changes})


@pytest.mark.parametrize("operator", [(layer_mix, MIX), (stream_linear, LINEAR), (cross_key_values, CROSS)])
def test_backends_of_later_versions_say_what_there_is(operator):
    function, good = operator
    with pytest.raises(ValueError, match=r'backend="triton" is not available .*; available: torch, reference'):
        function(**good, backend="triton")
