"""The layer-wise aligner's kernels compiled for the GPU, at the sizes of real models: exactness, bits, addresses, memory,
graphs, waiting."""

from functools import partial

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

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RUNS = 1000
BIG = 2**31  # elements
# Encoder layers, streams, batch, length, width.
MIX_SIZES = {
    "7b": (24, 64, 2, 256, 2048),
    "odd": (13, 33, 3, 67, 771),
    "one": (1, 2, 1, 1, 8),
    "many": (64, 160, 1, 77, 512),
}
# Streams, batch, length, width, width of the result.
LINEAR_SIZES = {
    "7b": (8, 2, 256, 2048, 4096),
    "small": (24, 2, 100, 384, 576),
    "odd": (5, 3, 67, 771, 59),
    "short": (4, 1, 19, 512, 1024),
}
CROSS_SIZES = {
    "gqa": dict(length=256, encoder_layers=24, encoder_width=1024, llm_layers=4, llm_width=2048, kv=512),
    "mha": dict(length=128, encoder_layers=12, encoder_width=512, llm_layers=6, llm_width=1024, kv=1024),
    "odd": dict(length=131, encoder_layers=7, encoder_width=771, llm_layers=3, llm_width=333, kv=59),
    "smollm": dict(length=64, encoder_layers=13, encoder_width=384, llm_layers=30, llm_width=576, kv=192),
}
SMALL = dict(length=67, encoder_layers=5, encoder_width=136, llm_layers=3, llm_width=200, kv=72)


def on_gpu(argument):
    if isinstance(argument, list):
        return [on_gpu(x) for x in argument]
    return argument if argument is None else argument.detach().to(DEVICE).requires_grad_()


def away_from_the_kink(states, weight, bias):
    """Round to few bits, so that sums before the ReLU are exact in fp32 and none is 0: among millions, rounding would
    decide for some which side of 0 they are on, and with it their gradient."""
    for x, steps, shift in ((states, 4, 0), (weight, 16, 0), (bias, 64, 1 / 128)):
        for tensor in x if isinstance(x, list) else [x]:
            with torch.no_grad():
                tensor.mul_(steps).round_().div_(steps).add_(shift)


@pytest.fixture
def make(aligner_cases):
    """make(operator, dtype, *sizes) -> its arguments on the device, with gradients."""

    def build(operator, dtype, *sizes, **named):
        arguments = aligner_cases.MAKE[operator](aligner_cases.Draw(dtype), *sizes, **named)
        if operator != "stream_linear":
            away_from_the_kink(*arguments[:3])
        return on_gpu(arguments)

    return build


@pytest.fixture
def calls(make, aligner_cases):
    """calls(name, dtype) -> a function without arguments, forward and backward of a small call; its inputs."""

    def build(name, dtype=torch.bfloat16, backend="triton"):
        operator, folded = {"folded": ("cross_key_values", True), "unfolded": ("cross_key_values", False)}.get(
            name, (name, None)
        )
        inputs = make(operator, dtype, **(SMALL if folded is not None else {"length": 67, "width": 136}))
        options = {"backend": backend} | ({} if folded is None else {"folded": folded, "layers_at_once": 2})
        function = partial(aligner_cases.OPERATORS[operator][0], *inputs, **options)
        leaves = aligner_cases.leaves(inputs)
        with torch.no_grad():
            results = function()
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.randn_like(x) for x in results]

        def run():
            outputs = function()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]

        return run, inputs, function

    return build


CALLS = ["layer_mix", "stream_linear", "unfolded", "folded"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MIX_SIZES.values(), ids=MIX_SIZES)
def test_layer_mix(check_against_oracle, make, sizes, dtype):
    check_against_oracle(partial(layer_mix, backend="triton"), layer_mix_reference, make("layer_mix", dtype, *sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
@pytest.mark.parametrize("sizes", LINEAR_SIZES.values(), ids=LINEAR_SIZES)
def test_stream_linear(check_against_oracle, make, sizes, shared, dtype):
    inputs = make("stream_linear", dtype, *sizes, shared=shared)
    check_against_oracle(partial(stream_linear, backend="triton"), stream_linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [False, True, "before"], ids=str)
@pytest.mark.parametrize("sizes", CROSS_SIZES.values(), ids=CROSS_SIZES)
def test_cross_key_values(check_against_oracle, make, sizes, folded, dtype):
    inputs = make("cross_key_values", dtype, **sizes, projected=folded != "before")
    options = {} if folded == "before" else {"folded": folded}
    operator = partial(cross_key_values, backend="triton")
    check_against_oracle(operator, cross_key_values_reference, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["columns", "padded", "strided", "expanded"])
@pytest.mark.parametrize("operator", ["layer_mix", "stream_linear", "cross_key_values"])
def test_inputs_of_any_strides_and_addresses(check_against_oracle, make, aligner_cases, operator, layout, dtype):
    """ "padded" starts at an odd address: neither tensor descriptors nor wide loads may read there."""
    function, reference = aligner_cases.OPERATORS[operator]
    sizes = SMALL if operator == "cross_key_values" else {"length": 67, "width": 136}
    inputs = aligner_cases.laid_out(make(operator, dtype, **sizes), layout)
    check_against_oracle(partial(function, backend="triton"), reference, inputs)


def test_auto_mixes_by_triton(make):
    inputs = make("layer_mix", torch.bfloat16)
    assert torch.equal(layer_mix(*inputs), layer_mix(*inputs, backend="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_stream"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("sizes", LINEAR_SIZES.values(), ids=LINEAR_SIZES)
def test_streams_by_the_library(check_against_oracle, make, sizes, bias, shared, dtype):
    inputs = make("stream_linear", dtype, *sizes, shared=shared, bias=bias)
    check_against_oracle(stream_linear, stream_linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [False, True, "before"], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("sizes", CROSS_SIZES.values(), ids=CROSS_SIZES)
def test_keys_and_values_by_the_library(check_against_oracle, make, sizes, bias, folded, dtype):
    inputs = make("cross_key_values", dtype, **sizes, bias=bias, projected=folded != "before")
    options = {} if folded == "before" else {"folded": folded}
    check_against_oracle(cross_key_values, cross_key_values_reference, inputs, **options)


@pytest.mark.parametrize("name", ["stream_linear", "unfolded", "folded"])
def test_the_library_gives_the_same_bits_every_run(calls, name):
    run, _, _ = calls(name, backend="auto")
    first = run()
    for _ in range(100):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("name", ["stream_linear", "unfolded", "folded"])
def test_the_library_in_a_cuda_graph(calls, name):
    check_cuda_graph(*calls(name, backend="auto")[:2])


def test_folded_before_has_the_same_bits(make):
    inputs = make("cross_key_values", torch.bfloat16, **SMALL)
    weights = fold_key_values(*inputs[3:], backend="triton")
    before = cross_key_values(*inputs[:3], None, None, *weights, backend="triton")
    assert all(map(torch.equal, before, cross_key_values(*inputs, folded=True, backend="triton")))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_run(calls, name):
    run, _, _ = calls(name)
    first, same = run(), torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(RUNS):
        for got, want in zip(run(), first, strict=True):
            same &= (got == want).all()  # nothing here is NaN
    assert same


@pytest.mark.parametrize("operator", ["layer_mix", "stream_linear", "cross_key_values"])
def test_a_token_has_the_same_bits_in_any_company(make, aligner_cases, operator):
    """Few tokens get other tiles than many; sums must still go in the same order."""
    sizes = SMALL | {"length": 200} if operator == "cross_key_values" else {"length": 200, "width": 136}
    inputs = make(operator, torch.bfloat16, **sizes)
    options = {"folded": False} if operator == "cross_key_values" else {}
    function = partial(aligner_cases.OPERATORS[operator][0], backend="triton", **options)
    with torch.no_grad():
        whole = function(*inputs)
        for tokens in (slice(0, 1), slice(3, 20), slice(100, 200)):
            first = inputs[0]
            part = [x[:, tokens] for x in first] if isinstance(first, list) else first[:, :, tokens]
            alone = function(part, *inputs[1:])
            pairs = zip(alone, whole, strict=True) if isinstance(whole, tuple) else [(alone, whole)]
            assert all(torch.equal(got, want[:, :, tokens]) for got, want in pairs)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(calls, name):
    run, _, _ = calls(name)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph(calls, name):
    check_cuda_graph(*calls(name)[:2])


def check_cuda_graph(run, inputs):
    """Forward and backward are captured, and replayed on other values."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in inputs[0] if isinstance(inputs[0], list) else [inputs[0]]:
            x.normal_()
        inputs[1].normal_()
    graph.replay()
    assert all(map(torch.equal, captured, run()))


def test_addresses_past_32_bits_in_the_mix():
    """Streams whose elements lie past 2^31 of the first, written by the forward and read by the backward."""
    states = [torch.randn(1, 40000, 1024, dtype=torch.float16, device=DEVICE) for _ in range(2)]  # 41 M numbers each
    weight = torch.randn(64, 2, dtype=torch.float16, device=DEVICE).requires_grad_()
    out = layer_mix(states, weight, backend="triton")
    assert out.numel() > BIG
    assert torch.equal(out[-1], layer_mix(states, weight[-1:], backend="triton")[0])
    grad = torch.zeros_like(out)
    grad[-1] = 1
    expected = torch.autograd.grad(layer_mix(states, weight[-1:], backend="triton"), weight, grad[-1:])[0]
    torch.testing.assert_close(torch.autograd.grad(out, weight, grad)[0], expected)


def test_addresses_past_32_bits_in_the_products():
    """(streams, tokens, width) past 2^31 elements, in and out, with weights of their own and shared."""
    streams = torch.randn(9, 1, 131072, 2048, dtype=torch.float16, device=DEVICE)  # 2.4 G numbers
    assert streams.numel() > BIG
    for weight in (torch.randn(64, 2048, device=DEVICE).half(), torch.randn(9, 64, 2048, device=DEVICE).half()):
        last = weight if weight.dim() == 2 else weight[-1:]
        whole = stream_linear(streams, weight, backend="triton")
        assert torch.equal(whole[-1], stream_linear(streams[-1:], last, backend="triton")[0])
        back = stream_linear(whole, weight.mT.contiguous(), backend="triton")
        alone = stream_linear(whole[-1:], last.mT.contiguous(), backend="triton")
        assert back.numel() > BIG and torch.equal(back[-1], alone[0])


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_memory_does_not_grow_with_the_layers(make, aligner_cases, folded):
    """Beyond the results, the gradients, and the one gradient that autograd makes of those of keys and values."""
    sizes = dict(batch=1, length=512, encoder_layers=4, encoder_width=1024, llm_width=512, kv=128)
    stream = 512 * 1024 * 2  # bytes
    working = []
    for llm_layers in (4, 16):
        inputs = make("cross_key_values", torch.bfloat16, **sizes, llm_layers=llm_layers)
        leaves = aligner_cases.leaves(aligner_cases.wanting(inputs, (1, 2, 3, 4)))
        grad = torch.randn(llm_layers, 1, 512, 128, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(2):  # the first run compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = cross_key_values(*inputs, folded=folded, layers_at_once=1, backend="triton")
            grads = torch.autograd.grad(results, leaves, [grad, grad])
            taken = torch.cuda.max_memory_allocated() - before
            taken -= sum(x.nbytes for x in (*results, *results, *grads))
            del results, grads
        working.append(taken)
    assert working[1] - working[0] < stream
