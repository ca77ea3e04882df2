"""`sink` of adaptive_fusion_attention: a score beside those of the keys in the self term's softmax, without a value."""

import pytest
import torch

from layalign import adaptive_fusion_attention
from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference, flash_backend
from layalign.kernels.adaptive_fusion_attention.call import Call, flatten

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP32 = {"dtype": torch.float32, "gate_dtype": torch.float32}
# batch, heads, key heads, queries, keys, cross keys, width: whole sequences, a chunk, a few queries (the decode kernel)
SHAPES = {
    "sequence": (2, 2, 1, 17, 17, 5, 16),
    "alone": (1, 2, 2, 17, 17, 0, 24),
    "chunk": (1, 2, 1, 18, 40, 5, 16),
    "step": (1, 4, 2, 1, 37, 12, 16),
    "few": (1, 4, 2, 5, 20, 0, 16),
}
MASK = torch.ones(2, 17, dtype=torch.bool)
MASK[0, :6] = False
MASK[1] = False  # a row that sees nothing but its sink
OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "full": {"causal": False, "scale": -0.3},
    "mask": {"key_mask": MASK},
    "span": {"key_span": torch.tensor([[3, 15], [7, 7]], dtype=torch.int32)},
    "start": {"query_start": torch.tensor([0, -30])},
}


def sink_of(heads, dtype=torch.float32, scale=2.0):
    return (torch.randn(heads, generator=torch.Generator().manual_seed(41)) * scale).to(dtype).requires_grad_()


@pytest.fixture
def check(check_against_oracle, attend):
    """check(inputs, sink, **options): outputs and gradients, the sink's among them, against the reference in fp64."""

    def with_sink(function):
        return lambda *inputs, **options: function(*inputs[:6], sink=inputs[6], **options)

    def run(inputs, sink, **options):
        reference = with_sink(adaptive_fusion_attention_reference)
        check_against_oracle(with_sink(attend), reference, [*inputs, sink], **options)

    return run


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(check, random_inputs, shape):
    inputs = random_inputs(*shape, (shape[1],), **FP32)
    check(inputs, sink_of(shape[1]))
    check([x.detach() for x in inputs], sink_of(shape[1]).detach(), return_lse=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_beside_what_hides_keys(check, random_inputs, options):
    inputs = random_inputs(*SHAPES["sequence"], (1,), **FP32)
    check(inputs, sink_of(2), **options, return_lse=True)
    if "key_mask" not in options:
        few = [inputs[0].detach()[:, :, :3], *(x.detach() for x in inputs[1:])]
        check(few, sink_of(2).detach(), **options, return_lse=True)


def test_packed_sequences_and_shared_rows(check, random_inputs):
    inputs = random_inputs(1, 2, 1, 23, 23, 9, 16, (2,), **FP32)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ((0, 7, 7, 23), (0, 0, 4, 9))]
    check(inputs, sink_of(2), cu_seqlens=bounds[0], cross_cu_seqlens=bounds[1])
    for queries in (2, 17):
        inputs = random_inputs(2, 2, 2, queries, 17, 9, 16, (2,), **FP32)
        inputs[3:5] = (x.detach()[::2].requires_grad_() for x in inputs[3:5])
        check(inputs, sink_of(2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sink_dtype", ["own", "float32"])
def test_halves(check_against_oracle, attend, random_inputs, dtype, sink_dtype):
    """The sink's gradient is a sum over rows of its weight times sum(dO O), of which O is rounded: half a unit of each product."""
    sink = sink_of(2, dtype if sink_dtype == "own" else torch.float32)
    inputs = [x.detach() for x in random_inputs(*SHAPES["sequence"], (2,), dtype=dtype, gate_dtype=torch.float32)]

    def operator(*given, **options):
        return attend(*given[:6], sink=sink.detach(), **options)

    def reference(*given, **options):
        return adaptive_fusion_attention_reference(*given[:6], sink=sink.detach(), **options)

    leaves = [x.requires_grad_() for x in inputs[:5]]
    check_against_oracle(operator, reference, [*leaves, inputs[5]])
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(42))
    found = torch.autograd.grad((attend(*inputs, sink=sink).float() * grad).sum(), sink)[0]
    exact = [x.detach().double() for x in inputs]
    leaf = sink.detach().double().requires_grad_()
    out, lse, _ = adaptive_fusion_attention_reference(*exact, sink=leaf, return_lse=True)
    wanted = torch.autograd.grad((out * grad).sum(), leaf)[0]
    closed = [*exact[:5], exact[5] * 0]
    terms = (adaptive_fusion_attention_reference(*closed, sink=leaf.detach()) * grad).abs().sum(-1)
    bound = ((leaf.view(1, -1, 1) - lse).exp() * terms).sum((0, 2)) + wanted.abs()
    assert found.dtype == sink.dtype
    assert ((found - wanted).abs() <= torch.finfo(dtype).eps * bound).all()


@torch.no_grad()
def test_the_formula(random_inputs):
    """Written out: the sink takes sigmoid(sink - lse) of the self term's weight away."""
    inputs = random_inputs(*SHAPES["sequence"], (1,), **FP32)
    sink, closed = sink_of(2), [*inputs[:5], inputs[5] * 0]
    out, lse, cross_lse = adaptive_fusion_attention_reference(*closed, return_lse=True)
    kept = torch.sigmoid(lse - sink.view(1, -1, 1))[..., None]
    got, joined, same = adaptive_fusion_attention_reference(*closed, sink=sink, return_lse=True)
    torch.testing.assert_close(got, out * kept)
    torch.testing.assert_close(joined, torch.logaddexp(lse, sink.view(1, -1, 1)))
    assert torch.equal(same, cross_lse)


def test_gradcheck_of_the_reference(random_inputs):
    inputs = [x.detach().double().requires_grad_() for x in random_inputs(1, 2, 1, 3, 5, 4, 3, (2,), **FP32)]
    sink = sink_of(2).detach().double().requires_grad_()

    def attend(*given):
        return adaptive_fusion_attention_reference(*given[:6], sink=given[6], window=2, softcap=2.0)

    assert torch.autograd.gradcheck(attend, [*inputs, sink])


@torch.no_grad()
def test_one_of_minus_infinity_is_none(attend, random_inputs):
    inputs = random_inputs(*SHAPES["sequence"], (1,), **FP32)
    heads = 2
    for rows in (17, 2):
        given = [inputs[0][:, :, :rows], *inputs[1:]]
        out = attend(*given, sink=torch.full((heads,), -torch.inf), key_mask=MASK, causal=False)
        torch.testing.assert_close(out, attend(*given, key_mask=MASK, causal=False), atol=2e-6, rtol=1e-5)
        # One that outweighs all keys by far leaves the cross term.
        alone = attend(given[0], given[1], torch.zeros_like(given[2]), *given[3:])
        torch.testing.assert_close(attend(*given, sink=torch.full((heads,), 1e4)), alone)


def test_one_of_minus_infinity_gets_no_gradient_of_rows_that_see_nothing(attend, random_inputs):
    inputs = random_inputs(*SHAPES["sequence"], (1,), **FP32)
    sink = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    unseen = torch.ones(MASK.shape, dtype=torch.bool)
    unseen[0] = False
    attend(*inputs, sink=sink, key_mask=unseen).sum().backward()
    assert sink.grad[0] == 0 and sink.grad.isfinite().all() and sink.grad[1] != 0


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@torch.no_grad()
def test_plans_and_splits(attend, random_inputs, monkeypatch):
    """A call like an earlier one reads its own sink, and the number of splits changes no bit."""
    decode = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.decode")
    for shape in ("sequence", "step"):
        inputs = random_inputs(*SHAPES[shape], (1,), **FP32)
        heads = SHAPES[shape][1]
        for sink in (sink_of(heads), sink_of(2 * heads)[::2]):
            again = attend(*inputs, sink=sink)
            torch.testing.assert_close(
                again, adaptive_fusion_attention_reference(*inputs, sink=sink), atol=1e-5, rtol=0
            )
        without = attend(*inputs)
        torch.testing.assert_close(without, adaptive_fusion_attention_reference(*inputs), atol=1e-5, rtol=0)
    monkeypatch.setattr(plans, "enabled", False)
    results = []
    for count in (1, 3):
        monkeypatch.setattr(decode, "split_count", lambda *sizes, count=count: count)
        results.append(torch.cat([x.flatten() for x in attend(*inputs, sink=sink_of(4), return_lse=True)]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_same_bits_every_run(attend, random_inputs):
    inputs, sink = random_inputs(*SHAPES["sequence"], (2,), **FP32), sink_of(2)
    runs = [torch.autograd.grad(attend(*inputs, sink=sink).square().sum(), [*inputs, sink]) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    alone = torch.autograd.grad(attend(*(x.detach() for x in inputs), sink=sink).square().sum(), sink)[0]
    assert torch.equal(alone, runs[0][6])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_compiled_without_a_break(attend, random_inputs, device):
    inputs = [x.detach().to(device).requires_grad_() for x in random_inputs(*SHAPES["sequence"], (2,), **FP32)]
    sink = sink_of(2).detach().to(device).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad(each(*inputs, sink=sink).square().sum(), [*inputs, sink]) for each in (compiled, attend)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_operators_and_their_fakes(backend, random_inputs, device):
    operators = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    inputs = [x.detach().to(device) for x in random_inputs(2, 2, 1, 9, 9, 5, 16, (1,), **FP32)]
    flat = flatten(Call(*inputs, sink_of(2).detach().to(device), scale=0.25))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators._decode_operator, (*flat, True), test_utils=tests)
    outputs = operators._forward_operator(*flat, [True, True, True])
    for wanted in ([True] * 7, [*[False] * 6, True]):
        torch.library.opcheck(operators._backward_operator, (*outputs, *flat, wanted), test_utils=tests)


REFUSED = {
    "shape": (torch.zeros(3), r"sink: got shape \(3,\), takes \(2,\), a score for each head"),
    "rank": (torch.zeros(1, 2), r"sink: got shape \(1, 2\)"),
    "type": (1.0, "sink: got float"),
    "dtype": (torch.zeros(2, dtype=torch.float64), "sink: got torch.float64, takes float32"),
    "device": (torch.zeros(2, device="meta"), "sink: got a tensor on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_ones(case, random_inputs):
    sink, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        adaptive_fusion_attention(*random_inputs(*SHAPES["sequence"], (1,), **FP32), sink=sink)


def test_backends_without_it(random_inputs, monkeypatch):
    monkeypatch.setattr(flash_backend, "DEVICES", ("cpu",))
    inputs = random_inputs(*SHAPES["sequence"], (1,), dtype=torch.float16, gate_dtype=torch.float32)
    with pytest.raises(ValueError, match='sink: got a tensor, takes None with backend="flash"'):
        flash_backend._check(Call(*inputs, sink_of(2)))
    hopper = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.forward")
    inputs = random_inputs(1, 2, 2, 128, 128, 16, 64, (1,), dtype=torch.float16, gate_dtype=torch.float32)
    assert hopper.takes(Call(*inputs, scale=0.1)) and not hopper.takes(Call(*inputs, sink_of(2), scale=0.1))
