"""The Hopper forward on a CPU, its agents in random turns: results against the fp64 oracle, over calls of every kind that it takes."""

import math

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference
from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu.arguments import Prepared
from layalign.kernels.adaptive_fusion_attention.gpu.forward import Kept
from layalign.kernels.launch import recording

hopper = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gluon.forward")


@pytest.fixture
def check(gluon_on_cpu, check_against_oracle):
    """check(inputs, seed, key_span, cross_span, **options): outputs and log-sum-exps against the reference."""

    def check_call(inputs, seed=0, key_span=None, cross_span=None, **options):
        def attend(q, k, v, cross_k, cross_v, gate, scale=None, **options):
            spans = dict(key_span=key_span, cross_span=cross_span)
            call = Call(q, k, v, cross_k, cross_v, gate, scale=scale or q.shape[-1] ** -0.5, **spans, **options)
            assert hopper.takes(call)
            results, _ = gluon_on_cpu.run_on_cpu(lambda: hopper.forward(Prepared(call)), seed)
            if results.cross_out is not None:  # what the backward reads
                gate = (gate[:, None] if gate.dim() == 1 else gate)[..., None]
                again = results.self_out + gate * results.cross_out
                assert (again - results.out).abs().max() < 0.02 * results.out.abs().max()
            self_lse, *cross_lse = (results.lse * math.log(2)).unbind()
            return results.out, self_lse, *(cross_lse or [torch.full_like(self_lse, -torch.inf)])

        def reference(q, k, v, cross_k, cross_v, gate, **options):
            spans = dict(key_span=key_span, cross_span=cross_span)
            arguments = (q, k, v, cross_k, cross_v, gate)
            return adaptive_fusion_attention_reference(*arguments, return_lse=True, **spans, **options)

        check_against_oracle(lambda *x, upcast=None, **o: attend(*x, **o), reference, inputs, **options)

    return check_call


def test_random_calls(rare_fuzz_seed, cases, gluon_calls, check):
    inputs, options = gluon_calls.drawn(rare_fuzz_seed, cases)
    check(inputs, **options)


def test_a_row_does_not_depend_on_padding_or_batch(cases, gluon_calls, gluon_on_cpu):
    """The bits of a spanned row are those of the row alone, wherever the span begins."""
    alone = gluon_calls.inputs_of(cases, 1, 2, 1, 150, 150, 140, 64)

    def padded(x, before, after):
        fill = [x.new_full((*x.shape[:2], length, x.shape[3]), torch.nan) for length in (before, after)]
        return torch.cat([fill[0], x, fill[1]], dim=2)

    def run(call):
        return gluon_on_cpu.run_on_cpu(lambda: hopper.forward(Prepared(call)))[0]

    q, k, v, cross_k, cross_v, gate = alone
    want = run(Call(*alone, scale=0.125))
    keys = [torch.cat([padded(x, 70, 30), padded(x, 0, 100)]) for x in (k, v)]
    cross = [torch.cat([padded(x, 3, 60), padded(x, 40, 23)]) for x in (cross_k, cross_v)]
    starts = torch.tensor([70, 0])
    call = Call(q.expand(2, -1, -1, -1).contiguous(), *keys, *cross, gate, query_start=starts, scale=0.125)
    spans = (
        torch.tensor([[70, 220], [0, 150]], dtype=torch.int32),
        torch.tensor([[3, 143], [40, 180]], dtype=torch.int32),
    )
    got = run(call._replace(key_span=spans[0], cross_span=spans[1]))
    for row in range(2):
        for name in ("out", "self_out", "cross_out"):
            assert torch.equal(getattr(got, name)[row], getattr(want, name)[0]), (name, row)
        assert torch.equal(got.lse[:, row], want.lse[:, 0]), row


def test_longest_tiles_come_first(cases):
    """Over heads and batch: the programs of the last queries of all heads precede those of others, and every tile has one."""
    from layalign.kernels.adaptive_fusion_attention.gluon.schedule import query_tile_of

    tiles = [query_tile_of(program, 300, 6, 128) for program in range(18)]
    assert [first for first, _ in tiles] == [256] * 6 + [128] * 6 + [0] * 6
    assert sorted(tiles) == [(first, row) for first in (0, 128, 256) for row in range(6)]


def test_terms_not_kept_are_not_written(cases, gluon_calls, gluon_on_cpu):
    inputs = gluon_calls.inputs_of(cases, 1, 1, 1, 70, 70, 30, 64)
    call = Call(*inputs, scale=0.125)
    kept, _ = gluon_on_cpu.run_on_cpu(lambda: hopper.forward(Prepared(call)))
    for kept_too in (Kept(False, False, False), Kept(False, True, True), Kept(False, False, True)):
        results, _ = gluon_on_cpu.run_on_cpu(lambda kept=kept_too: hopper.forward(Prepared(call), kept))
        assert torch.equal(results.out, kept.out) and results.self_out is None
        assert torch.equal(results.cross_out, kept.cross_out) if kept_too.terms else results.cross_out is None
        assert torch.equal(results.lse, kept.lse) if kept_too.lse else results.lse is None


@pytest.mark.parametrize(
    "change",
    [
        {"key_mask": torch.ones(1, 80, dtype=torch.bool)},
        {"cross_mask": torch.ones(1, 30, dtype=torch.bool)},
        {
            "cu_seqlens": torch.tensor([0, 80], dtype=torch.int32),
            "cross_cu_seqlens": torch.tensor([0, 30], dtype=torch.int32),
        },
        {"k": torch.zeros(1, 1, 81, 64).half()[:, :, :80].as_strided((1, 1, 80, 64), (5120, 5120, 60, 1))},
        {"v": torch.zeros(1 * 80 * 64 + 1).half()[1:].view(1, 1, 80, 64)},
        {"cross_k": torch.zeros(1, 1, 1, 64).half().expand(1, 1, 30, 64)},
        {"q": torch.zeros(1, 1, 64, 64).half()},
    ],
    ids=["key_mask", "cross_mask", "packed", "row stride", "address", "expanded rows", "few queries"],
)
def test_what_it_does_not_cover(cases, gluon_calls, change, monkeypatch):
    call = Call(*gluon_calls.inputs_of(cases, 1, 1, 1, 80, 80, 30, 64), scale=0.125)
    with recording("sm_90", None):
        assert not hopper.covers(call)  # not asked for
        monkeypatch.setenv("LAYALIGN_GLUON", "1")
        assert hopper.covers(call)
        assert not hopper.covers(call._replace(**change))
    with recording("sm_100", None):
        assert not hopper.covers(call)


def test_the_forward_chooses_it(cases, gluon_calls, monkeypatch):
    from layalign.kernels.adaptive_fusion_attention.gpu.forward import forward

    launched = []
    call = Call(*gluon_calls.inputs_of(cases, 1, 1, 1, 80, 80, 30, 64), scale=0.125)
    with recording("sm_90", lambda kernel, *rest: launched.append(kernel.__name__)):
        forward(call)
        monkeypatch.setenv("LAYALIGN_GLUON", "1")
        forward(call)
    assert launched == ["forward_kernel", "hopper_forward_kernel"]


def test_plans_know_which_kernel_they_are_of(cases, gluon_calls, monkeypatch):
    from layalign.kernels.adaptive_fusion_attention.gpu import operator

    call = Call(*gluon_calls.inputs_of(cases, 1, 1, 1, 80, 80, 30, 64), scale=0.125)
    keys = []
    for value in ("0", "1", "1"):
        monkeypatch.setenv("LAYALIGN_GLUON", value)
        keys.append(operator._described_call(call, Kept(False, False, True)).key)
    assert keys[0] != keys[1] == keys[2]
