"""Random calls of the layer-wise aligner's operators, one a seed. `--fuzz N` runs N of them, `--fuzz-seed S` just number S.

A failing test's id ends in its seed, and its output shows the call.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch


@pytest.fixture
def draw(aligner_cases, dtypes):
    """draw(seed, accept, **changes): the random call of a seed, shown where the test fails."""

    def draw_and_show(seed, accept=lambda case: True, **changes):
        case = dataclasses.replace(aligner_cases.draw(seed, dtypes, accept), **changes)
        print(case)
        return case

    return draw_and_show


@pytest.fixture
def run(by_backend, aligner_cases):
    """run(case, inputs, grad) -> outputs (tokens second and third), the gradients of what was mixed or multiplied."""

    def call(case, inputs, grad):
        leaves = [x.requires_grad_() for x in aligner_cases.items(inputs[0])]
        options = dict(case.options)
        if case.operator == "cross_key_values" and options["folded"] is None:
            options["folded"] = False  # None decides by the number of tokens
        outputs = by_backend(case.functions()[0])(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, leaves, [grad] * len(outputs))
        if isinstance(inputs[0], list):
            grads = [torch.stack(grads)]
        return [*(x.detach() for x in outputs), *grads]

    return call


def with_tokens(case):
    return case.sizes["batch"] * case.sizes["length"] > 0


def with_neighbours(case):
    return case.sizes["batch"] * case.sizes["length"] > 1


def random_gradient(case):
    """For every output alike: (G, B, T, width)."""
    sizes = case.sizes
    groups = sizes.get("streams", sizes.get("llm_layers"))
    width = sizes.get("kv", sizes.get("out_width", sizes.get("width")))
    shape = groups, sizes["batch"], sizes["length"], width
    return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype)


def at_tokens(argument, take):
    """`take` of each tensor (B, T, De), or (G, B, T, De), as leaves."""
    if isinstance(argument, list):
        return [at_tokens(x, take) for x in argument]
    return take(argument.detach()).requires_grad_(argument.requires_grad)


def test_random_call(fuzz_seed, backend, draw, by_backend, check_against_oracle):
    case = draw(fuzz_seed)
    operator, reference = case.functions()
    check_against_oracle(by_backend(operator), reference, case.inputs(), **case.options)


@functools.cache
def rows_leak():
    """Whether PyTorch's own bf16 product takes a NaN into the row before, as on CPUs with AMX."""
    rows = torch.zeros(32, 15, dtype=torch.bfloat16)
    rows[1::2] = torch.nan
    return bool(rows.matmul(torch.zeros(15, 24, dtype=torch.bfloat16))[::2].isnan().any())


def rows_are_apart(case):
    """Whether that keeps away from a call: of widths up to 64, it does from multiples of four (and from those of models, of 64)."""
    widths = [case.sizes[name] for name in ("width", "encoder_width", "llm_width") if name in case.sizes]
    return case.dtype != torch.bfloat16 or not rows_leak() or all(width % 4 == 0 for width in widths)


def test_a_nan_stays_in_its_token(rare_fuzz_seed, backend, draw, run):
    def accept(case):
        return with_tokens(case) and (backend != "torch" or rows_are_apart(case))

    case = draw(rare_fuzz_seed, accept, wanted=(0,), layout="contiguous")
    inputs, grad = case.inputs(), random_gradient(case)
    expected = run(case, inputs, grad)
    row, column = case.seed % case.sizes["batch"], case.seed % case.sizes["length"]

    def plant(x):
        x = x.clone()
        x[..., row, column, :] = (torch.nan, torch.inf)[case.seed % 2]
        return x

    results = run(case, [at_tokens(inputs[0], plant), *inputs[1:]], grad)
    for got, want in zip(results, expected, strict=True):
        others = torch.ones(want.shape[1:3], dtype=torch.bool)
        others[row, column] = False
        assert torch.equal(got[:, others], want[:, others])


@pytest.fixture
def dots_of_any_place(request, device, monkeypatch):
    """The interpreter multiplies by BLAS, where the bits of a row depend on its place; not so rounded from fp64."""
    if device.type == "cpu":
        interpreter = request.getfixturevalue("interpreted").interpreter

        def multiply(self, a, b, d, *options):
            product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)


@pytest.mark.usefixtures("dots_of_any_place")
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_token_has_the_same_bits_in_any_company(rare_fuzz_seed, backend, draw, run):
    """Each row of the batch and one token alone, and the rows in reverse: outputs and the gradients of what came in."""
    case = draw(rare_fuzz_seed, with_neighbours, wanted=(0,), layout="contiguous")
    inputs, grad = case.inputs(), random_gradient(case)
    together = run(case, inputs, grad)
    batch, column = case.sizes["batch"], case.seed % case.sizes["length"]
    places = [[slice(row, row + 1)] for row in range(batch)] + [[torch.arange(batch).flip(0)]]
    places.append([slice(0, 1), slice(column, column + 1)])
    for place in places:

        def take(x, place=place):
            return x[(..., *place, *[slice(None)] * (3 - len(place)))]

        alone = run(case, [at_tokens(inputs[0], take), *inputs[1:]], take(grad))
        for got, whole in zip(alone, together, strict=True):
            assert torch.equal(got, take(whole))


def test_the_same_bits_every_run(rare_fuzz_seed, backend, draw, by_backend, aligner_cases):
    case = draw(rare_fuzz_seed, with_tokens, wanted=range(9))
    inputs, grad = case.inputs(), random_gradient(case)
    leaves = [x.requires_grad_() for argument in inputs for x in aligner_cases.items(argument) if x is not None]
    results = []
    for _ in range(2):
        outputs = by_backend(case.functions()[0])(*inputs, **case.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad(outputs, leaves, [grad] * len(outputs), allow_unused=True)
        results.append([*outputs, *grads])
    assert all(map(torch.equal, *results))
