"""One call of every kernel in each of its forms, against the reference: `pytest bench/first_light/smoke.py`.

Right is, as everywhere, an error against fp64 of at most twice that of eager PyTorch in the same dtype, plus two roundings, and no
NaN; memory that nobody wrote holds NaN. The sizes are those of the goals, so that what is compiled here is what they launch.
"""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from bench import attempts
from bench.attention_suite import FP32_ROUNDINGS
from bench.cases.aligner import CASES as ALIGNER_CASES
from bench.cases.aligner import in_fp64
from bench.cases.attention import CASES, DECODING, exact_results, results_of
from bench.clocks import DeviceClock
from bench.machine import machine
from bench.measuring import EXACT, judged, tried
from layalign.kernels import layerwise_aligner
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention, adaptive_fusion_attention_reference

GLUON = "LAYALIGN_GLUON"
ATTENTION = {"attention forward": "gpu_a_mha", "attention backward": "gpu_b_mha", "decode": "gpu_c_gqa"}
ALIGNER = ("layer_mix", "layer_mix backward", "stream_linear", "stream_linear per stream", "cross_key_values", "folded")
FLASH = ("flash_attn", "flash_attn_interface")  # either is imported by backend="flash"
AGAIN = 3  # calls that agree: the first is checked and planned, the next repeated through Triton, the last launched directly


def _listed():
    """(kernel, form), what is missed most first."""
    forward, backward, _ = ATTENTION
    listed = [(kernel, "plain") for kernel in (*ATTENTION, *ALIGNER)]
    listed[1:1] = [(f"gluon {kernel}", form) for form in ("plain", "span") for kernel in (forward, backward)]
    listed += [(kernel, form) for form in ("again", "span", "masked") for kernel in ATTENTION]
    listed += [(kernel, "captured") for kernel in (*ATTENTION, *ALIGNER)]
    return listed + [(f"flash {kernel}", form) for form in ("plain", "span") for kernel in ATTENTION]


KERNELS = _listed()
EMPTY = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
EMPTY += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]


@pytest.fixture
def device():
    return torch.device(machine().device)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN."""

    def poisoning(allocate):
        def allocated(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocated

    for owner, name in EMPTY:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True)
def planless():
    """What was called before, as with another kernel in this one's place, is not repeated."""
    if find_spec("triton"):
        from layalign.kernels.adaptive_fusion_attention.gpu.operator import PLANS

        PLANS.clear()


@pytest.fixture
def chosen(monkeypatch):
    """chosen(kernel) -> the backend and the kernel's own name; a test of what is not here, or not asked for, is skipped."""

    def choose(kernel):
        first, _, rest = kernel.partition(" ")
        if first == "gluon":
            if os.environ.get(GLUON) != "1":
                pytest.skip(f"{GLUON}=1 asks for it")
            if not find_spec("layalign.kernels.adaptive_fusion_attention.gluon"):
                pytest.skip("there are no Gluon kernels")
            return "triton", rest
        monkeypatch.delenv(GLUON, raising=False)
        if first == "flash":
            if not any(map(find_spec, FLASH)):
                pytest.skip("flash-attn is not installed")
            return "flash", rest
        return "triton", kernel

    return choose


@pytest.mark.parametrize(("kernel", "form"), KERNELS, ids=[f"{kernel}-{form}" for kernel, form in KERNELS])
def test_kernel(kernel, form, device, request, chosen):
    backend, kind = chosen(kernel)
    small = request.config.getoption("small")
    with attempts.case(form):
        if (reason := attempts.why_not(kernel)) is not None:
            pytest.fail(reason, pytrace=False)
        torch.manual_seed(0)
        work, eager, exact = _attention(kind, form, small, backend) if kind in ATTENTION else _aligner(kind, small)
        if form == "again":
            work = partial(_last, work)
        if form == "captured":
            work = partial(_captured, work, device)
        wanted = tried(EXACT, exact, device)
        assert wanted.error is None, wanted.error
        roundings = 2 if device.type == "cuda" else FP32_ROUNDINGS
        errors = judged({kernel: work, "eager": eager}, wanted.result, "eager", roundings, device)
    if kernel in errors:
        pytest.fail(errors[kernel], pytrace=False)


def _last(work):
    """What the last of some calls that agree gives: plans made them."""
    for _ in range(AGAIN - 1):
        work()
    return work()


def _captured(work, device):
    """What a CUDA graph of the work gives when it is replayed."""
    if device.type != "cuda":
        return work()
    results = []
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and leaves no gradient tied to another stream
        work()
    torch.cuda.synchronize()

    def keep():
        results[:] = work()

    replay = DeviceClock.capture(keep)
    for result in results:
        result.fill_(torch.nan)
    replay()
    return results


def _attention(kernel, form, small, backend):
    """-> the kernels' results, eager PyTorch's and the right ones, of functions without arguments."""
    case = machine().fitted(DECODING | CASES)[ATTENTION[kernel]]
    case = case.small() if small else case
    trained = kernel == "attention backward"
    inputs = case.inputs(trained=trained)
    grad = case.output_gradient() if trained else None
    options = _padding(case, form) if form in ("span", "masked") else {}
    function = machine().by_backend(adaptive_fusion_attention, backend)
    work = partial(results_of, partial(function, **options), inputs, grad)
    eager = partial(adaptive_fusion_attention_reference, **options, upcast=False)
    exact = partial(exact_results, case, inputs, grad, **options)
    return work, partial(results_of, eager, inputs, grad), exact


def _padding(case, form):
    """Rows of different lengths, padded left, and cross keys padded right: as spans, or as masks."""
    rows = torch.arange(case.batch, device=machine().device)
    begins, ends = rows * case.keys // (2 * case.batch), case.cross - rows * case.cross // (2 * case.batch)
    if form == "masked":
        keys, cross = (torch.arange(length, device=machine().device) for length in (case.keys, case.cross))
        return {"key_mask": keys >= begins[:, None], "cross_mask": cross < ends[:, None]}
    spans = (begins, torch.full_like(begins, case.keys)), (torch.zeros_like(ends), ends)
    own, cross = (torch.stack(span, dim=1).int() for span in spans)
    return {"key_span": own, "cross_span": cross}


def _aligner(kernel, small):
    case = machine().fitted(ALIGNER_CASES)["gpu_gqa"]
    case = case.small() if small else case
    states, mix = case.states(), case.mix()
    backward = kernel.endswith("backward")
    if kernel.startswith("layer_mix"):
        name, inputs, grad = (
            "layer_mix",
            [states, *mix],
            case.draw(case.streams, case.batch, case.length, case.encoder_width),
        )
    elif kernel.startswith("stream_linear"):
        leading = (case.streams,) if kernel.endswith("per stream") else ()
        weight = case.draw(*leading, case.llm_width, case.encoder_width, scale=case.encoder_width**-0.5)
        name, inputs = "stream_linear", [case.draw(case.streams, case.batch, case.length, case.encoder_width), weight]
        grad = None
    else:
        name, grad = "cross_key_values", None
        inputs = [states, *mix, *case.projection(), *case.key_value_weights()]
    options = {"folded": kernel == "folded"} if name == "cross_key_values" else {}
    function = machine().by_backend(getattr(layerwise_aligner, name), "triton")
    reference = partial(getattr(layerwise_aligner, f"{name}_reference"), upcast=False)

    def run(function, inputs, grad):
        if backward:
            out = function(*inputs)
            return list(torch.autograd.grad(out, [x for x in inputs[1:] if x.requires_grad], grad))
        with torch.no_grad():
            out = function(*inputs)
        return list(out) if isinstance(out, tuple) else [out]

    def of_stacked(*inputs):
        return reference(*(torch.stack(x) if isinstance(x, list) else x for x in inputs))

    def exact():
        return run(of_stacked, [in_fp64(x) for x in inputs], None if grad is None else grad.double())

    return partial(run, partial(function, **options), inputs, grad), partial(run, of_stacked, inputs, grad), exact
