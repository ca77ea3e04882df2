"""The decode kernel of adaptive_fusion_attention: few queries, no gradients. The oracle, bits, what is read, what is compiled."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention_reference
from layalign.kernels.adaptive_fusion_attention.call import Call, flatten

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
FP32 = {"dtype": torch.float32, "gate_dtype": torch.float32}
DTYPES = [torch.float32, torch.float16]
SPLITS = [1, 2, 3, 9]


def detached(inputs):
    return [x.detach() for x in inputs]


@pytest.fixture
def decode(backend):
    return pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.decode")


@pytest.fixture
def check(check_attention, decode, monkeypatch):
    """check(inputs, **options): the oracle's check, of the decode kernel and of nothing else."""

    def run(inputs, **options):
        calls = []
        monkeypatch.setattr(decode, "launch", lambda *args, **constants: calls.append(launch(*args, **constants)))
        check_attention(detached(inputs), **options, return_lse=True)
        assert calls

    launch = decode.launch
    return run


@pytest.fixture
def in_splits(attend, decode, monkeypatch):
    """in_splits(count, inputs, options) -> the results of `count` programs a key head, None for as many as it takes."""
    own = decode.split_count
    monkeypatch.setattr(plans, "enabled", False)  # in whose keys the number of splits is none

    def run(count, inputs, options):
        monkeypatch.setattr(decode, "split_count", own if count is None else lambda *sizes: count)
        return attend(*inputs, **options, return_lse=True)

    return run


def equal(results, expected):
    return all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


# Name -> query heads, key heads, the rest of the call.
OPTIONS = {
    "mha": (2, 2, {}),
    "gqa": (6, 2, {"window": 9}),
    "mqa": (5, 1, {"softcap": 2.0}),
    "full": (4, 1, {"causal": False, "scale": 0.7}),
    "start": (4, 2, {"query_start": 20, "window": 30, "softcap": 4.0}),
    "start_0": (2, 1, {"query_start": 0}),
    "start_past_the_keys": (2, 1, {"query_start": 60, "window": 15}),
    "start_far_away": (2, 1, {"query_start": 2**40, "window": 2**40 + 5}),
    "one_tensor": (4, 2, {"query_start": torch.tensor(20)}),
    "per_row": (4, 2, {"query_start": torch.tensor([33, 2**62]), "window": 40}),
    "strided_starts": (4, 2, {"query_start": torch.tensor([33, 0, 7, 0])[::2]}),
    "negative_scale": (2, 1, {"scale": -0.5}),
}


@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_the_oracle(check, cases, options, queries):
    heads, kv_heads, options = options
    gate_shape = cases.gate_shapes(2, heads, queries)[(queries + heads) % 4]
    check(cases.random_inputs(2, heads, kv_heads, queries, 50, 21, 16, gate_shape, **FP32), **options)


@pytest.mark.parametrize("pattern", ["left", "right", "holes", "random", "tiles", "one_row", "nothing", "everything"])
@pytest.mark.parametrize("queries", [1, 5])
def test_masks(check, cases, pattern, queries):
    inputs = cases.random_inputs(3, 4, 2, queries, 50, 37, 16, (4,), torch.float16, torch.float32)
    check(inputs, key_mask=cases.mask(pattern, 3, 50, 3), cross_mask=cases.mask(pattern, 3, 37, 4))


def test_long_masks_and_masks_of_any_strides(check, cases):
    """A mask is looked through 1,024 keys at a time."""
    key_mask = ((torch.arange(2500) > 1100) & (torch.arange(2500) < 2100))[:, None].expand(-1, 2).clone().T
    cross_mask = torch.ones(1, 80, dtype=torch.bool)[:, ::2].expand(2, -1)
    check(cases.random_inputs(2, 2, 1, 1, 2500, 40, 8, (1,), **FP32), key_mask=key_mask, cross_mask=cross_mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 40, 59, 64, 96, 128, 256])
def test_head_widths(check, random_inputs, width, dtype):
    check(random_inputs(1, 4, 2, 2, 19, 18, width, (1,), dtype, torch.float32))


@pytest.mark.parametrize("cross_keys", [0, 1, 16, 17])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 33])
def test_lengths(check, random_inputs, keys, cross_keys):
    check(random_inputs(1, 2, 1, 1, keys, cross_keys, 16, (2,), **FP32))


def test_more_rows_than_a_tile(check, random_inputs):
    check(random_inputs(1, 12, 1, 16, 40, 20, 16, (1, 12, 16), **FP32), window=20)


@pytest.mark.parametrize("layout", ["transposed", "fused", "padded", "strided", "columns", "expanded"])
def test_layouts(check, cases, layout):
    inputs = detached(cases.random_inputs(2, 4, 2, 5, 5, 18, 24, (2, 1, 5), **FP32))
    check(cases.laid_out(inputs, layout), key_mask=cases.mask("holes", 2, 5))


def can_decode(case):
    return case.batch and 1 <= case.queries <= 16 and not case.cuts


def test_random_call(rare_fuzz_seed, backend, cases, dtypes, check):
    case = cases.draw(rare_fuzz_seed, dtypes, can_decode)
    print(case)
    options = case.keywords()
    options.pop("return_lse")
    check(case.inputs(), **options)


def test_random_calls_in_any_batch_and_any_splits(rare_fuzz_seed, backend, cases, dtypes, in_splits):
    def has_neighbours(case):
        return can_decode(case) and case.batch > 1

    case = cases.draw(rare_fuzz_seed, dtypes, has_neighbours)
    case = dataclasses.replace(case, gate_shape=(case.batch, case.heads, case.queries), sharing=1)
    print(case)
    inputs, options = detached(case.inputs()), case.keywords()
    options.pop("return_lse")
    together = in_splits(1, inputs, options)
    assert equal(in_splits(2 + case.seed % 3, inputs, options), together)
    for rows in (torch.arange(case.batch).flip(0), *torch.arange(case.batch)[:, None]):
        part = {name: x[rows] if isinstance(x, torch.Tensor) and x.dim() else x for name, x in options.items()}
        alone = in_splits(None, [x[rows] for x in inputs], part)
        assert equal(alone, [x[rows] for x in together])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_in_any_splits(in_splits, cases, dtype, masked):
    inputs = detached(cases.random_inputs(2, 6, 2, 3, 110, 40, 32, (2, 6, 3), dtype, torch.float32))
    options = {"window": 80, "softcap": 5.0, "query_start": torch.tensor([90, 30])}
    if masked:
        options |= {"key_mask": cases.mask("tiles", 2, 110, 1), "cross_mask": cases.mask("left", 2, 40, 2)}
    whole = in_splits(1, inputs, options)
    assert all(equal(in_splits(count, inputs, options), whole) for count in (2, 3, 12, None))


def test_hidden_keys_change_no_bit(in_splits, random_inputs):
    """Keys at the same indices: a longer cache around them, and masked or unfilled places of NaN after and between them."""
    inputs = detached(random_inputs(2, 4, 2, 2, 40, 20, 16, (1,), **FP32))
    plain = in_splits(1, inputs, {})
    q, k, v, cross_k, cross_v, gate = inputs
    cache, cross = ([k.new_full((2, 2, 131, 16), torch.nan) for _ in range(2)] for _ in range(2))
    for long, short in zip((*cache, *cross), (k, v, cross_k, cross_v), strict=True):
        long[:, :, : short.shape[2]] = short
    cross_mask = (torch.arange(131) < 20).expand(2, -1)
    filled = (torch.arange(131) < 40).expand(2, -1)
    static = [q, *cache, *cross, gate]
    for start in (38, torch.tensor(38), torch.tensor([38, 38])):
        for count in SPLITS:
            options = {"query_start": start, "cross_mask": cross_mask}
            assert equal(in_splits(count, static, options), plain)
    full = {"causal": False}
    results = in_splits(2, static, {"key_mask": filled, "cross_mask": cross_mask} | full)
    assert equal(results, in_splits(1, inputs, full))

    hidden = torch.zeros(2, 40, dtype=torch.bool)
    hidden[0, :3] = hidden[1, 17:34] = hidden[:, 39] = True
    planted = [x.masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v)]
    results = [in_splits(2, [q, *pair, *inputs[3:]], {"key_mask": ~hidden}) for pair in (planted, (k, v))]
    assert equal(*results) and not results[0][0].isnan().any()


def test_a_row_that_sees_nothing(in_splits, random_inputs):
    inputs = detached(random_inputs(2, 2, 1, 2, 20, 20, 16, (1,), **FP32))
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    for count in (1, 3):
        out, *lses = in_splits(count, inputs, {"key_mask": nothing, "cross_mask": nothing})
        assert not out.any() and all(torch.equal(lse, torch.full_like(lse, -torch.inf)) for lse in lses)


CHUNK = 16  # of the interpreter's line
# Keys, cross keys, options -> chunks that are computed.
WORK = {
    "all": (100, 40, {}, 7 + 3),
    "no_cross": (100, 0, {}, 7),
    "static_cache": (400, 20, {"query_start": 20}, 2 + 2),
    "static_cache_tensor": (400, 20, {"query_start": torch.tensor([20])}, 2 + 2),
    "window": (400, 20, {"window": 20}, 2 + 2),
    "window_start": (400, 20, {"window": 20, "query_start": torch.tensor(200)}, 2 + 2),
    "left_and_right_padding": (
        400,
        100,
        {
            "key_mask": ((torch.arange(400) > 160) & (torch.arange(400) < 176))[None],
            "cross_mask": torch.arange(100)[None] < 17,
        },
        1 + 2,
    ),
    "nothing": (
        100,
        40,
        {name: torch.zeros(1, n, dtype=torch.bool) for name, n in (("key_mask", 100), ("cross_mask", 40))},
        0,
    ),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("call", WORK.values(), ids=WORK)
def test_only_chunks_that_are_seen_are_computed(in_splits, interpreted, random_inputs, call, splits):
    keys, cross_keys, options, chunks = call
    inputs = detached(random_inputs(1, 4, 2, 1, keys, cross_keys, 16, (1,), **FP32))
    with interpreted.counted_work() as work:
        in_splits(splits, inputs, options)
    assert work.dots == ({"decode_kernel": 2 * 2 * chunks} if chunks else {})  # two products, two key heads
    assert list(work.tiles) == ["decode_kernel"] + ["combine_kernel"] * (splits > 1)


@pytest.mark.parametrize(
    ("queries", "wanted", "packed", "decoding"),
    [
        (16, "", False, True),
        (17, "", False, False),
        (1, "gate", False, False),
        (1, "k", False, False),
        (1, "", True, False),
    ],
)
def test_what_decodes(attend, interpreted, cases, queries, wanted, packed, decoding):
    inputs = cases.random_inputs(1, 2, 1, queries, queries, 5, 16, (1,), **FP32)
    inputs = [x.detach().requires_grad_(name == wanted) for name, x in zip(cases.NAMES, inputs, strict=True)]
    bounds = torch.tensor([[0, queries], [0, 5]], dtype=torch.int32)
    options = dict(zip(("cu_seqlens", "cross_cu_seqlens"), bounds, strict=True)) if packed else {}
    with interpreted.counted_work() as work:
        out = attend(*inputs, **options)
    launched = ["repair_bounds_kernel"] * packed + ["decode_kernel" if decoding else "forward_kernel"]
    assert list(work.tiles) == launched
    assert out.requires_grad == bool(wanted)
    with interpreted.counted_work() as work, torch.no_grad():
        attend(*inputs)
    assert list(work.tiles) == ["decode_kernel" if queries <= 16 else "forward_kernel"]


def test_few_tensors_are_made(attend, decode, random_inputs, monkeypatch):
    """The output, and of a call in splits one more. The interpreter makes its own, so nothing is launched."""
    monkeypatch.setattr(decode, "launch", lambda *args, **constants: None)
    made = []
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty"), (torch, "full_like")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, allocate=allocate, **kw: made.append(allocate(*args, **kw)) or made[-1]
        )
    inputs = detached(random_inputs(2, 4, 2, 1, 60, 20, 16, (1,), **FP32))
    decode.nothing(torch.device("cpu"))
    monkeypatch.setattr(plans, "enabled", False)
    for count in (1, 2):
        monkeypatch.setattr(decode, "split_count", lambda *sizes, count=count: count)
        made.clear()
        attend(*inputs, key_mask=torch.ones(2, 60, dtype=torch.bool), query_start=torch.tensor([30, 40]))
        assert len(made) == count


def test_split_counts(decode, monkeypatch):
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    counts = {
        (programs, chunks): decode.split_count(programs, chunks, None)
        for programs, chunks in ((8, 4), (8, 64), (8, 10), (64, 64), (104, 64), (106, 64), (256, 64))
    }
    assert list(counts.values()) == [1, 16, 10, 2, 1, 1, 1]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("cross_keys", [0, 5])
def test_compiled_without_a_break(attend, cases, device, cross_keys, return_lse):
    inputs = cases.laid_out(detached(cases.random_inputs(2, 4, 2, 2, 9, cross_keys, 16, (1,), **FP32)), "transposed")
    inputs = [x.to(device) for x in inputs]
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for start in (None, 4, torch.tensor([3, 4], device=device)):
        options = {"query_start": start, "return_lse": return_lse, "window": 3}
        got, want = (function(*inputs, **options) for function in (compiled, attend))
        assert equal(got, want) if return_lse else torch.equal(got, want)
    operators = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    arguments = (*flatten(Call(*inputs, query_start=4, scale=0.25, window=3)), return_lse)
    torch.library.opcheck(operators._decode_operator, arguments, test_utils=("test_schema", "test_faketensor"))


STEPS = """
import torch, triton
from layalign.kernels import launch
from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu import decode
from layalign.kernels.ahead_of_time.worker import AbsentGPU

keys = []
decode.multiprocessors = lambda device: 132
triton.runtime.driver.set_active(AbsentGPU("sm_90"))
triton.knobs.runtime.jit_cache_hook = lambda key, **rest: keys.append((rest["fn"].name, str(key))) or True  # compiles nothing

def record(kernel, grid, args, constants, options):
    kernel.warmup(*args, grid=grid, **constants, **options)

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

with launch.recording("sm_90", record):
    for window in (None, 300):
        for step in (*range(1, 40), 300, 301, 900):
            q = meta(1, 1, 32, 128).transpose(1, 2)
            cross, cross_mask, gate = meta(1, 8, 77, 128), meta(1, 77, dtype=torch.bool), meta(1, dtype=torch.float32)
            for length, start in ((step, None), (1024, step - 1)):  # a dynamic and a static cache
                cache, mask = meta(1, 8, length, 128), meta(1, length, dtype=torch.bool)
                options = dict(key_mask=mask, cross_mask=cross_mask, query_start=start, scale=0.1, window=window)
                decode.decode(Call(q, cache, cache, cross, cross, gate, **options), False)
print(sorted(name.split(".")[-1] for name, _ in set(keys)))
"""


def test_consecutive_steps_are_one_compiled_kernel(backend):
    """One of each kernel for plain and for windowed layers, whatever the step, the cache's length, and splits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(["combine_kernel"] * 2 + ["decode_kernel"] * 2)


def test_neighbours_choose_no_tiles(decode):
    """Other tiles add in another order: a row's launch is the same in any batch and cache, but for its splits."""
    from layalign.kernels import launch

    def found(batch, keys):
        q, k = torch.empty(batch, 8, 1, 64, device="meta"), torch.empty(batch, 2, keys, 64, device="meta")
        launches = []

        def record(kernel, grid, args, constants, options):
            tiles = {n: v for n, v in launch.compiled_for(constants).items() if n.startswith("BLOCK")}
            launches.append((kernel.__name__, tiles, options))

        with launch.recording("sm_90", record):
            gate = torch.empty(1, device="meta")
            decode.decode(Call(q, k, k, k, k, gate, scale=0.1), False)
        return launches[0]

    assert found(1, 5000) == found(64, 5000) == found(2, 20)


def test_reference_agrees_on_the_sums(attend, random_inputs):
    inputs = detached(random_inputs(2, 4, 2, 3, 70, 20, 16, (1,), **FP32))
    for got, want in zip(
        attend(*inputs, return_lse=True), adaptive_fusion_attention_reference(*inputs, return_lse=True), strict=True
    ):
        torch.testing.assert_close(got, want)
