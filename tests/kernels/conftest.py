"""The oracle of every operator's tests: errors against fp64, bounded by what eager PyTorch of the same dtype makes."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention, adaptive_fusion_attention_reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
COMPILING = torch.cuda.is_available() and not INTERPRETING
HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_generate_tests(metafunc):
    """fuzz_seed: one test for each random call asked for; rare_fuzz_seed: for a tenth of them."""
    for name, share in (("fuzz_seed", 1), ("rare_fuzz_seed", 10)):
        if name in metafunc.fixturenames:
            one, count = (metafunc.config.getoption(option) for option in ("fuzz_seed", "fuzz"))
            count = (40 if COMPILING else 300) if count is None else count
            metafunc.parametrize(name, range(-(-count // share)) if one is None else [one])


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
def random_inputs(cases):
    return cases.random_inputs


@pytest.fixture(scope="session")
def random_mask(cases):
    return cases.random_mask


@pytest.fixture(scope="session", autouse=HAS_TRITON and INTERPRETING)
def interpreted():
    if not (HAS_TRITON and INTERPRETING):
        pytest.skip("needs Triton's interpreter")
    module = neighbour("interpreted")
    with module.patched_once_a_launch():
        yield module


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
def attend(backend):
    """adaptive_fusion_attention by the backend, on CPU tensors, which compiled kernels get on the GPU."""

    def call(*inputs, **options):
        if backend != "triton" or INTERPRETING:
            return adaptive_fusion_attention(*inputs, **options, backend=backend)
        options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        results = adaptive_fusion_attention(*(_OnGpu.apply(x) for x in inputs), **options, backend=backend)
        return tuple(x.cpu() for x in results) if isinstance(results, tuple) else results.cpu()

    return call


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

    def check(inputs, **options):
        def by_row(gate):
            return (gate[:, None] if gate.dim() == 1 else gate).expand(inputs[0].shape[:3])

        check_against_oracle(attend, adaptive_fusion_attention_reference, inputs, summed=(5, by_row), **options)

    return check


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def poisoned_empty():
    """Fresh memory holds NaN, so that an element nobody wrote cannot pass for a result."""
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
    """check(operator, reference, inputs, **options): outputs and all gradients of `operator`.

    `inputs` are tensors, None or lists of tensors; the floating ones with requires_grad get gradients.
    `summed` = (input index, function): see `_error_of_sums`.

    For every output and gradient: error against fp64 <= 2 x the error of the eager reference in the same dtype + a
    rounding slack, the largest among the call's tensors (a gradient that cancels to 0 keeps the rounding of its terms).
    In fp32 one tensor's eager error is a few roundings, down to none by luck, and PyTorch's own fused attention takes
    an exp of 20 ulp (single tensors were measured at up to 4.2 x, medians 1.0 to 1.6): there the bound is 2 x the
    largest eager error in the call + 20 ulp of the call's largest value.
    """

    def check(operator, reference, inputs, summed=None, **options):
        actual = _run(operator, inputs, options)
        eager = _run(reference, inputs, dict(options, upcast=False))
        exact = _run(reference, _map(_to_double, inputs), dict(options, upcast=False))
        assert actual.keys() == eager.keys() == exact.keys()
        filled = [name for name, value in exact.items() if value.isfinite().any()]
        eager_errors = {name: _error(eager[name], exact[name]) for name in filled}
        if summed is not None:
            eager_errors.update(_error_of_sums(reference, inputs, *summed, options))
        for name, error in eager_errors.items():  # of a few sums, lower by luck than rounding the exact ones once
            eager_errors[name] = max(error, _error(exact[name].to(eager[name].dtype), exact[name]))
        slack = max((_rounding(exact[name], actual[name].dtype) for name in filled), default=0.0)
        largest = max((exact[name][exact[name].isfinite()].abs().max().item() for name in filled), default=0.0)
        ulp = torch.finfo(torch.float32).eps * largest
        for name, value in actual.items():
            assert value.shape == eager[name].shape and value.dtype == eager[name].dtype, name
            finite = exact[name].isfinite()  # a log-sum-exp is -inf where nothing is attended to
            assert torch.equal(value[~finite].double(), exact[name][~finite].double()), f"{name}: other infinities"
            if name in filled:
                error = _error(value, exact[name])
                allowed = slack + 2 * eager_errors[name]
                if value.dtype == torch.float32:
                    allowed = slack + 2 * max(eager_errors.values()) + 20 * ulp
                assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

    return check


def _error(value, exact):
    finite = exact.isfinite()
    return (value.double() - exact.double())[finite].abs().max().item()


def _error_of_sums(reference, inputs, index, spread, options):
    """Each gradient of input `index` is the sum over what `spread` makes of it, so its own eager error may be small by
    luck. -> what the sum of the eager errors before summing typically comes to."""
    if not inputs[index].requires_grad or inputs[index].numel() == 0:
        return {}
    name = f"gradient of input {index}.0"
    wide = [*inputs[:index], spread(inputs[index].detach()).requires_grad_(), *inputs[index + 1 :]]
    eager = _run(reference, wide, dict(options, upcast=False))[name]
    exact = _run(reference, _map(_to_double, wide), dict(options, upcast=False))[name]
    return {name: (eager.double() - exact).norm().item() / inputs[index].numel() ** 0.5}


def _rounding(exact, dtype):
    rounded = exact[exact.isfinite()].to(dtype)
    return 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()


def _run(function, inputs, options):
    """Outputs by index and gradients by input path, from fresh leaves and the same output gradients every time."""
    inputs = _map(_leaf, inputs)
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    total = 0
    for output in outputs:
        # In bf16's few digits, so that every dtype gets exactly the same.
        weight = torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
        if output.requires_grad:
            total = total + (output * weight).sum()
    leaves = {}
    for index, item in enumerate(inputs):
        for place, tensor in enumerate(item if isinstance(item, list) else [item]):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                leaves[f"gradient of input {index}.{place}"] = tensor
    if leaves:
        results.update(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return results


def _map(function, inputs):
    return [[function(x) for x in item] if isinstance(item, list) else function(item) for item in inputs]


def _leaf(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    # detach() keeps the strides: a test of non-contiguous inputs must hand over just these.
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _to_double(tensor):
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
