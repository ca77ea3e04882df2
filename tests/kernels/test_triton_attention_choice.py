"""Where the Triton kernels of adaptive_fusion_attention run, and what may choose their tiles."""

import os
import subprocess
import sys

import pytest
import torch

from layalign.kernels import launch
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.adaptive_fusion_attention.call import Call

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_neighbours_choose_no_tiles(backend, architecture, packed):
    """Other tiles add in another order: the launches for one row or sequence are those for it among many."""
    forward, backward = (
        getattr(pytest.importorskip(f"layalign.kernels.adaptive_fusion_attention.gpu.{name}"), name)
        for name in ("forward", "backward")
    )

    def launches(batch, length):
        found = []

        def record(kernel, grid, args, constants, options):
            tiles = {name: value for name, value in launch.compiled_for(constants).items() if name.startswith("BLOCK")}
            found.append((kernel.__name__, tiles, options))

        q, k, cross = (torch.empty(batch, heads, length, 64, device="meta") for heads in (8, 2, 2))
        gate, bounds = (
            torch.empty(1, device="meta"),
            torch.empty(2, dtype=torch.int32, device="meta") if packed else None,
        )
        call = Call(q, k, k, cross, cross, gate, cu_seqlens=bounds, cross_cu_seqlens=bounds, scale=0.1)
        with launch.recording(architecture, record):
            backward(q, forward(call), call, [True] * 6)
        assert len(found) >= 3
        return found

    for length in (20, 300, 5000):
        assert launches(1, length) == (launches(1, 9000) if packed else launches(64, length))


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is Triton on a GPU")
def test_auto_stays_with_torch_on_cpu_tensors(attend, backend, interpreted, random_inputs):
    inputs = random_inputs(1, 2, 1, 17, 17, 5, 16, (1,), torch.float32, torch.float32)
    with interpreted.counted_work() as work:
        adaptive_fusion_attention(*inputs)
    assert not work.tiles
    with interpreted.counted_work() as work:
        attend(*inputs)
    assert work.tiles and work.dots.total() > 0


def test_cpu_tensors_need_the_interpreter(backend):
    code = """
import torch
from layalign.kernels import launch
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
x = torch.zeros(1, 1, 2, 16)
adaptive_fusion_attention(x, x, x, x, x, torch.zeros(1), backend="triton")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ValueError") and "backend" in error and "TRITON_INTERPRET" in error


@pytest.mark.parametrize("dim, described", [(None, True), (0, True), (1, False), (2, False)])
def test_no_descriptor_of_heads_or_rows_that_are_one_expanded(backend, dim, described):
    """As the gradient of a mean over rows is: whether hardware takes a stride of 0 there, nobody has seen."""
    from layalign.kernels.adaptive_fusion_attention.gpu.arguments import Prepared

    q, k, v, cross_k, cross_v = (torch.zeros(2, 2, 8, 16, dtype=torch.float16) for _ in range(5))
    grad_out = q if dim is None else q.narrow(dim, 0, 1).expand(q.shape)
    prepared = Prepared(Call(q, k, v, cross_k, cross_v, torch.zeros(1), scale=1.0))
    assert prepared.is_plain([*prepared.tensors, grad_out]) == described
