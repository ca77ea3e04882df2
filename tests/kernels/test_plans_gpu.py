"""Plans of adaptive_fusion_attention on a GPU: direct launches, the same bits as by the long way, and what they must not disturb."""

import pytest
import torch

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CALLS = {  # queries, keys, cross keys, whether with gradients
    "decode": (1, 700, 100, False),
    "prefill": (300, 300, 100, False),
    "training": (300, 300, 100, True),
}


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="triton")


@pytest.fixture
def make(cases):
    """make(call, number) -> inputs on the device and options with masks, other values for each number."""

    def build(call, number=0, masked=False):
        queries, keys, cross_keys, trained = CALLS[call]
        shapes = cases.shapes_of(2, 8, 2, queries, keys, cross_keys, 64)
        inputs = cases.random_tensors(number, shapes, (8,), torch.bfloat16, torch.float32)
        inputs = [x.detach().to(DEVICE).requires_grad_(trained) for x in inputs]
        masks = {"key_mask": cases.mask("holes", 2, keys, number), "cross_mask": cases.mask("left", 2, cross_keys)}
        return inputs, {name: mask.to(DEVICE) for name, mask in masks.items()} if masked else {}

    return build


def results(inputs, options):
    out = attend(*inputs, **options)
    leaves = [x for x in inputs if x.requires_grad]
    return [out, *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else ())]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("call", CALLS)
def test_direct_launches_give_the_same_bits(make, monkeypatch, call, masked):
    """The first call takes the long way, the second is rehearsed, the third and later ones are launched directly."""
    operator = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    operator.PLANS.clear()
    direct, launch = [], plans.Plan._launch_directly

    def note(self, described, made):
        direct.append(launch(self, described, made))
        return direct[-1]

    monkeypatch.setattr(plans.Plan, "_launch_directly", note)
    calls = [make(call, number, masked) for number in range(5)]
    got = [results(*one) for one in calls]
    assert direct and all(direct)
    monkeypatch.setattr(plans, "enabled", False)
    for mine, one in zip(got, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, results(*one), strict=True))


def test_a_growing_cache_in_other_streams(make):
    """Each stream's launches are its own."""
    inputs, _ = make("decode")
    want = [attend(inputs[0], inputs[1][:, :, :n], inputs[2][:, :, :n], *inputs[3:]) for n in range(600, 640)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = [attend(inputs[0], inputs[1][:, :, :n], inputs[2][:, :, :n], *inputs[3:]) for n in range(600, 640)]
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("call", ["decode", "prefill"])
def test_planned_calls_are_captured(make, call):
    inputs, masks = make(call, masked=True)
    want = [attend(*inputs, **masks) for _ in range(4)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs, **masks)
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
