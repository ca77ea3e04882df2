"""What the Triton kernels of the layer-wise aligner may get wrong at the ends of tiles, and how often they are launched."""

import importlib
from collections import Counter
from dataclasses import replace

import pytest
import torch

from layalign.kernels.layerwise_aligner import (
    cross_key_values,
    cross_key_values_reference,
    fold_key_values,
    layer_mix,
    layer_mix_reference,
    stream_linear,
    stream_linear_reference,
)
from layalign.kernels.layerwise_aligner.gpu import matmul, operands
from layalign.kernels.layerwise_aligner.gpu.launch_table import matmul_config

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
SIZES = [1, 15, 16, 17, 31, 32, 33, 47]  # around the interpreter's tiles of 16 and 32, and primes


@pytest.fixture
def check(check_against_oracle, by_backend, aligner_cases):
    """check(operator, reference, **sizes) in fp32."""

    def check_sizes(operator, reference, options=None, **sizes):
        inputs = aligner_cases.MAKE[operator.__name__](aligner_cases.Draw(torch.float32), **sizes)
        check_against_oracle(by_backend(operator), reference, inputs, **(options or {}))

    return check_sizes


@pytest.fixture
def launches(monkeypatch):
    """A Counter of launches by kernel."""
    counted = Counter()
    for name in ("mix", "matmul"):
        module = importlib.import_module(f"layalign.kernels.layerwise_aligner.gpu.{name}")

        def count(kernel, *arguments, launch=module.launch, **constants):
            counted[kernel.fn.__name__] += 1
            launch(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", count)
    return counted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["encoder_layers", "streams", "width", "length"])
def test_tile_boundaries_of_the_mix(check, side, size):
    sizes = dict(encoder_layers=3, streams=4, batch=1, length=3, width=5) | {side: size}
    check(layer_mix, layer_mix_reference, **sizes)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["length", "width", "out_width"])
def test_tile_boundaries_of_the_products(check, side, size, shared):
    sizes = dict(streams=3, batch=1, length=5, width=6, out_width=7, shared=shared) | {side: size}
    check(stream_linear, stream_linear_reference, **sizes)


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_tensor_descriptors(check, monkeypatch, folded):
    """As Hopper's lines read: the same products, of weights in lists and in one tensor, with tails on every side."""
    described = []

    def with_descriptors(aligned, **call):
        described.append(aligned)
        return replace(matmul_config(aligned=aligned, **call), descriptors=aligned)

    monkeypatch.setattr(matmul, "matmul_config", with_descriptors)
    sizes = dict(batch=1, length=21, encoder_layers=2, encoder_width=20, llm_layers=2, llm_width=36, kv=24)
    check(cross_key_values, cross_key_values_reference, {"folded": folded}, **sizes)
    for shared in (True, False):
        sizes = dict(streams=3, batch=1, length=21, width=20, out_width=36, shared=shared)
        check(stream_linear, stream_linear_reference, **sizes)
    assert described and all(described)


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_one_descriptor_for_a_list(check, monkeypatch, folded):
    """Weights that lie anywhere, in whole tiles: places within one descriptor, whatever the order of their addresses."""
    kinds = []

    def find(*arguments):
        kinds.append(found(*arguments))
        return kinds[-1]

    found = matmul.found
    monkeypatch.setattr(matmul, "found", find)
    monkeypatch.setattr(matmul, "matmul_config", lambda **call: replace(matmul_config(**call), descriptors=True))
    sizes = dict(batch=1, length=32, encoder_layers=2, encoder_width=32, llm_layers=3, llm_width=64, kv=32)
    check(cross_key_values, cross_key_values_reference, {"folded": folded}, **sizes)
    assert operands.SPANNED.value in kinds and operands.LISTED.value not in kinds


@pytest.mark.parametrize("streams", [1, 7, 64])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
def test_many_streams(check, streams, shared):
    check(
        stream_linear, stream_linear_reference, streams=streams, batch=1, length=2, width=3, out_width=4, shared=shared
    )


def test_long_sums(check):
    """Sums over tokens that go in several parts, the last of them shorter."""
    check(stream_linear, stream_linear_reference, streams=3, batch=1, length=65, width=3, out_width=4, shared=True)
    check(layer_mix, layer_mix_reference, encoder_layers=2, streams=2, batch=1, length=101, width=11)


@pytest.mark.parametrize("size", [15, 16, 17, 33])
@pytest.mark.parametrize("side", ["length", "encoder_width", "llm_width", "kv"])
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_tile_boundaries_of_keys_and_values(check, side, size, folded):
    sizes = dict(batch=1, length=5, llm_layers=2) | {side: size}
    check(cross_key_values, cross_key_values_reference, {"folded": folded}, **sizes)


def test_layers_that_lie_apart(by_backend, aligner_cases):
    """Weights of layers are found by pointers: of one tensor, evenly spaced or not, they give the same bits."""
    arguments = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32), llm_layers=3, stacked=True)
    expected = by_backend(cross_key_values)(*arguments)
    pool = [torch.randn(997 + 64 * index) for index in range(6)]

    def apart(stacked, memory):
        views = [x[1 : 1 + stacked[0].numel()].view(stacked[0].shape) for x in memory]
        return [view.copy_(x.detach()) for view, x in zip(views, stacked, strict=True)]

    arguments[5], arguments[6] = apart(arguments[5], pool[:3]), apart(arguments[6], pool[:2:-1])
    assert all(map(torch.equal, by_backend(cross_key_values)(*arguments), expected))


@pytest.mark.parametrize("width", [3, 8], ids=["anywhere", "aligned"])
@pytest.mark.parametrize("streams", [2, 64, 160])
@pytest.mark.parametrize("encoder_layers", [1, 24])
def test_the_mix_is_one_launch(by_backend, aligner_cases, launches, encoder_layers, streams, width):
    inputs = aligner_cases.mix_inputs(aligner_cases.Draw(torch.float32), encoder_layers, streams, 1, 2, width)
    out = by_backend(layer_mix)(*inputs)
    assert launches == {"mix_kernel": 1}
    out.sum().backward()
    # Both gradients in one pass, where a tile holds all streams and each stream begins at a multiple of 16 bytes.
    apart = {"mix_state_gradients_kernel": 1} if streams > 32 or width == 3 else {}
    assert launches == {"mix_kernel": 1, "mix_weight_gradients_kernel": 1, **apart}


@pytest.mark.parametrize("streams", [1, 64])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
def test_the_streams_are_one_launch(by_backend, aligner_cases, launches, streams, shared):
    inputs = aligner_cases.linear_inputs(aligner_cases.Draw(torch.float32), streams, 1, 2, 3, 4, shared=shared)
    out = by_backend(stream_linear)(*inputs)
    assert launches == {"matmul_kernel": 1}
    out.sum().backward()
    assert launches == ({"matmul_kernel": 2, "summed_matmul_kernel": 1} if shared else {"matmul_kernel": 3})


@pytest.mark.parametrize("llm_layers", [1, 6])
@pytest.mark.parametrize("folded", ["unfolded", "folded", "before"])
def test_keys_and_values_take_as_many_launches_for_any_layers(by_backend, aligner_cases, launches, llm_layers, folded):
    """All layers at once: one mix, then the projection and the layers' own, folded or one after the other."""
    draw = aligner_cases.Draw(torch.float32)
    inputs = aligner_cases.cross_inputs(draw, batch=1, llm_layers=llm_layers, projected=folded != "before")
    inputs = aligner_cases.wanting(inputs, (1, 2, 3, 4))  # as in training
    results = by_backend(cross_key_values)(*inputs, folded=folded == "folded", layers_at_once=6)
    assert launches == {"mix_kernel": 1, "matmul_kernel": 1 if folded == "before" else 2}
    launches.clear()
    sum(x.sum() for x in results).backward()
    # Of the streams by one product or two; folded, the weights and their gradient are made as well.
    products = {"before": {"matmul_kernel": 1}, "unfolded": {"matmul_kernel": 2, "summed_matmul_kernel": 1}}
    products["folded"] = {"matmul_kernel": 3, "summed_matmul_kernel": 1}
    mix = {"mix_kernel": 0 if folded == "before" else 1, "mix_weight_gradients_kernel": 1}
    assert launches == Counter(products[folded] | mix)


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1, 2)], ids=str)
def test_only_gradients_asked_for_are_computed(by_backend, aligner_cases, launches, wanted):
    inputs = aligner_cases.wanting(aligner_cases.mix_inputs(aligner_cases.Draw(torch.float32)), wanted)
    out = by_backend(layer_mix)(*inputs)
    launches.clear()
    if wanted:
        out.sum().backward()
    kernels = {0: "mix_state_gradients_kernel", 1: "mix_weight_gradients_kernel", 2: "mix_weight_gradients_kernel"}
    wanted = wanted if len(wanted) < 3 else (1,)  # both in one pass
    assert launches == {kernels[index]: 1 for index in wanted}


def test_folding_is_one_launch(by_backend, aligner_cases, launches):
    inputs = aligner_cases.cross_inputs(aligner_cases.Draw(torch.float32), llm_layers=5)
    by_backend(fold_key_values)(*inputs[3:])
    assert launches == {"matmul_kernel": 1}
