"""All implementations of the fused attention that a machine has: ours, the published way, and two calls of an attention
library with the gated sum in one more pass over the outputs."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version

import published_attention
import torch
from attention_case import exact_results, results_of
from clocks import DeviceClock
from measuring import Missing, measure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention

OURS = ("triton", "torch")
FP32_ROUNDINGS = 20  # PyTorch's fused attention on a CPU takes an exp of so many ulp, as the tests' oracle allows
YARDSTICK = "two calls"
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PEERS = (*SDPA_BACKENDS, "flex", "flash-attn 2", "flash-attn 4")  # each may be missing, or refuse a call
IMPLEMENTATIONS = (*OURS, "published eager", "published sdpa", YARDSTICK, *PEERS)


def implementations(case):
    """{name: function of `adaptive_fusion_attention`'s tensors, gate (1,), or Missing}."""
    on_gpu = case.device == "cuda"
    found = {
        "triton": partial(adaptive_fusion_attention, backend="triton"),
        "torch": partial(adaptive_fusion_attention, backend="torch"),
        "published eager": published_attention.eager,
        "published sdpa": published_attention.sdpa,
        YARDSTICK: partial(_two_calls, _sdpa),
        "flex": _flex(case) if on_gpu else None,
        "flash-attn 2": _flash_attn("flash-attn", "flash_attn") if on_gpu else None,
        "flash-attn 4": _flash_attn("flash-attn-4", "flash_attn.cute") if on_gpu else None,
    }
    found |= {name: partial(_two_calls, partial(_sdpa, backend=backend)) for name, backend in SDPA_BACKENDS.items()}
    if not on_gpu:
        found["triton"] = None
    return {name: found[name] or Missing(f"{name} needs a CUDA device") for name in IMPLEMENTATIONS}


def measure_attention(case, trained, captured, effort):
    """-> {name: Measurement} of the forward, where `trained` with the gradients of all inputs after it.

    Two sets of inputs take turns. Memory is measured where it is swept over lengths, with gradients.
    """
    torch.manual_seed(0)
    sets = [(case.inputs(trained=trained), case.output_gradient() if trained else None) for _ in range(2)]
    works = {}
    for name, function in implementations(case).items():
        works[name] = function
        if not isinstance(function, Missing):
            works[name] = [partial(results_of, function, *given) for given in sets]
        if name in PEERS:
            works[name] = _unless_refused(name, works[name], captured and case.device == "cuda")
    return measure(
        works,
        partial(exact_results, case, *sets[0]),
        "published eager",
        torch.device(case.device),
        effort,
        captured=captured,
        memory=True if trained else None,
        roundings=FP32_ROUNDINGS if case.dtype == torch.float32 else 2,
    )


def cpu_limit(measurements):
    """Of the time of "torch" over the two calls that it makes itself.

    Its checks of arguments take 21 us a call in warm caches, up to five times as much behind what empties them.
    """
    return 1.15 + 1e-4 / measurements[YARDSTICK].median()


def over_best_two_calls(measurements, name):
    """Time of `name` over that of the fastest composite of two calls in the same run."""
    composites = [measurements[peer] for peer in (YARDSTICK, *PEERS) if measurements[peer].seconds]
    return max(measurements[name].ratio_to(composite) for composite in composites)


def _unless_refused(name, work, captured):
    if isinstance(work, Missing):
        return work
    try:
        DeviceClock.capture(work[0]) if captured else work[0]()
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Missing(f"{name} refuses the call: {reason}")
    return work


def _two_calls(attention, q, k, v, cross_k, cross_v, gate):
    self_out = attention(q, k, v, is_causal=q.shape[2] > 1)
    return torch.addcmul(self_out, gate, attention(q, cross_k, cross_v, is_causal=False))


def _sdpa(q, k, v, is_causal, backend=None):
    call = partial(scaled_dot_product_attention, q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
    if backend is None:
        return call()
    with sdpa_kernel(backend):
        return call()


def _flex(case):
    """Both calls and the sum compiled together, for one case: of too many shapes Dynamo compiles no more."""
    torch.compiler.reset()
    mask = None
    if case.queries > 1:
        mask = create_block_mask(_not_ahead, None, None, case.queries, case.keys, device=case.device)

    def attention(q, k, v, is_causal):
        grouped = case.heads != case.kv_heads
        return flex_attention(q, k, v, block_mask=mask if is_causal else None, enable_gqa=grouped)

    return torch.compile(partial(_two_calls, attention), fullgraph=True, dynamic=False)


def _not_ahead(batch, head, query, key):
    return query >= key


def _flash_attn(distribution, module):
    """Both versions live under one import name: which is installed, only the distributions say."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return Missing(f"{distribution} is not installed")
    flash_attn_func = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func

    def attention(q, k, v, is_causal):
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return partial(_two_calls, attention)
