"""Random calls of adaptive_fusion_attention, one a seed. `--fuzz N` runs N of them, `--fuzz-seed S` just number S.

A failing test's id ends in its seed, and its output shows the call.
"""

import dataclasses
import random
from itertools import pairwise

import pytest
import torch


@pytest.fixture
def draw(cases, dtypes):
    """draw(seed, **changes): the random call of a seed, shown where the test fails."""

    def draw_and_show(seed, accept=lambda case: True, **changes):
        case = dataclasses.replace(cases.draw(seed, dtypes, accept), **changes)
        print(case)
        return case

    return draw_and_show


def outputs_and_gradients(attend, inputs, options, grad_out):
    results = attend(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    return [*results, *torch.autograd.grad(results[0], inputs, grad_out)]


def random_gradient(case):
    shape = (case.batch, case.heads, case.queries, case.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype)


def test_random_call(fuzz_seed, backend, draw, check_attention):
    case = draw(fuzz_seed)
    check_attention(case.inputs(), **case.keywords())


@pytest.mark.parametrize("seed", [1974, 3344], ids=["one_key_takes_all", "sum_beside_a_rounding_boundary"])
def test_calls_whose_eager_error_is_small_by_luck(seed, backend, draw, check_attention):
    case = draw(seed)
    check_attention(case.inputs(), **case.keywords())


def test_unseen_keys_never_leak(rare_fuzz_seed, backend, cases, draw, attend):
    def has_unseen(case):
        return any(places.any() for places in case.unseen())

    case = draw(rare_fuzz_seed, has_unseen, wanted=cases.NAMES, layout="contiguous")
    inputs, options, grad_out = case.inputs(), case.keywords(), random_gradient(case)
    expected = outputs_and_gradients(attend, inputs, options, grad_out)
    keys, cross_keys = (places[:, None, :, None] for places in case.unseen())
    unseen = (keys, keys, cross_keys, cross_keys)
    junk = (torch.nan, torch.inf)[case.seed % 2]
    planted = [x.detach().masked_fill(places, junk) for x, places in zip(inputs[1:5], unseen, strict=True)]
    planted = [x.requires_grad_() for x in planted]
    results = outputs_and_gradients(attend, [inputs[0], *planted, inputs[5]], options, grad_out)
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
    for gradient, places in zip(results[-5:-1], unseen, strict=True):
        assert not gradient.masked_select(places).any()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_same_bits_in_any_batch(rare_fuzz_seed, backend, cases, draw, attend):
    """Each row of a batch alone and in the reversed batch, each packed sequence alone: outputs and gradients."""

    def has_neighbours(case):
        return case.queries and (case.batch > 1 or (case.cuts and len(case.cuts) > 2))

    case = draw(rare_fuzz_seed, has_neighbours, wanted=cases.NAMES)
    # Other gates mix rows in a gradient.
    case = dataclasses.replace(case, gate_shape=(case.batch, case.heads, case.queries), sharing=1)
    inputs, options, grad_out = case.inputs(), case.keywords(), random_gradient(case)
    together = outputs_and_gradients(attend, inputs, options, grad_out)
    if case.cuts:
        parts = list(zip(pairwise(case.cuts), pairwise(case.cross_cuts), strict=True))
        calls = [(one_sequence(options, own, cross), own, cross) for own, cross in parts if own[0] < own[1]]
    else:
        orders = [torch.arange(case.batch).flip(0), *torch.arange(case.batch)[:, None]]
        calls = [(of_rows(options, rows), rows, rows) for rows in orders]

    def take(x, place):
        """Batch rows, or positions of a packed sequence, of x (B, H, length, ...)."""
        return x[:, :, slice(*place)] if case.cuts else x[place]

    for alone_options, own, cross in calls:
        places = [own, own, own, cross, cross, own]
        leaves = [take(x.detach(), place).requires_grad_() for x, place in zip(inputs, places, strict=True)]
        alone = outputs_and_gradients(attend, leaves, alone_options, take(grad_out, own))
        where = [own] * (len(together) - 6) + places
        for got, whole, place in zip(alone, together, where, strict=True):
            assert torch.equal(got, take(whole, place))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_shared_rows_are_read_as_their_copies(rare_fuzz_seed, backend, draw, attend):
    case = draw(rare_fuzz_seed, lambda case: case.batch > 1, wanted=())
    case = dataclasses.replace(case, sharing=case.batch)
    inputs, options = case.inputs(), case.keywords() | {"return_lse": True}
    copies, of_copies = list(inputs), dict(options)
    copies[3:5] = (x.repeat_interleave(case.batch, dim=0) for x in inputs[3:5])
    for name in options.keys() & {"cross_mask", "cross_span"}:
        of_copies[name] = options[name].repeat_interleave(case.batch, dim=0)
    for got, want in zip(attend(*inputs, **options), attend(*copies, **of_copies), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_padding_beside_a_span_changes_no_bit(rare_fuzz_seed, backend, cases, draw, attend):
    """With more keys before and after the spans, which hold NaN: outputs and gradients."""

    def may_be_spanned(case):
        return not case.cuts and not isinstance(case.options.get("query_start"), torch.Tensor)

    case = draw(rare_fuzz_seed, may_be_spanned, wanted=cases.NAMES, layout="contiguous", key_mask=None, cross_mask=None)
    choose = random.Random(case.seed)
    spans = [cases.random_spans(choose, case.batch, length) for length in (case.keys, case.cross_keys)]
    case = dataclasses.replace(case, key_span=spans[0], cross_span=spans[1])
    print(case)
    inputs, options, grad_out = case.inputs(), case.keywords(), random_gradient(case)
    expected = outputs_and_gradients(attend, inputs, options, grad_out)
    before, after = 1 + case.seed % 19, case.seed % 7
    padded = [x.detach() for x in inputs]
    padded[1:5] = (torch.nn.functional.pad(x, (0, 0, before, after), value=torch.nan) for x in padded[1:5])
    more = dict(options, query_start=options.get("query_start", case.keys - case.queries) + before)
    for name, length in (("key_span", case.keys), ("cross_span", case.cross_keys)):
        more[name] = options[name].clamp(0, length) + before
    results = outputs_and_gradients(attend, [x.requires_grad_() for x in padded], more, grad_out)
    results[-5:-1] = (x[:, :, before : x.shape[2] - after] for x in results[-5:-1])
    assert all(map(torch.equal, results, expected))


def one_sequence(options, own, cross):
    lengths = {"cu_seqlens": own, "cross_cu_seqlens": cross}
    masks = {
        name: options[name][:, slice(*place)]
        for name, place in (("key_mask", own), ("cross_mask", cross))
        if name in options
    }
    return options | masks | {name: torch.tensor([0, b - a], dtype=torch.int32) for name, (a, b) in lengths.items()}


def of_rows(options, rows):
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in options.items()
    }
