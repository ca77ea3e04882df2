"""The compiled kernels of adaptive_fusion_attention under Inductor, CUDA graphs, other streams and compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
attend = partial(adaptive_fusion_attention, backend="triton")


def gradients(function, inputs, options):
    out = function(*inputs, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.fixture
def make(cases):
    """make(queries, keys, cross_keys) -> two rows of inputs in bf16 and their masks."""

    def build(queries, keys, cross_keys):
        sizes = (2, 8, 2, queries, keys, cross_keys, 64)
        inputs = cases.random_inputs(*sizes, (1,), torch.bfloat16, torch.float32)
        masks = {"key_mask": cases.mask("left", 2, keys, 1), "cross_mask": cases.mask("right", 2, cross_keys, 2)}
        masks = {name: mask.to(DEVICE) for name, mask in masks.items()}
        return [x.detach().to(DEVICE).requires_grad_() for x in inputs], masks

    return build


def test_auto_is_triton(make):
    inputs, masks = make(100, 100, 50)
    assert torch.equal(adaptive_fusion_attention(*inputs, **masks), attend(*inputs, **masks))


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_inductor(make, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for lengths in ((65, 65, 40), (130, 130, 77), (1, 200, 77)):
        inputs, masks = make(*lengths)
        for got, want in zip(gradients(compiled, inputs, masks), gradients(attend, inputs, masks), strict=True):
            assert torch.equal(got, want)


def test_inductor_around_the_operator(make):
    """Neighbours that Inductor fuses, transposed inputs and an expanded gradient of the output among them."""

    def block(q, k, v, cross_k, cross_v, gate, **masks):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) * 0.5 for x in (q, k, v))
        return attend(q, k, v, cross_k, cross_v, gate.tanh(), **masks).relu()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    inputs, masks = make(130, 130, 40)
    for got, want in zip(gradients(compiled, inputs, masks), gradients(block, inputs, masks), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("queries", [1, 70])
def test_cuda_graph(make, queries):
    inputs, masks = make(queries, 150, 40)
    start = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            attend(*inputs, **masks, query_start=start)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(*inputs, **masks, query_start=start)
        for position in (3, 80, 150 - queries):
            start.fill_(position)
            inputs[0].normal_()
            masks["key_mask"].logical_not_()
            graph.replay()
            assert torch.equal(out, attend(*inputs, **masks, query_start=start))


def test_backward_in_a_cuda_graph(make):
    inputs, masks = make(70, 70, 40)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(attend, inputs, masks)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = gradients(attend, inputs, masks)
    with torch.no_grad():
        inputs[1].normal_()
    graph.replay()
    for got, want in zip(captured, gradients(attend, inputs, masks), strict=True):
        assert torch.equal(got, want)


def test_another_stream(make):
    """What the operator launches and allocates follows the current stream, while the default one is busy."""
    inputs, masks = make(300, 300, 200)
    expected = gradients(attend, inputs, masks)
    torch.cuda.synchronize()
    side, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(20):
        for _ in range(5):
            matrix = torch.tanh(matrix @ matrix)
        with torch.cuda.stream(side):
            results = gradients(attend, inputs, masks)
        side.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


SANITIZED = """
import torch
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
def call(lengths, dtype, options):
    shapes = [(1, 4, lengths[0], 80), *[(1, 2, lengths[1], 80)] * 2, *[(1, 2, lengths[2], 80)] * 2, (1, 4, lengths[0])]
    inputs = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    adaptive_fusion_attention(*inputs, **options, backend="triton").float().square().sum().backward()
def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")
key_mask, cross_mask = (torch.rand(1, length, device="cuda") < 0.6 for length in (137, 53))
for dtype in (torch.bfloat16, torch.float32):
    call((137, 137, 53), dtype, {})
    call((137, 137, 53), dtype, {"key_mask": key_mask, "cross_mask": cross_mask, "window": 21})
    call((137, 137, 53), dtype, {"cu_seqlens": integers(0, 9, 9, 137), "cross_cu_seqlens": integers(0, 0, 31, 53)})
    call((1, 137, 53), dtype, {"query_start": integers(70)})
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # its own allocations, so that each end is watched
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
