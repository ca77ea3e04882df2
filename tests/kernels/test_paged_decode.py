"""adaptive_fusion_decode_paged: the oracle, the dense operator's bits, garbage in tables and slots, what is made and refused."""

import os
import subprocess
import sys

import pytest
import torch

from layalign.kernels import plans
from layalign.kernels.adaptive_fusion_attention import (
    adaptive_fusion_attention,
    adaptive_fusion_decode_paged,
    adaptive_fusion_decode_paged_reference,
)
from layalign.kernels.adaptive_fusion_attention.paged import PagedCall, gathered


@pytest.fixture
def operator(backend, device):
    """adaptive_fusion_decode_paged by the backend; CPU tensors go to its device, in their strides, and back."""

    def moved(x):
        if not isinstance(x, torch.Tensor) or x.device == device:
            return x
        memory = x.untyped_storage().to(device)
        return torch.zeros(0, dtype=x.dtype, device=device).set_(memory, x.storage_offset(), x.shape, x.stride())

    def call(*inputs, **options):
        options = {name: moved(x) for name, x in options.items()}
        found = adaptive_fusion_decode_paged(*map(moved, inputs), **options, backend=backend)
        return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

    return call


@pytest.fixture
def decode():
    return pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.decode")


@pytest.fixture
def in_splits(operator, decode, monkeypatch):
    """in_splits(count, case) -> results of `count` programs a key head."""
    monkeypatch.setattr(plans, "enabled", False)

    def run(count, case):
        monkeypatch.setattr(decode, "split_count", lambda *sizes: count)
        return operator(*case.inputs(), **case.keywords(), return_lse=True)

    return run


def equal(results, expected):
    return all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def dense(case, backend, device):
    """The same keys end to end, by the operator for them."""
    given = dict(zip(PagedCall._fields, case.inputs(), strict=False)) | case.keywords()
    call = gathered(PagedCall(**given))._asdict()
    del call["causal"]
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    return tuple(x.cpu() for x in adaptive_fusion_attention(**call, return_lse=True, backend=backend))


CASES = {
    "page_16": {},
    "page_32": dict(page=32, cross_page=32, lengths=(32, 64, 33), layout="two_pages", gate_shape=(4,)),
    "page_24": dict(page=24, cross_page=40, lengths=(24, 47, 49), heads=8, layout="two_caches"),
    "mha": dict(heads=2, lengths=(5, 31, 32), gate_shape=(2,), dtype=torch.float16),
    "no_cross": dict(cross_lengths=(0, 0, 0), layout="apart"),
    "padding_row": dict(lengths=(0, 7), cross_lengths=(0, 3)),
    "softcap": dict(options={"softcap": 2.0}, dtype=torch.float16),
    "window": dict(lengths=(70, 3, 64), options={"window": 20}),
    "sinks": dict(sink=True, gate_shape=(3, 4, 1)),
    "few_queries": dict(queries=3, lengths=(2, 17, 64), options={"window": 18}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_oracle(operator, check_against_oracle, paged_cases, case):
    case = paged_cases.PagedCase(**case)
    check_against_oracle(
        operator, adaptive_fusion_decode_paged_reference, case.inputs(), **case.keywords(), return_lse=True
    )


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_random_call(rare_fuzz_seed, backend, dtypes, device, operator, check_against_oracle, in_splits, paged_cases):
    """The oracle's bound, and the bits of the operator over the same keys end to end, in any splits, twice."""
    case = paged_cases.draw(rare_fuzz_seed, dtypes)
    print(case)
    reference = adaptive_fusion_decode_paged_reference
    check_against_oracle(operator, reference, case.inputs(), **case.keywords(), return_lse=True)
    once = in_splits(1, case)
    assert not any(x.isnan().any() for x in once)
    assert equal(dense(case, "triton", device), once)
    assert equal(in_splits(2 + rare_fuzz_seed % 3, case), once)
    assert equal(in_splits(1, case), once)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_no_address_outside_the_caches(in_splits, interpreted, paged_cases):
    case = paged_cases.PagedCase(lengths=(60, 1, 0), options={"window": 20}, cross_lengths=(0, 33, 1))
    with interpreted.guarded_addresses():
        in_splits(1, case)
        in_splits(3, case)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_what_is_seen_is_read(operator, paged_cases):
    """NaN in unused slots, of which every case is full, would show: one in a used slot does."""
    inputs = paged_cases.PagedCase(lengths=(40,), cross_lengths=(3,)).inputs()
    inputs[2][inputs[3][0, 1], 3] = torch.nan  # the value of key 19
    assert operator(*inputs).isnan().all()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rows_without_cross_keys_are_self_attention(operator, paged_cases, device):
    inputs = paged_cases.PagedCase(cross_lengths=(0, 0, 0)).inputs()
    call = gathered(PagedCall(*inputs))
    nothing = call.k[:, :, :0]
    alone = [*call[:3], nothing, nothing, call.gate, call.key_span, call.query_start]
    *tensors, span, start = (x.to(device) for x in alone)
    expected = adaptive_fusion_attention(*tensors, key_span=span, query_start=start, backend="triton")
    assert torch.equal(operator(*inputs), expected.cpu())


@pytest.mark.parametrize("given", [False, True])
def test_what_is_made(decode, paged_cases, monkeypatch, given):
    """The output, where none is given, and of a call in splits room for partial results: no copy of a cache."""
    pages = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.paged")
    call = PagedCall(*paged_cases.PagedCase().inputs(), scale=0.25)
    if given:
        call = call._replace(out=torch.zeros_like(call.q))
    monkeypatch.setattr(decode, "launch", lambda *args, **constants: None)
    decode.nothing(torch.device("cpu"))
    made = []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                memories = {x.untyped_storage().data_ptr() for x in (*call, *made) if isinstance(x, torch.Tensor)}
                if result.untyped_storage().data_ptr() not in memories:
                    made.append(result)
            return result

    for count in (1, 2):
        monkeypatch.setattr(decode, "split_count", lambda *sizes, count=count: count)
        made.clear()
        with Noting():
            pages.decode_pages(call, False)
        assert len(made) == count - given


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("planned", [False, True])
def test_out(operator, paged_cases, monkeypatch, device, planned):
    """Written where it lies, also by the second call of a kind, which repeats a plan, of other lengths and pages."""
    monkeypatch.setattr(plans, "enabled", planned)
    for lengths in ((1, 16, 40), (8, 40, 2)):
        case = paged_cases.PagedCase(lengths=lengths)
        inputs = [x.to(device) for x in case.inputs()]
        wide = torch.zeros(3, 1, 4, 40, device=device)
        out = wide[..., :16].transpose(1, 2)
        found = adaptive_fusion_decode_paged(*inputs, out=out, backend="triton")
        assert found is out and torch.equal(out, adaptive_fusion_decode_paged(*inputs, backend="triton"))
        assert out.any() and not wide[..., 16:].any()
        expected = adaptive_fusion_decode_paged_reference(*inputs)
        torch.testing.assert_close(out, expected)
    operators = pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    assert sum(plan is not None for plan in operators.PLANS._plans.values()) == 2 * planned
    if planned and device.type == "cpu":  # what a plan does not know is looked at all the same
        with pytest.raises(ValueError, match="cross_seq_lens: got 99 in row 1"):
            adaptive_fusion_decode_paged(
                *inputs[:8], torch.tensor([1, 99, 1], dtype=torch.int32), inputs[9], backend="triton"
            )


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_without_a_break(operator, paged_cases, backend, device, return_lse):
    inputs = [x.to(device) for x in paged_cases.PagedCase().inputs()]
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    got, want = (function(*inputs, window=9, return_lse=return_lse) for function in (compiled, operator))
    assert equal(got, want) if return_lse else torch.equal(got, want)
    if backend == "triton":
        arguments = (*inputs, None, 0.25, 9, None, return_lse)
        torch.library.opcheck(
            torch.ops.layalign.adaptive_fusion_decode_paged, arguments, test_utils=("test_schema", "test_faketensor")
        )


ERRORS = {
    "q: got shape (3, 4, 17, 16)": {"q": torch.zeros(3, 4, 17, 16)},
    "k_cache: got shape (6, 16, 3, 16), takes (pages, keys of a page, Hkv, D), Hkv a number that divides the 4 heads of q": {
        "k_cache": torch.zeros(6, 16, 3, 16)
    },
    "v_cache: got shape (6, 16, 2, 8)": {"v_cache": torch.zeros(6, 16, 2, 8)},
    "v_cache: got strides": {"v_cache": torch.zeros(6, 16, 16, 2).transpose(2, 3)},
    "cross_k_cache: got torch.float16, takes the dtype of q, torch.float32": {
        "cross_k_cache": torch.zeros(4, 16, 2, 16).half()
    },
    "block_table: got torch.int64, takes (3, pages of a row) int32": {
        "block_table": torch.zeros(3, 4, dtype=torch.int64)
    },
    "block_table: got shape (2, 4), takes (3, pages of a row)": {"block_table": torch.zeros(2, 4, dtype=torch.int32)},
    "cross_seq_lens: got shape (3, 1), takes (3,)": {"cross_seq_lens": torch.zeros(3, 1, dtype=torch.int32)},
    "cross_seq_lens: got list, takes (3,) int32": {"cross_seq_lens": [1, 2, 3]},
    "seq_lens: got -1 in row 1, takes 0 to ": {"seq_lens": torch.tensor([1, -1, 1], dtype=torch.int32)},
    "block_table: got page 6 in row 2, for keys from 16 on, takes 0 to 5 for keys that are read": {
        "block_table": torch.tensor([[0, 0, 0], [0, 0, 0], [0, 6, 0]], dtype=torch.int32)
    },
    "gate: got shape (3,)": {"gate": torch.zeros(3)},
    "sink: got shape (3,)": {"sink": torch.zeros(3)},
    "q: got tensors that require gradients": {"q": torch.zeros(3, 4, 1, 16, requires_grad=True)},
    "window: got 0": {"window": 0},
    "out: got shape (3, 4, 16), takes (3, 4, 1, 16)": {"out": torch.zeros(3, 4, 16)},
    "return_lse: got 1": {"return_lse": 1},
    'backend="flash" is not available here for adaptive_fusion_decode_paged': {"backend": "flash"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_refused(paged_cases, message):
    given = dict(zip(paged_cases.NAMES, paged_cases.PagedCase().inputs(), strict=True)) | ERRORS[message]
    with pytest.raises(ValueError) as error:
        adaptive_fusion_decode_paged(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "cross_k_cache", "cross_v_cache", "gate", "sink"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradients_are_refused_wherever_they_are_wanted(operator, paged_cases, device, name):
    """Also by a call that has a plan."""
    given = dict(zip(paged_cases.NAMES, paged_cases.PagedCase().inputs(), strict=True)) | {"sink": torch.zeros(4)}
    given = {each: x.to(device) for each, x in given.items()}
    operator(**given)
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ValueError, match="tensors that require gradients"):
        operator(**given)


COMPILED = """
import torch, triton
from layalign.kernels import launch
from layalign.kernels.adaptive_fusion_attention import shipped_calls
from layalign.kernels.ahead_of_time.worker import AbsentGPU

keys = set()
triton.runtime.driver.set_active(AbsentGPU("sm_90"))
triton.knobs.runtime.jit_cache_hook = lambda key, **rest: keys.add((rest["fn"].name, str(key))) or True  # compiles nothing

def record(kernel, grid, args, constants, options):
    kernel.warmup(*args, grid=grid, **constants, **options)

with launch.recording("sm_90", record):
    for keys_of_row in (16, 112, 1600):
        for batch in (1, 3, 64):
            sizes = dict(head_dim=128, dtype=torch.bfloat16, heads=8, kv_heads=2, queries=1, keys=keys_of_row, cross=80)
            shipped_calls.decode_pages(shipped_calls.paged_call(batch=batch, **sizes), False)
print(sorted(name.split(".")[-1] for name, _ in keys))
"""


def test_growing_tables_are_one_compiled_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(["combine_kernel", "decode_kernel"])
