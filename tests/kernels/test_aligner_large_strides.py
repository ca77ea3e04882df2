"""Views whose strides times a tile pass 2^31 elements: the aligner's kernels compute such offsets in 64 bits.

The memory is a sparse file, mapped: only pages with numbers exist. It starts 2^31 elements before the view, so that an
offset that wrapped around reads zeros there instead of ending the process.
"""

import mmap

import pytest
import torch

from layalign.kernels.layerwise_aligner import layer_mix, stream_linear

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
STEP = 2**27 + 8  # 16 of them pass 2^31: an interpreted tile has 32 rows


@pytest.fixture
def spread(request, device, tmp_path):
    """spread(x, dim) -> the same values, STEP elements from one index of `dim` to the next."""
    if device.type != "cpu":
        pytest.skip("the GPU's tests have sizes of their own")
    request.getfixturevalue("overflow_checked")

    def copy(x, dim):
        size = (2**31 + STEP * x.shape[dim]) * x.element_size()
        with open(tmp_path / "memory", "w+b") as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        flat = torch.frombuffer(memory, dtype=x.dtype)
        strides = [1] * x.dim()
        for other in reversed([other for other in range(x.dim()) if other != dim]):
            strides[other] = 1 if other == x.dim() - 1 or dim == x.dim() - 1 else x.shape[-1]
        strides[dim] = STEP
        return flat.as_strided(x.shape, strides, 2**31).copy_(x)

    return copy


@pytest.mark.parametrize("far", ["weight rows", "weight columns", "bias"])
def test_parameters_of_the_mix(by_backend, spread, far):
    states = [torch.randn(1, 3, 5, dtype=torch.float16) for _ in range(20)]
    weight, bias = torch.randn(20, 20, dtype=torch.float16), torch.randn(20, dtype=torch.float16)
    expected = by_backend(layer_mix)(states, weight, bias)
    if far == "bias":
        bias = spread(bias, 0)
    else:
        weight = spread(weight, ("weight rows", "weight columns").index(far))
    assert max(weight.stride() + bias.stride()) == STEP
    assert torch.equal(by_backend(layer_mix)(states, weight, bias), expected)


@pytest.mark.parametrize("far", ["weight groups", "weight rows", "bias"])
def test_operands_of_the_products(by_backend, spread, far):
    groups = 20 if far != "weight rows" else 1
    streams = torch.randn(groups, 1, 3, 5, dtype=torch.float16)
    weight = torch.randn(groups, 20, 5, dtype=torch.float16)
    bias = torch.randn(groups, 20, dtype=torch.float16)
    expected = by_backend(stream_linear)(streams, weight, bias)
    if far == "bias":
        bias = spread(bias, 0)
    else:
        weight = spread(weight, ("weight groups", "weight rows").index(far))
    assert max(weight.stride() + bias.stride()) == STEP
    assert torch.equal(by_backend(stream_linear)(streams, weight, bias), expected)
