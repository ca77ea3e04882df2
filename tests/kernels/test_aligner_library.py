"""What `backend="auto"` does on a GPU, here on CPU tensors: which products are the library's, which the kernels', and that both are
right, alone and in the aligner."""

import importlib
from collections import Counter
from functools import partial

import pytest
import torch

from layalign.kernels.layerwise_aligner import (
    cross_key_values_reference,
    key_values,
    stream_linear_reference,
    torch_backend,
)
from layalign.kernels.layerwise_aligner.call import Call

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
GROUPS, ROWS, INNER, COLUMNS = 3, 17, 24, 40


@pytest.fixture
def library(backend, device):
    if device.type != "cpu":
        pytest.skip("the GPU's tests have sizes of their own")
    return importlib.import_module("layalign.kernels.layerwise_aligner.gpu.library")


@pytest.fixture
def taken(library, monkeypatch):
    """A Counter of calls: of the library's by name, of the kernels' as "kernel"."""
    counted = Counter()

    def counting(name, function):
        def count(*arguments, **options):
            counted[name] += 1
            return function(*arguments, **options)

        return count

    for name in ("mm", "addmm", "bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, counting(name, getattr(torch, name)))
    monkeypatch.setattr(library.kernels, "matmul", counting("kernel", library.kernels.matmul))
    monkeypatch.setattr(library.kernels, "summed_matmul", counting("kernel", library.kernels.summed_matmul))
    return counted


def draw(*shape, dtype=torch.float16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


PRODUCTS = {
    "shared": (draw(GROUPS, ROWS, INNER), draw(INNER, COLUMNS), None, "mm"),
    "shared, bias": (draw(GROUPS, ROWS, INNER), draw(INNER, COLUMNS), draw(COLUMNS), "addmm"),
    "stacked": (draw(GROUPS, ROWS, INNER), draw(GROUPS, INNER, COLUMNS), None, "bmm"),
    "stacked, padded rows": (draw(GROUPS, ROWS, INNER), draw(GROUPS, INNER, 64)[..., :COLUMNS], None, "bmm"),
    "stacked, bias": (draw(GROUPS, ROWS, INNER), draw(GROUPS, INNER, COLUMNS), draw(GROUPS, COLUMNS), "kernel"),
    "odd, bias": (draw(GROUPS, ROWS, 23), draw(GROUPS, 23, 39), draw(GROUPS, 39), "baddbmm"),
    "list": (draw(GROUPS, ROWS, INNER), list(draw(GROUPS, INNER, COLUMNS)), None, "kernel"),
    "list by shared": (list(draw(GROUPS, ROWS, INNER)), draw(INNER, COLUMNS), None, "kernel"),
    "fp32": (draw(GROUPS, ROWS, INNER, dtype=torch.float32), draw(INNER, COLUMNS, dtype=torch.float32), None, "kernel"),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["as_they_are", "transposed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_which_products_are_the_librarys(library, taken, name, transposed):
    a, b, bias, way = PRODUCTS[name]
    if transposed:
        b = [x.T.contiguous() for x in b] if isinstance(b, list) else b.mT.contiguous()
    expected = torch_backend.matmul(a, b, bias, transpose_b=transposed)
    taken.clear()
    got = library.matmul(a, b, bias, transpose_b=transposed)
    assert taken == {way: 1}
    torch.testing.assert_close(got, expected)
    into = torch.empty(*got.shape[:2], got.shape[2] + 8, dtype=got.dtype)[..., : got.shape[2]]
    assert library.matmul(a, b, bias, transpose_b=transposed, out=into) is into
    torch.testing.assert_close(into, expected)


def test_users_of_deterministic_algorithms_get_the_kernels(library, taken, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    library.matmul(*PRODUCTS["stacked"][:3])
    assert taken == {"kernel": 1}


def test_sums_of_lists_are_the_kernels(library, taken):
    a, b = list(draw(GROUPS, INNER, ROWS)), draw(GROUPS, INNER, COLUMNS)
    total = torch.zeros(ROWS, COLUMNS)
    library.summed_matmul(a, b, total)
    assert taken == {"kernel": 1}
    torch.testing.assert_close(total, sum(x.T.float() @ y.float() for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("folded", [False, True, "before"], ids=str)
def test_keys_and_values(check_against_oracle, library, aligner_cases, folded, bias, dtype):
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(dtype), bias=bias, projected=folded != "before", kv=16)

    def run(*arguments):
        return key_values.cross_key_values("auto", Call(*arguments), folded=folded is True)

    check_against_oracle(run, cross_key_values_reference, inputs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
def test_streams(check_against_oracle, library, aligner_cases, shared):
    inputs = aligner_cases.linear_inputs(aligner_cases.Draw(torch.float16), length=9, bias=shared, shared=shared)
    operator = importlib.import_module("layalign.kernels.layerwise_aligner.gpu.operator")
    check_against_oracle(partial(operator.stream_linear, with_library=True), stream_linear_reference, inputs)
