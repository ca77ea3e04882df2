"""The Hopper kernels on a Hopper GPU, forward and gradients: exactness, bits, what hides beyond spans."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

hopper = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.forward")
hopper_backward = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.backward")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Batch, heads, key heads, queries, keys, cross keys, head width.
SHAPES = {
    "gqa": (8, 32, 8, 512, 512, 256, 128),
    "mha": (2, 32, 32, 1024, 1024, 512, 64),
    "chunk": (2, 32, 8, 512, 700, 250, 128),
    "odd": (3, 6, 2, 777, 777, 203, 64),
    "one tile": (2, 4, 2, 65, 65, 1, 128),
    "no_cross": (4, 32, 8, 512, 512, 0, 128),
}
DTYPES = [torch.bfloat16, torch.float16]
OPTIONS = {
    "full": {"causal": False},
    "window": {"window": 200},
    "softcap": {"softcap": 3.0},
    "start": {"query_start": 40},
    "start per row": {"query_start": [0, 100, 700]},
    "scale": {"scale": -0.2},
    "spans": {"key_span": [[0, 700], [77, 777], [300, 300]], "cross_span": [[3, 203], [0, 0], [0, 130]]},
    "everything": {"key_span": [[0, 700], [77, 777], [5, 6]], "window": 100, "softcap": 3.0, "query_start": [9, 99, 0]},
}
RUNS = 100


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """How many calls the kernel took; it is asked for, and every test must have used it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0 alone")
    calls = []
    forward = hopper.forward
    monkeypatch.setenv("LAYALIGN_GLUON", "1")
    monkeypatch.setattr(hopper, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    yield calls
    assert calls


def attend(*inputs, **options):
    return adaptive_fusion_attention(*inputs, **options, backend="triton")


@pytest.fixture
def make(cases):
    def build(shape, dtype, gate="head_and_query"):
        batch, heads, _, queries = SHAPES[shape][:4]
        kind = ("scalar", "head", "query", "head_and_query").index(gate)
        inputs = cases.random_inputs(
            *SHAPES[shape], cases.gate_shapes(batch, heads, queries)[kind], dtype, torch.float32
        )
        return [x.detach().to(DEVICE).requires_grad_() for x in inputs]

    return build


@pytest.fixture
def check(check_by_row, monkeypatch):
    """check(inputs, **options): outputs and gradients, which the Hopper kernels must have computed where they take them."""
    calls, gradients = [], hopper_backward.key_value_gradients
    monkeypatch.setattr(hopper_backward, "key_value_gradients", lambda *x: calls.append(1) or gradients(*x))

    def check_call(inputs, **options):
        check_by_row(attend, inputs, **options)
        capped = options.get("softcap") is not None and inputs[0].shape[-1] == 128
        assert bool(calls) != capped

    return check_call


def on_device(options):
    kinds = {"query_start": torch.int64, "key_span": torch.int32, "cross_span": torch.int32}
    made = {
        name: torch.tensor(x, dtype=kinds[name], device=DEVICE) for name, x in options.items() if isinstance(x, list)
    }
    return options | made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_sizes(make, check, shape, dtype):
    check(make(shape, dtype, gate="scalar"), return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(make, check, options, dtype):
    check(make("odd", dtype), **on_device(options))


@pytest.mark.parametrize("gate", ["head", "query"])
def test_gates(make, check, gate):
    check(make("chunk", torch.bfloat16, gate=gate))


@pytest.mark.parametrize("shape", ["gqa", "mha", "odd"])
def test_the_same_bits_every_time(make, shape):
    inputs = make(shape, torch.bfloat16)
    with torch.no_grad():
        first = attend(*inputs, return_lse=True)
        for _ in range(RUNS):
            assert all(map(torch.equal, attend(*inputs, return_lse=True), first))


@pytest.mark.parametrize("shape", ["gqa", "mha", "odd"])
def test_the_same_gradients_every_time(make, shape):
    inputs = make(shape, torch.bfloat16)
    out = attend(*inputs)
    grad_out = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    for _ in range(RUNS):
        assert all(map(torch.equal, torch.autograd.grad(out, inputs, grad_out, retain_graph=True), first))


@pytest.mark.parametrize("junk", [torch.nan, torch.inf], ids=str)
def test_what_lies_outside_of_spans_never_leaks(make, junk):
    inputs, options = make("odd", torch.bfloat16), on_device(OPTIONS["spans"])
    planted = [x.detach().clone() for x in inputs]
    for number, name in ((1, "key_span"), (2, "key_span"), (3, "cross_span"), (4, "cross_span")):
        for row, (begin, end) in zip(planted[number], options[name].tolist(), strict=True):
            row[:, :begin], row[:, end:] = junk, junk
    results, grad_out = [], torch.randn_like(inputs[0])
    for tensors in (planted, inputs):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves, **options)
        results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    assert all(map(torch.equal, *results))


def test_a_row_does_not_depend_on_the_others(make):
    inputs = make("gqa", torch.bfloat16)
    with torch.no_grad():
        together = attend(*inputs)
        for row in range(3):
            assert torch.equal(attend(*(x[row : row + 1].contiguous() for x in inputs)), together[row : row + 1])


def test_no_gradients_and_gradients_give_the_same_bits(make):
    inputs = make("odd", torch.bfloat16)
    with torch.no_grad():
        without = attend(*inputs)
    assert torch.equal(attend(*inputs), without)


def test_captured_in_a_graph(make):
    inputs = [x.detach() for x in make("gqa", torch.bfloat16)]
    expected = attend(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
