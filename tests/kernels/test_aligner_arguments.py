"""What the layer-wise aligner's operators refuse, and how they word it."""

import pytest
import torch

from layalign.kernels.layerwise_aligner import cross_key_values, fold_key_values, layer_mix, stream_linear

zeros = torch.zeros
STATES, KEYS = [zeros(2, 5, 8) for _ in range(3)], [zeros(4, 6) for _ in range(2)]
CROSS = {
    "hidden_states": STATES,
    "mix_weight": zeros(4, 3),
    "mix_bias": zeros(4),
    "proj_weight": zeros(6, 8),
    "proj_bias": zeros(6),
    "key_weights": KEYS,
    "value_weights": KEYS,
    "key_biases": [zeros(4)] * 2,
    "value_biases": [zeros(4)] * 2,
}
MIX = {"hidden_states": CROSS["hidden_states"], "weight": CROSS["mix_weight"], "bias": CROSS["mix_bias"]}
LINEAR = {"streams": zeros(3, 2, 5, 8), "weight": zeros(3, 4, 8), "bias": zeros(3, 4)}
FOLD = {name: CROSS[name] for name in list(CROSS)[3:]}
BEFORE = CROSS | {
    "proj_weight": None,
    "proj_bias": None,
    "key_weights": zeros(2, 4, 8),
    "value_weights": zeros(2, 4, 8),
}
MALFORMED = {
    "mix_no_states": (layer_mix, MIX, {"hidden_states": []}, "hidden_states"),
    "mix_states_none": (layer_mix, MIX, {"hidden_states": None}, "hidden_states"),
    "mix_states_number": (layer_mix, MIX, {"hidden_states": 3}, "hidden_states"),
    "mix_states_of_numbers": (layer_mix, MIX, {"hidden_states": [1, 2, 3]}, "hidden_states"),
    "mix_states_2d": (layer_mix, MIX, {"hidden_states": [zeros(2, 8)] * 3}, "hidden_states"),
    "mix_stacked_3d": (layer_mix, MIX, {"hidden_states": zeros(3, 5, 8)}, "hidden_states"),
    "mix_uneven_states": (
        layer_mix,
        MIX,
        {"hidden_states": [*STATES[:2], zeros(2, 4, 8)]},
        r"hidden_states\[2\]",
    ),
    "mix_state_dtype": (layer_mix, MIX, {"hidden_states": [*STATES[:2], STATES[2].half()]}, r"hidden_states\[2\]"),
    "mix_weight_columns": (layer_mix, MIX, {"weight": zeros(4, 2)}, "weight"),
    "mix_weight_none": (layer_mix, MIX, {"weight": None}, "weight"),
    "mix_weight_device": (layer_mix, MIX, {"weight": zeros(4, 3, device="meta")}, "weight"),
    "mix_bias": (layer_mix, MIX, {"bias": zeros(3)}, "bias"),
    "mix_double": (layer_mix, MIX, {"hidden_states": zeros(3, 2, 5, 8).double()}, "hidden_states"),
    "mix_backend": (layer_mix, MIX, {"backend": "fast"}, "backend"),
    "linear_streams_3d": (stream_linear, LINEAR, {"streams": zeros(2, 5, 8)}, "streams"),
    "linear_weight_streams": (stream_linear, LINEAR, {"weight": zeros(2, 4, 8)}, "weight"),
    "linear_weight_width": (stream_linear, LINEAR, {"weight": zeros(4, 7)}, "weight"),
    "linear_weight_1d": (stream_linear, LINEAR, {"weight": zeros(8)}, "weight"),
    "linear_bias_shared": (stream_linear, LINEAR, {"weight": zeros(4, 8)}, "bias"),
    "linear_bias_dtype": (stream_linear, LINEAR, {"bias": zeros(3, 4).half()}, "bias"),
    "cross_mix_weight": (cross_key_values, CROSS, {"mix_weight": zeros(3, 3)}, "mix_weight"),
    "cross_mix_bias": (cross_key_values, CROSS, {"mix_bias": zeros(3)}, "mix_bias"),
    "cross_proj_weight": (cross_key_values, CROSS, {"proj_weight": zeros(6, 9)}, "proj_weight"),
    "cross_proj_none": (cross_key_values, CROSS, {"proj_weight": None}, "proj_bias"),
    "cross_proj_bias": (cross_key_values, CROSS, {"proj_bias": zeros(8)}, "proj_bias"),
    "cross_no_keys": (cross_key_values, CROSS, {"key_weights": []}, "key_weights"),
    "cross_keys_none": (cross_key_values, CROSS, {"key_weights": None}, "key_weights"),
    "cross_key_shape": (cross_key_values, CROSS, {"key_weights": [KEYS[0], zeros(4, 5)]}, r"key_weights\[1\]"),
    "cross_key_kv": (cross_key_values, CROSS, {"key_weights": [KEYS[0], zeros(5, 6)]}, r"key_weights\[1\]"),
    "cross_keys_more": (cross_key_values, CROSS, {"key_weights": [KEYS[0]] * 3}, "mix_weight"),
    "cross_values_fewer": (cross_key_values, CROSS, {"value_weights": KEYS[:1]}, "value_weights"),
    "cross_values_stacked": (cross_key_values, CROSS, {"value_weights": zeros(2, 5, 6)}, "value_weights"),
    "cross_key_biases": (cross_key_values, CROSS, {"key_biases": zeros(2, 5)}, "key_biases"),
    "cross_value_biases": (cross_key_values, CROSS, {"value_biases": [zeros(4)]}, "value_biases"),
    "cross_value_bias_none": (cross_key_values, CROSS, {"value_biases": [zeros(4), None]}, r"value_biases\[1\]"),
    "cross_folded": (cross_key_values, CROSS, {"folded": "yes"}, "folded"),
    "cross_layers_at_once_zero": (cross_key_values, CROSS, {"layers_at_once": 0}, "layers_at_once"),
    "cross_layers_at_once_float": (cross_key_values, CROSS, {"layers_at_once": 1.5}, "layers_at_once"),
    "fold_proj_none": (fold_key_values, FOLD, {"proj_weight": None}, "proj_weight"),
    "fold_proj_weight": (fold_key_values, FOLD, {"proj_weight": zeros(7, 8)}, "proj_bias"),
    "fold_proj_bias": (fold_key_values, FOLD, {"proj_bias": zeros(8)}, "proj_bias"),
    "fold_keys": (fold_key_values, FOLD, {"key_weights": zeros(2, 4, 7)}, "key_weights"),
    "fold_values_fewer": (fold_key_values, FOLD, {"value_weights": KEYS[:1]}, "value_weights"),
    "fold_key_biases": (fold_key_values, FOLD, {"key_biases": zeros(2, 5)}, "key_biases"),
    "fold_dtype": (fold_key_values, FOLD, {"value_biases": zeros(2, 4).half()}, "value_biases"),
    "cross_dtype": (cross_key_values, CROSS, {"proj_weight": CROSS["proj_weight"].half()}, "proj_weight"),
}


@pytest.mark.parametrize(("operator", "good", "changes", "argument"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_call(operator, good, changes, argument):
    operator(**good)
    with pytest.raises(ValueError, match=rf"^{argument}: got .+, takes .+"):
        operator(**{**good, **changes})


@pytest.mark.parametrize("backend", ["flash", "fast"])
@pytest.mark.parametrize(
    "operator", [(layer_mix, MIX), (stream_linear, LINEAR), (cross_key_values, CROSS), (fold_key_values, FOLD)]
)
def test_backends_there_are_not(operator, backend):
    function, good = operator
    with pytest.raises(ValueError, match=r"^backend.*(is not available here for \w+; available: |takes one of )"):
        function(**good, backend=backend)


def test_what_torch_computes_the_reference_takes_too():
    """Every operator, every argument: the calls above are good."""
    for function, good in (
        (layer_mix, MIX),
        (stream_linear, LINEAR),
        (cross_key_values, CROSS),
        (cross_key_values, BEFORE),
    ):
        function(**good, backend="reference")
