"""Where the kernels of adaptive_fusion_attention read and write: inside their tensors, also where rows lie far apart."""

import dataclasses

import numpy as np
import pytest
import torch

from layalign.kernels.launch import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="needs Triton's interpreter")
FAR = 31_230_471  # elements from one row to the next: 2^31 in 69 rows, 32 bits are too few for tiles of 128
WHICH = ["q", "k", "cross_k", "gate"]


@pytest.fixture
def gpu_tiles(monkeypatch):
    """The rows of a tile on Hopper."""
    from layalign.kernels.adaptive_fusion_attention.gpu import decode, launch_table

    for kernel, line in launch_table._INTERPRETER.items():
        monkeypatch.setitem(launch_table._INTERPRETER, kernel, dataclasses.replace(line, block_m=128, block_n=128))
    chunks = {256: {16: dataclasses.replace(launch_table._DECODE_INTERPRETER[256][16], block_n=128)}}
    monkeypatch.setattr(launch_table, "_DECODE_INTERPRETER", chunks)
    assert decode.decode_config(architecture="interpreter", dtype=torch.float16, head_dim=16, rows=1).block_n == 128


def far_apart(x):
    """x (..., S, D), or a gate (B, Hq, S), its rows FAR elements apart: pages of memory that nobody touches do not exist."""
    width, axis = (x.shape[3], 2) if x.dim() == 4 else (1, 2)
    around = x.shape[0] * x.shape[1] * width
    memory = torch.from_numpy(np.zeros((x.shape[axis] - 1) * FAR + around, dtype=np.float16))
    strides = (x.shape[1] * width, width, FAR, 1)[: x.dim()]
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.usefixtures("overflow_checked")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("queries", "which"),
    [*((70, name) for name in (*WHICH, "grad_out")), (1, "k"), (1, "cross_k")],
    ids=lambda value: {70: "prefill", 1: "decode"}.get(value, value),
)
def test_rows_far_apart(backend, gpu_tiles, interpreted, random_inputs, attend, which, queries):
    inputs = random_inputs(1, 2, 1, queries, 70, 70, 16, (1, 2, queries), torch.float16, torch.float16)
    inputs = dict(zip([*WHICH[:2], "v", "cross_k", "cross_v", "gate"], (x.detach() for x in inputs), strict=True))
    inputs["grad_out"] = torch.randn_like(inputs["q"])
    far = inputs | {which: far_apart(inputs[which])}

    def run(q, k, v, cross_k, cross_v, gate, grad_out):
        leaves = [x.detach().requires_grad_(queries > 1) for x in (q, k, v, cross_k, cross_v, gate)]
        with interpreted.guarded_addresses():
            out = attend(*leaves)
            return [out, *(torch.autograd.grad(out, leaves, grad_out) if queries > 1 else ())]

    expected = run(**inputs)  # first, so that what is kept of one call cannot serve the other
    assert all(torch.equal(got, want) for got, want in zip(run(**far), expected, strict=True))
