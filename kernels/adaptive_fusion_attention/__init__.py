"""Self-attention plus gated cross-attention over one shared query (LayAlign, arXiv 2502.11405, equations 4 to 6)."""

from importlib.util import find_spec

import torch

from ..dispatch import autocast_dtype, cast_for_autocast, choose_backend
from . import torch_backend
from .arguments import check_arguments
from .reference import adaptive_fusion_attention_reference

__all__ = ["adaptive_fusion_attention", "adaptive_fusion_attention_reference"]

_BACKENDS = {
    "torch": torch_backend.fused_attention,
    "reference": adaptive_fusion_attention_reference,
}
if find_spec("triton"):  # there are systems without
    from . import triton_backend

    _BACKENDS["triton"] = triton_backend.fused_attention


def adaptive_fusion_attention(
    q,
    k,
    v,
    cross_k,
    cross_v,
    gate,
    *,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
    key_mask=None,
    cross_mask=None,
    query_start=None,
    cu_seqlens=None,
    cross_cu_seqlens=None,
    return_lse=False,
    backend="auto",
):
    """softmax(scale q k^T + mask) v + gate * softmax(scale q cross_k^T + cross mask) cross_v, two separate softmaxes.

    Args:
        q: (B, Hq, S, D) queries in fp32, fp16 or bf16 (fp64 with backend="reference"); D <= 256.
        k, v: (B, Hkv, N, D), N >= S; Hq is a multiple of Hkv.
        cross_k, cross_v: (B, Hkv, T, D); T = 0 leaves plain self-attention. (B / n, Hkv, T, D) is read by n rows of q each,
            row b by those from n b on: beams or samples of several examples, without a copy.
        gate: (1,), (Hq,), (B, 1, S) or (B, Hq, S), in fp32 or the dtype of q.
        causal: query i sits at key index query_start + i and attends to keys up to there.
        scale: of both scores; None is D ** -0.5.
        window: attend to keys less than `window` positions back; needs causal. Self term only.
        softcap: scores s become softcap * tanh(s / softcap). Self term only.
        key_mask, cross_mask: (B, N), (B, T) bool, True = attend; None attends to all. (B / n, T) as cross_k.
        query_start: key index of the first query, an int or an integer tensor () or (B,); None is N - S.
        cu_seqlens, cross_cu_seqlens: (n + 1,) int32, from 0 up to S and to T: n packed sequences (B = 1, N = S);
            sequence i attends to itself and to cross sequence i, either may be empty. Given together.
        return_lse: also return both log-sum-exps, (B, Hq, S) fp32, -inf where a row attends to nothing; no gradient.
        backend: "triton" (one launch; CUDA and HIP), "torch" (two calls of PyTorch's attention and a combine), "reference",
            or "auto": "triton" where there is such a GPU, else "torch". "flash" is a name of later versions.

    Returns:
        (B, Hq, S, D) in the dtype of q; with return_lse (output, self_lse, cross_lse). A row with nothing to attend to
        gets 0 from that term, with zero gradients. What a masked slot holds, NaN included, reaches nothing.

    Under autocast all tensors but the gate are cast to its dtype.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    tensors = (q, k, v, cross_k, cross_v)
    options = dict(
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        key_mask=key_mask,
        cross_mask=cross_mask,
        query_start=query_start,
        cu_seqlens=cu_seqlens,
        cross_cu_seqlens=cross_cu_seqlens,
        return_lse=return_lse,
    )
    if isinstance(q, torch.Tensor) and (dtype := autocast_dtype(q)) is not None:
        tensors = [cast_for_autocast(tensor, dtype) for tensor in tensors]
        with torch.autocast(q.device.type, enabled=False):
            return adaptive_fusion_attention(*tensors, gate, **options, backend=backend)
    name = choose_backend(backend, tuple(_BACKENDS), "adaptive_fusion_attention", q)
    check_arguments(*tensors, gate, backend=name, **options)
    if scale is not None and scale <= 0 and name != "reference":
        # Kernels look for the largest score before they scale, PyTorch's too: it gives NaN where keys are masked.
        tensors = (q * 0 if scale == 0 else -q, *tensors[1:])
        options["scale"] = 1.0 if scale == 0 else -scale
    return _BACKENDS[name](*tensors, gate, **options)
