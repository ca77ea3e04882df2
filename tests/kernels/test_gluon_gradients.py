"""The Hopper gradients on a CPU, their agents in random turns: against the fp64 oracle, over calls of every kind that they take."""

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference
from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu.arguments import Prepared
from layalign.kernels.adaptive_fusion_attention.gpu.backward import backward
from layalign.kernels.adaptive_fusion_attention.gpu.forward import ForwardResults
from layalign.kernels.launch import recording

hopper = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.backward")
hopper_forward = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.forward")


@pytest.fixture
def gradients(gluon_on_cpu, monkeypatch):
    """gradients(call, grad_out, wanted, seed, **run): the Gradients of a call, whose forward runs before."""

    def compute(call, grad_out, wanted=(True,) * 6, seed=0, **run):
        monkeypatch.setenv("LAYALIGN_GLUON", "1")
        monkeypatch.setattr(hopper_forward, "FEWEST_QUERIES", 1)
        with recording("sm_90", None):
            assert hopper.covers(call, grad_out, wanted)
        results, _ = gluon_on_cpu.run_on_cpu(lambda: hopper_forward.forward(Prepared(call)), seed)
        if results.self_out is None:
            results = results._replace(self_out=results.out)
        return gluon_on_cpu.run_on_cpu(lambda: backward(grad_out, results, call, wanted), seed, **run)

    return compute


@pytest.fixture
def check(gradients, check_against_oracle, gluon_on_cpu):
    """check(inputs, seed, **options): all gradients against the reference."""

    def check_call(inputs, seed=0, **options):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, options, *tensors):
                options = {"scale": tensors[0].shape[-1] ** -0.5} | options
                ctx.call = Call(*tensors, **options)
                return gluon_on_cpu.run_on_cpu(lambda: hopper_forward.forward(Prepared(ctx.call)), seed)[0].out

            @staticmethod
            def backward(ctx, grad_out):
                wanted = list(ctx.needs_input_grad[1:])
                return None, *gradients(ctx.call, grad_out.contiguous(), wanted, seed)[0]

        def attend(*tensors, upcast=None, **options):
            return Attention.apply(options, *tensors)

        def by_row(gate):
            return (gate[:, None] if gate.dim() == 1 else gate).expand(inputs[0].shape[:3])

        reference = adaptive_fusion_attention_reference
        inputs = [x.detach().requires_grad_() for x in inputs]
        check_against_oracle(attend, reference, inputs, summed=(5, by_row, reference), **options)

    return check_call


def test_random_calls(rare_fuzz_seed, cases, gluon_calls, check):
    inputs, options = gluon_calls.drawn(rare_fuzz_seed, cases)
    if inputs[0].shape[-1] == 128:  # refused
        options.pop("softcap", None)
    sharing = inputs[0].shape[0] // inputs[3].shape[0]  # in inference alone
    inputs[3:5] = (x.repeat_interleave(sharing, 0) for x in inputs[3:5])
    if "cross_span" in options:
        options["cross_span"] = options["cross_span"].repeat_interleave(sharing, 0)
    check(inputs, **options)


def call_of(gluon_calls, cases, *sizes, **options):
    return Call(*gluon_calls.inputs_of(cases, *sizes), scale=0.125, **options)


def test_a_row_does_not_depend_on_padding_or_batch(cases, gluon_calls, gradients):
    """The bits of a spanned row's gradients are those of the row alone, wherever the span begins; outside it they are 0."""
    q, k, v, cross_k, cross_v, gate = gluon_calls.inputs_of(cases, 1, 2, 1, 150, 150, 140, 64)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).half()

    def padded(x, before, after):
        fill = [x.new_full((*x.shape[:2], length, x.shape[3]), torch.nan) for length in (before, after)]
        return torch.cat([fill[0], x, fill[1]], dim=2)

    want, _ = gradients(Call(q, k, v, cross_k, cross_v, gate, scale=0.125), grad_out)
    keys = [torch.cat([padded(x, 70, 30), padded(x, 0, 100)]) for x in (k, v)]
    cross = [torch.cat([padded(x, 3, 60), padded(x, 40, 23)]) for x in (cross_k, cross_v)]
    spans = {"key_span": [[70, 220], [0, 150]], "cross_span": [[3, 143], [40, 180]]}
    spans = {name: torch.tensor(span, dtype=torch.int32) for name, span in spans.items()}
    twice = [torch.cat([x, x]) for x in (q, grad_out)]
    starts = torch.tensor([70, 0])
    got, _ = gradients(Call(twice[0], *keys, *cross, gate, query_start=starts, scale=0.125, **spans), twice[1])
    assert all(torch.equal(got.q[row], want.q[0]) for row in range(2))
    for name, span in (("k", "key_span"), ("v", "key_span"), ("cross_k", "cross_span"), ("cross_v", "cross_span")):
        for row, (begin, end) in enumerate(spans[span].tolist()):
            grad = getattr(got, name)[row].clone()
            assert torch.equal(grad[:, begin:end], getattr(want, name)[0]), (name, row)
            grad[:, begin:end] = 0
            assert not grad.any(), (name, row)


def test_the_same_bits_in_any_order_of_turns(cases, gluon_calls, gradients):
    call = call_of(gluon_calls, cases, 1, 4, 2, 200, 260, 70, 64, window=150)
    grad_out = torch.randn_like(call.q)
    first, _ = gradients(call, grad_out)
    for seed in (1, 2):
        again, _ = gradients(call, grad_out, seed=seed)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize(
    "wanted",
    [(1, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0), (0, 0, 0, 1, 1, 0), (0, 0, 0, 1, 1, 1), (0, 0, 0, 0, 0, 1)],
    ids=str,
)
def test_what_nobody_wants_is_not_written(cases, gluon_calls, gradients, wanted):
    call = call_of(gluon_calls, cases, 1, 2, 1, 100, 100, 70, 64)
    grad_out = torch.randn_like(call.q)
    everything, _ = gradients(call, grad_out)
    some, _ = gradients(call, grad_out, wanted)
    for got, want, asked in zip(
        some, everything, (*wanted, 0), strict=True
    ):  # the last is a sink's, which there is none of
        assert torch.equal(got, want) if asked else got is None


@pytest.mark.parametrize(
    "sizes, options, change, wanted",
    [
        ((1, 1, 1, 80, 80, 30, 64), {}, {}, (1, 1, 0, 1, 1, 1)),
        ((1, 1, 1, 80, 80, 30, 128), {"softcap": 4.0}, {}, (1,) * 6),
        ((1, 1, 1, 80, 80, 30, 64), {}, {"key_mask": torch.ones(1, 80, dtype=torch.bool)}, (1,) * 6),
        (
            (1, 1, 1, 80, 80, 30, 64),
            {},
            {"gate": torch.empty_strided((1, 1, 80), (1, 1, 2**25), device="meta")},
            (1,) * 6,
        ),
        ((1, 1, 1, 80, 80, 30, 64), {}, {"q": torch.zeros(80 * 64 + 1).half()[1:].view(1, 1, 80, 64)}, (1,) * 6),
    ],
    ids=["keys without values", "wide heads with a cap", "mask", "gates apart", "address"],
)
def test_what_it_does_not_cover(cases, gluon_calls, monkeypatch, sizes, options, change, wanted):
    call = call_of(gluon_calls, cases, *sizes, **options)
    grad_out = torch.ones_like(call.q)
    with recording("sm_90", None):
        assert not hopper.covers(call, grad_out, [True] * 6)  # not asked for
        monkeypatch.setenv("LAYALIGN_GLUON", "1")
        assert not hopper.covers(call._replace(**change), grad_out, wanted)
        assert hopper.covers(call._replace(softcap=None), grad_out, [True] * 6)
        assert not hopper.covers(call._replace(softcap=None), grad_out[:, :, :1].expand(call.q.shape), [True] * 6)
        assert not hopper.covers(call._replace(q=call.q[:, :, :64]), grad_out, [True] * 6)
    with recording("sm_100", None):
        assert not hopper.covers(call._replace(softcap=None), grad_out, [True] * 6)


def test_the_backward_chooses_it(cases, gluon_calls, monkeypatch):
    launched = []
    call = call_of(gluon_calls, cases, 1, 1, 1, 80, 80, 30, 64)
    results = ForwardResults(*[torch.zeros_like(call.q)] * 3, torch.zeros(2, 1, 1, 80))
    with recording("sm_90", lambda kernel, *rest: launched.append(kernel.__name__)):
        for asked in ("0", "1"):
            monkeypatch.setenv("LAYALIGN_GLUON", asked)
            backward(torch.ones_like(call.q), results, call, [True] * 6)
    own = ["row_sums_kernel", "key_value_gradients_kernel", "query_gradients_kernel"]
    assert launched == [*own, "row_sums_kernel", "hopper_key_value_gradients_kernel", "hopper_query_gradients_kernel"]
