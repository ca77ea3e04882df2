"""`backend="flash"` with the real flash-attn, each version that is installed."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import (
    adaptive_fusion_attention,
    adaptive_fusion_attention_reference,
    flash_backend,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Batch, heads, key heads, queries, keys, cross keys, head width, then the options.
CALLS = {
    "prefill": ((2, 8, 2, 300, 300, 77, 128), {"return_lse": True}),
    "full": ((2, 8, 8, 129, 300, 77, 64), {"causal": False}),
    "token": ((3, 8, 2, 1, 300, 77, 128), {"return_lse": True}),
    "start": ((1, 4, 2, 65, 300, 77, 64), {"query_start": 100}),
    "window": ((1, 4, 2, 300, 300, 77, 64), {"window": 50}),
    "no_cross": ((1, 4, 2, 300, 300, 0, 64), {"return_lse": True}),
}
SPANS = ((0, 200), (130, 200), (200, 200)), ((0, 77), (10, 20), (77, 77))
CUTS = ((0, 100, 100, 333), (0, 7, 77, 77))


@pytest.fixture(params=[2, 3, 4])
def version(request, monkeypatch):
    """Only this version is looked for; skipped where it is not installed."""
    monkeypatch.setattr(flash_backend, "_ORDER", {torch.cuda.get_device_capability()[0]: (request.param,)})
    flash_backend._installed.cache_clear()
    if flash_backend._installed(torch.cuda.get_device_capability()[0]) is None:
        pytest.skip(f"flash-attn {request.param} is not installed")
    yield request.param
    flash_backend._installed.cache_clear()


@pytest.fixture
def check(check_against_oracle, cases):
    def check_call(sizes, **options):
        batch, heads, _, queries = sizes[:4]
        inputs = cases.random_inputs(*sizes, (batch, heads, queries), torch.bfloat16, torch.float32)
        inputs = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
        check_against_oracle(attend, adaptive_fusion_attention_reference, inputs, **options)

    return check_call


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="flash")


@pytest.mark.parametrize(("sizes", "options"), CALLS.values(), ids=CALLS)
def test_calls(version, check, sizes, options):
    check(sizes, **options)


def test_spans(version, check):
    span, cross_span = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in SPANS)
    check((3, 8, 2, 200, 200, 77, 64), key_span=span, cross_span=cross_span, return_lse=True)


def test_packed_sequences(version, check):
    own, cross = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in CUTS)
    check((1, 8, 2, CUTS[0][-1], CUTS[0][-1], CUTS[1][-1], 64), cu_seqlens=own, cross_cu_seqlens=cross, return_lse=True)
