"""Malformed calls of adaptive_fusion_attention: each is a ValueError that names the argument and says what it takes."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

B, HQ, HKV, S, N, T, D = 2, 6, 2, 3, 5, 4, 16


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


GOOD = {
    "q": tensor(B, HQ, S, D),
    "k": tensor(B, HKV, N, D),
    "v": tensor(B, HKV, N, D),
    "cross_k": tensor(B, HKV, T, D),
    "cross_v": tensor(B, HKV, T, D),
    "gate": tensor(1),
}
PACKED = {
    **GOOD,
    "q": tensor(1, HQ, N, D),
    "k": tensor(1, HKV, N, D),
    "v": tensor(1, HKV, N, D),
    "cross_k": tensor(1, HKV, T, D),
    "cross_v": tensor(1, HKV, T, D),
    "cu_seqlens": bounds(0, 2, N),
    "cross_cu_seqlens": bounds(0, 0, T),
}
DOUBLE = {name: value.double() for name, value in GOOD.items()}

# What is wrong: the changed arguments, the argument that the message must start with.
MALFORMED = {
    "q_none": ({"q": None}, "q"),
    "q_array": ({"q": [[1.0]]}, "q"),
    "q_3d": ({"q": tensor(HQ, S, D)}, "q"),
    "q_integers": ({"q": tensor(B, HQ, S, D, dtype=torch.int64)}, "q"),
    "q_float64": (DOUBLE, "q"),
    "q_too_wide": ({name: tensor(*GOOD[name].shape[:3], 257) for name in ("q", "k", "v", "cross_k", "cross_v")}, "q"),
    "k_none": ({"k": None}, "k"),
    "k_half": ({"k": tensor(B, HKV, N, D, dtype=torch.float16)}, "k"),
    "k_device": ({"k": tensor(B, HKV, N, D, device="meta")}, "k"),
    "k_batch": ({"k": tensor(B + 1, HKV, N, D)}, "k"),
    "k_width": ({"k": tensor(B, HKV, N, D + 1)}, "k"),
    "k_heads": ({"k": tensor(B, 4, N, D)}, "k"),
    "k_no_heads": ({"k": tensor(B, 0, N, D)}, "k"),
    "k_fewer_than_q": ({"k": tensor(B, HKV, S - 1, D)}, "k"),
    "v_length": ({"v": tensor(B, HKV, N + 1, D)}, "v"),
    "v_heads": ({"v": tensor(B, HKV + 1, N, D)}, "v"),
    "cross_k_heads": ({"cross_k": tensor(B, HKV + 1, T, D)}, "cross_k"),
    "cross_k_batch": ({"cross_k": tensor(B + 1, HKV, T, D)}, "cross_k"),
    "cross_mask_of_other_rows": (
        {
            "cross_k": tensor(1, HKV, T, D),
            "cross_v": tensor(1, HKV, T, D),
            "cross_mask": torch.ones(B, T, dtype=torch.bool),
        },
        "cross_mask",
    ),
    "cross_k_2d": ({"cross_k": tensor(T, D)}, "cross_k"),
    "cross_v_length": ({"cross_v": tensor(B, HKV, T - 1, D)}, "cross_v"),
    "cross_v_dtype": ({"cross_v": tensor(B, HKV, T, D, dtype=torch.bfloat16)}, "cross_v"),
    "gate_number": ({"gate": 0.5}, "gate"),
    "gate_no_dim": ({"gate": tensor()}, "gate"),
    "gate_shape": ({"gate": tensor(B, HQ)}, "gate"),
    "gate_half": ({"gate": tensor(1, dtype=torch.float16)}, "gate"),
    "gate_device": ({"gate": tensor(1, device="meta")}, "gate"),
    "causal_number": ({"causal": 1}, "causal"),
    "scale_text": ({"scale": "0.1"}, "scale"),
    "scale_nan": ({"scale": float("nan")}, "scale"),
    "window_zero": ({"window": 0}, "window"),
    "window_negative": ({"window": -3}, "window"),
    "window_float": ({"window": 2.0}, "window"),
    "window_bool": ({"window": True}, "window"),
    "window_not_causal": ({"window": 2, "causal": False}, "window"),
    "softcap_zero": ({"softcap": 0.0}, "softcap"),
    "softcap_negative": ({"softcap": -1}, "softcap"),
    "softcap_inf": ({"softcap": float("inf")}, "softcap"),
    "key_mask_float": ({"key_mask": tensor(B, N)}, "key_mask"),
    "key_mask_4d": ({"key_mask": tensor(B, 1, S, N, dtype=torch.bool)}, "key_mask"),
    "key_mask_length": ({"key_mask": tensor(B, S, dtype=torch.bool)}, "key_mask"),
    "key_mask_device": ({"key_mask": tensor(B, N, dtype=torch.bool, device="meta")}, "key_mask"),
    "cross_mask_length": ({"cross_mask": tensor(B, N, dtype=torch.bool)}, "cross_mask"),
    "cross_mask_list": ({"cross_mask": [[True] * T] * B}, "cross_mask"),
    "query_start_negative": ({"query_start": -1}, "query_start"),
    "query_start_float": ({"query_start": 1.0}, "query_start"),
    "query_start_float_tensor": ({"query_start": tensor(B)}, "query_start"),
    "query_start_shape": ({"query_start": bounds(0, 0, 0)}, "query_start"),
    "return_lse_none": ({"return_lse": None}, "return_lse"),
    "backend_unknown": ({"backend": "cuda"}, "backend"),
    "cu_seqlens_batch": ({"cu_seqlens": bounds(0, S), "cross_cu_seqlens": bounds(0, T)}, "cu_seqlens"),
    "cu_seqlens_alone": ({**PACKED, "cross_cu_seqlens": None}, "cross_cu_seqlens"),
    "cross_cu_seqlens_alone": ({**PACKED, "cu_seqlens": None}, "cu_seqlens"),
    "cu_seqlens_int64": ({**PACKED, "cu_seqlens": bounds(0, 2, N, dtype=torch.int64)}, "cu_seqlens"),
    "cu_seqlens_list": ({**PACKED, "cu_seqlens": [0, 2, N]}, "cu_seqlens"),
    "cu_seqlens_empty": ({**PACKED, "cu_seqlens": bounds()}, "cu_seqlens"),
    "cu_seqlens_end": ({**PACKED, "cu_seqlens": bounds(0, 2, N - 1)}, "cu_seqlens"),
    "cu_seqlens_start": ({**PACKED, "cu_seqlens": bounds(1, 2, N)}, "cu_seqlens"),
    "cu_seqlens_falling": ({**PACKED, "cu_seqlens": bounds(0, N + 1, N)}, "cu_seqlens"),
    "cross_cu_seqlens_count": ({**PACKED, "cross_cu_seqlens": bounds(0, T)}, "cross_cu_seqlens"),
    "cross_cu_seqlens_end": ({**PACKED, "cross_cu_seqlens": bounds(0, 1, T + 1)}, "cross_cu_seqlens"),
    "packed_query_start": ({**PACKED, "query_start": 0}, "query_start"),
    "packed_more_keys": ({**PACKED, "k": tensor(1, HKV, 9, D), "v": tensor(1, HKV, 9, D)}, "cu_seqlens"),
}


@pytest.mark.parametrize(("changes", "argument"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_call(changes, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+, takes .+"):
        adaptive_fusion_attention(**{**GOOD, **changes})


@pytest.mark.parametrize("call", [GOOD, PACKED], ids=["dense", "packed"])
def test_the_calls_that_are_malformed_above_are_good_unchanged(call):
    assert adaptive_fusion_attention(**call).shape == call["q"].shape


def test_float64_is_for_the_reference():
    assert adaptive_fusion_attention(**DOUBLE, backend="reference").dtype == torch.float64


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"], indirect=True)
def test_query_starts_at_the_end_of_their_range(attend, queries, window):
    """Past the last key all starts are one, whatever is added to them."""
    shapes = [(2, 2, queries, 16), *[(2, 1, 6, 16)] * 2, *[(2, 1, 3, 16)] * 2, (1,)]
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number, shape in enumerate(shapes)
    ]
    expected = attend(*inputs, query_start=1000, window=window)
    for start in (
        2**63 - 1,
        torch.tensor(2**63 - 1),
        torch.full((2,), 2**63 - 2),
        torch.tensor(2**31 - 1, dtype=torch.int32),
    ):
        assert torch.equal(attend(*inputs, query_start=start, window=window), expected)
    lowest = torch.full((2,), -(2**63))
    nothing = attend(*inputs, query_start=torch.tensor(-queries), window=window)
    assert torch.equal(attend(*inputs, query_start=lowest, window=window), nothing)
