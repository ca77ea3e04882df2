"""What the operators' tests share: the oracle, backends and their devices, random calls, poisoned memory."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._device

from layalign.kernels.adaptive_fusion_attention import (
    adaptive_fusion_attention,
    adaptive_fusion_attention_reference,
)
from layalign.kernels.adaptive_fusion_attention import reference as specification

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
COMPILING = torch.cuda.is_available() and not INTERPRETING
HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_generate_tests(metafunc):
    """fuzz_seed: one test for each random call asked for; rare_fuzz_seed: for a tenth of them."""
    for fixture, share in (("fuzz_seed", 1), ("rare_fuzz_seed", 10)):
        if fixture in metafunc.fixturenames:
            one, first, count = (metafunc.config.getoption(name) for name in ("fuzz_seed", "fuzz_from", "fuzz"))
            if count is None:
                count = 1000 if metafunc.config.getoption("thorough") else 40 if COMPILING else 100
            seeds = range(first // share, -(-(first + count) // share))
            metafunc.parametrize(fixture, seeds if one is None else [one])


def neighbour(name):
    """The module beside this file; pytest's importlib mode puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases():
    return neighbour("attention_cases")


@pytest.fixture(scope="session")
def paged_cases():
    return neighbour("paged_cases")


@pytest.fixture(scope="session")
def aligner_cases():
    return neighbour("aligner_cases")


@pytest.fixture(scope="session")
def stand_in():
    """Modules that stand for flash-attn."""
    return neighbour("flash_stand_in")


@pytest.fixture(scope="session")
def random_inputs(cases):
    return cases.random_inputs


@pytest.fixture(scope="session")
def random_mask(cases):
    return cases.random_mask


@pytest.fixture(scope="session")
def gluon_on_cpu():
    return neighbour("gluon_on_cpu")


@pytest.fixture(scope="session")
def gluon_calls():
    """Random calls for them."""
    return neighbour("gluon_calls")


@pytest.fixture(scope="session")
def gluon_interleavings():
    return neighbour("gluon_interleavings")


@pytest.fixture(scope="session", autouse=HAS_TRITON and INTERPRETING)
def interpreted(request):
    if not (HAS_TRITON and INTERPRETING):
        pytest.skip("needs Triton's interpreter")
    request.getfixturevalue("quick_interpreter")
    return neighbour("interpreted")


@pytest.fixture
def overflow_checked(interpreted):
    """An overflow of 32 bits within a kernel is an error."""
    from tests.quick_interpreter import overflow_checks

    with overflow_checks(True):
        yield


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Its name. Triton's kernels run in its interpreter, or compiled where there is a GPU."""
    if request.param == "triton":
        if not HAS_TRITON or not (INTERPRETING or COMPILING):
            pytest.skip("Triton needs a CUDA device or its interpreter")
        if INTERPRETING and request.node.callspec.params.get("dtype") == torch.bfloat16:
            pytest.skip("bf16 is wrong in Triton's interpreter")
    return request.param


@pytest.fixture
def dtypes(backend):
    """What the backend computes in."""
    halves = [torch.float16] if backend == "triton" and INTERPRETING else [torch.float16, torch.bfloat16]
    return [torch.float32, *halves]


@pytest.fixture
def device(backend):
    """Where the backend computes."""
    return torch.device("cuda" if backend == "triton" and COMPILING else "cpu")


@pytest.fixture
def attend(backend, device):
    """adaptive_fusion_attention by the backend; CPU tensors go to its device and back."""

    def call(*inputs, **options):
        if inputs[0].device.type == device.type:
            return adaptive_fusion_attention(*inputs, **options, backend=backend)
        options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        results = adaptive_fusion_attention(*(_OnGpu.apply(x) for x in inputs), **options, backend=backend)
        return tuple(x.cpu() for x in results) if isinstance(results, tuple) else results.cpu()

    return call


@pytest.fixture
def by_backend(backend, device):
    """by_backend(operator): an operator by the backend; CPU tensors, and lists of them, go to its device and back."""

    def moved(argument):
        if isinstance(argument, (list, tuple)):
            return [moved(x) for x in argument]
        return _OnGpu.apply(argument) if isinstance(argument, torch.Tensor) else argument

    def of(operator):
        def call(*inputs, **options):
            first = inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]
            if first.device.type == device.type:
                return operator(*inputs, **options, backend=backend)
            results = operator(*(moved(x) for x in inputs), **options, backend=backend)
            if isinstance(results, torch.Tensor):
                return results.cpu()
            return tuple(x if x is None else x.cpu() for x in results)

        return call

    return of


class _OnGpu(torch.autograd.Function):
    """The tensor in the same strides on the GPU."""

    @staticmethod
    def forward(ctx, x):
        memory = x.untyped_storage().cuda()
        return torch.zeros(0, dtype=x.dtype, device="cuda").set_(memory, x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu()


@pytest.fixture
def check_attention(check_against_oracle, attend):
    """check(inputs, **options) of adaptive_fusion_attention."""

    reference = adaptive_fusion_attention_reference

    def check(inputs, **options):
        def by_element(gate):
            return (gate[:, None, None] if gate.dim() == 1 else gate[..., None]).expand(inputs[0].shape)

        def reference_by_element(q, k, v, cross_k, cross_v, gate, return_lse=False, **options):
            """The reference's, of a gate for every element of the output."""
            one = q.new_ones(1)
            self_out = reference(q, k, v, cross_k, cross_v, one * 0, **options)
            return self_out + gate.to(q.dtype) * reference(q, k, torch.zeros_like(v), cross_k, cross_v, one, **options)

        # A score is rounded by its own ulp, and that is a relative error of its weight: 40 in a score, 40 ulp in a weight,
        # whose share in a gradient the backward computes from a product in another order than the forward did.
        q, k, _, cross_k, *_ = (x.detach().double() for x in inputs)
        scale = q.shape[-1] ** -0.5 if options.get("scale") is None else abs(options["scale"])
        cross_k = cross_k.repeat_interleave(q.shape[0] // max(1, cross_k.shape[0]), 0)
        scores = [scale * q @ x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(-1, -2) for x in (k, cross_k)]
        largest = max((x.abs().max().item() for x in scores if x.numel()), default=0.0)
        summed = (5, by_element, reference_by_element)
        options |= {} if inputs[0].dtype == torch.float32 else {"same": reference_by_fused_formula}
        check_against_oracle(attend, reference, inputs, summed=summed, ulps=max(20, 4 * largest), **options)

    return check


@pytest.fixture
def check_by_row(check_against_oracle):
    """check(attend, inputs, **options): a function like adaptive_fusion_attention, its gate's gradient measured as the sum over rows."""

    def check(attend, inputs, **options):
        def by_row(gate):
            return (gate[:, None] if gate.dim() == 1 else gate).expand(inputs[0].shape[:3])

        reference = adaptive_fusion_attention_reference
        check_against_oracle(attend, reference, inputs, summed=(5, by_row, reference), **options)

    return check


def reference_by_fused_formula(*inputs, **options):
    """The reference with the backward formula that all fused attention has: the gradient of a score is P (dP - sum dO O), where O
    is the output as it was kept, rounded.

    Where one key takes nearly all of the weight, that difference cancels. Eager PyTorch sums P dP, and cancels exactly by luck in
    rows of a few keys: of 400 fp16 calls of 3 queries, 3 keys, width 96 and a scale of 2 PyTorch's own flash attention errs by
    more than twice eager's error in 36, up to 26 times as much; the kernels in 40. From 17 keys on neither does in any.
    """

    def attention(q, k, v, visible, scale, softcap, sink=None):
        seen = visible.any(dim=2)[..., None]
        k, v = (torch.where(seen, x, 0.0).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if scores.shape[-1] == 0:
            return plain(q, k, v, visible, scale, softcap, sink)
        scores = scores.masked_fill(~visible, -torch.inf)
        keys = v
        if sink is not None:
            scores = torch.cat([scores, sink.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
            v = torch.nn.functional.pad(v, (0, 0, 0, 1))
        weights = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min))
        total = weights.detach().sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        out, total = weights @ v, weights.sum(dim=-1, keepdim=True)
        _, lse = plain(q.detach(), k, keys, visible, scale, softcap, sink)
        return out - (total - total.detach()) * out.detach(), lse

    plain = specification._attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specification, "_attention", attention)
        return adaptive_fusion_attention_reference(*inputs, **options)


@pytest.fixture(autouse=HAS_TRITON)
def no_plans():
    """Each test's calls are the first of their kind, whatever ran before."""
    yield
    operator = sys.modules.get("layalign.kernels.adaptive_fusion_attention.gpu.operator")
    if operator is not None:
        operator.PLANS.clear()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def poisoned_empty():
    """Fresh memory holds NaN, so that an element nobody wrote cannot pass for a result."""
    # What `with torch.device(...)` acts on is remembered at its first use: these functions, not the ones below, which call them.
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
            *((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
        ):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

    return allocate_poisoned


@pytest.fixture(scope="session")
def check_against_oracle():
    return neighbour("oracle").check
