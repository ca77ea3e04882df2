"""Self-attention plus gated cross-attention over one shared query (LayAlign, arXiv 2502.11405, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..dispatch import autocast_dtype, cast_for_autocast, choose_backend, malformed
from . import flash_backend, paged, torch_backend
from .call import Call, check
from .reference import (
    adaptive_fusion_attention_reference,
    adaptive_fusion_decode_paged_reference,
    attend_reference,
)

__all__ = [
    "adaptive_fusion_attention",
    "adaptive_fusion_attention_reference",
    "adaptive_fusion_decode_paged",
    "adaptive_fusion_decode_paged_reference",
]

# Name -> function of a checked Call and whether log-sum-exps are wanted.
_BACKENDS: dict[str, Callable[[Call, bool], Any]] = {
    "torch": torch_backend.fused_attention,
    "flash": flash_backend.fused_attention,
    "reference": attend_reference,
}
if find_spec("triton"):  # there are systems without
    from .gpu import operator

    _BACKENDS["triton"] = operator.fused_attention


def adaptive_fusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cross_k: Tensor,
    cross_v: Tensor,
    gate: Tensor,
    *,
    sink: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    cross_mask: Tensor | None = None,
    key_span: Tensor | None = None,
    cross_span: Tensor | None = None,
    query_start: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cross_cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(scale q k^T + mask) v + gate * softmax(scale q cross_k^T + cross mask) cross_v, two separate softmaxes.

    Args:
        q: (B, Hq, S, D) queries in fp32, fp16 or bf16 (fp64 with backend="reference"); D <= 256.
        k, v: (B, Hkv, N, D), N >= S; Hq is a multiple of Hkv.
        cross_k, cross_v: (B, Hkv, T, D); T = 0 leaves plain self-attention. (B / n, Hkv, T, D) is read by n rows of q each,
            row b by those from n b on: beams or samples of several examples, without a copy.
        gate: (1,), (Hq,), (B, 1, S) or (B, Hq, S), in fp32 or the dtype of q.
        sink: (Hq,), in fp32 or the dtype of q: a score that joins the softmax of the self term, after scale and soft cap, and has no
            value: attention sinks (gpt-oss). self_lse counts it.
        causal: query i sits at key index query_start + i and attends to keys up to there.
        scale: of both scores; None is D ** -0.5.
        window: attend to keys less than `window` positions back; needs causal. Self term only.
        softcap: scores s become softcap * tanh(s / softcap). Self term only.
        key_mask, cross_mask: (B, N), (B, T) bool, True = attend; None attends to all. (B / n, T) as cross_k.
        key_span, cross_span: (B, 2) int32, beside the masks: row b attends to keys span[b, 0] <= key < span[b, 1], which are cut to
            what there is; None attends to all. (B / n, 2) as cross_k. What contiguous padding wants: a mask costs the kernels a
            list of its tiles and their fast loads, a span nothing, and the padding beside a row changes none of its bits. Not with
            cu_seqlens.
        query_start: key index of the first query, an int or an integer tensor () or (B,); None is N - S.
        cu_seqlens, cross_cu_seqlens: (n + 1,) int32, from 0 up to S and to T: n packed sequences (B = 1, N = S);
            sequence i attends to itself and to cross sequence i, either may be empty. Given together.
        return_lse: also return both log-sum-exps, (B, Hq, S) fp32, -inf where a row attends to nothing; no gradient.
        backend: "triton" (one launch; CUDA and HIP), "torch" (two calls of PyTorch's attention and a combine), "flash" (the
            same by flash-attn where it is installed; no masks, no sink), "reference", or "auto": "triton" where there is such a GPU,
            else "torch".

    Returns:
        (B, Hq, S, D) in the dtype of q; with return_lse (output, self_lse, cross_lse). A row with nothing to attend to
        gets 0 from that term, with zero gradients to queries, keys and values. What a masked key holds, NaN included, reaches nothing.
        Nor does what a key holds that no query of its sequence sees. Of a key that some see, the others behind causality or the
        window give it a weight of 0, and 0 x NaN is NaN in a matrix product: it may reach them, of its batch row and key head alone.

    Under autocast all tensors but gate and sink are cast to its dtype.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
        RuntimeError: where second gradients are asked for, which only "reference" has.
    """
    masks = (key_mask, cross_mask, key_span, cross_span, cu_seqlens, cross_cu_seqlens)
    call = Call(q, k, v, cross_k, cross_v, gate, sink, *masks, query_start, causal, scale, window, softcap)
    dtype = autocast_dtype(q) if isinstance(q, torch.Tensor) else None
    if dtype is not None:
        fields: list[Any] = [cast_for_autocast(x, dtype) if place < 5 else x for place, x in enumerate(call)]
        call = Call(*fields)
    if _is_for_triton(backend, q):
        results: Any = operator.attend_again(call, return_lse)
        if results is not None:
            return results
    if dtype is not None:
        with torch.autocast(q.device.type, enabled=False):
            return _run(call, return_lse, backend)
    return _run(call, return_lse, backend)


def adaptive_fusion_decode_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cross_k_cache: Tensor,
    cross_v_cache: Tensor,
    cross_block_table: Tensor,
    cross_seq_lens: Tensor,
    gate: Tensor,
    *,
    sink: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`adaptive_fusion_attention` of the last few tokens of each row over keys and values that lie in pages, as in serving engines: both
    terms in one launch, which follows the block tables and copies nothing. No gradients.

    Args:
        q: (B, Hq, S, D) queries in fp32, fp16 or bf16, those of the last S keys of each row; S from 1 to 16, D <= 256.
        k_cache, v_cache: (pages, keys of a page, Hkv, D), Hq a multiple of Hkv; any strides with a unit last one, so that both may be
            views of one tensor.
        block_table: (B, n) int32: key i of row b lies in page block_table[b, i // keys of a page]. Entries for no key that is read,
            past a row's length or before its window, may hold anything.
        seq_lens: (B,) int32: how many keys each row has, the queries' own among them; 0 is a row of padding, whose output is 0.
        cross_k_cache, cross_v_cache, cross_block_table, cross_seq_lens: the same of the cross keys, with pages of a size of their own. A
            row without cross keys, length 0, has self-attention alone.
        gate, sink, scale, window, softcap, return_lse: as in `adaptive_fusion_attention`.
        out: (B, Hq, S, D) in the dtype of q, written to and returned; None makes one.
        backend: "triton", "torch" (gathers the pages, then PyTorch's attention), "reference", or "auto": "triton" on GPUs that it
            covers, but not in fp32 with D > 64, else "torch".

    Returns:
        (B, Hq, S, D) in the dtype of q; with return_lse (output, self_lse, cross_lse). Bits do not depend on pages: they are those of
        `adaptive_fusion_attention` over the same keys end to end, wherever that decodes. What unused slots hold, NaN included,
        reaches nothing.

    Autocast is not followed. On a GPU nobody looks at what block tables and lengths hold, which would wait for the device: a length is cut
    to the table's pages, and a page that is not there is a read outside the cache.

    Raises:
        ValueError: naming the argument, what it got and what it takes; gradients among that.
    """
    caches = (k_cache, v_cache, block_table, seq_lens, cross_k_cache, cross_v_cache, cross_block_table, cross_seq_lens)
    call = paged.PagedCall(q, *caches, gate, sink, out, scale, window, softcap)
    if _is_for_triton(backend, q) and isinstance(return_lse, bool):
        results: Any = operator.decode_pages_again(call, return_lse)
        if results is not None:
            return results
    available = tuple(name for name in _BACKENDS if name != "flash")
    name = choose_backend(backend, available, "adaptive_fusion_decode_paged", q)
    paged.check(call, return_lse, name)
    if name == "triton" and not operator.decodes(q):
        if backend == "triton" and q.shape[0]:
            raise malformed(
                'backend="triton"',
                f"{q.dtype} with D = {q.shape[3]}",
                "float32 with D up to 64, or float16 or bfloat16",
            )
        name = "torch"
    call = call._replace(**_positive_scale(call))
    found: Any
    if name == "triton":
        found = operator.decode_pages_planned(call, return_lse)
        return found
    found = _BACKENDS[name](paged.gathered(call), return_lse)
    if out is None:
        return found
    return (out.copy_(found[0]), *found[1:]) if return_lse else out.copy_(found)


def _is_for_triton(backend, q):
    """Whether a call may have a plan."""
    if backend == "auto":
        chosen = isinstance(q, torch.Tensor) and q.is_cuda
    else:
        chosen = backend == "triton"
    return chosen and "triton" in _BACKENDS and not torch.compiler.is_compiling()


def _run(call, return_lse, backend):
    name = choose_backend(backend, tuple(_BACKENDS), "adaptive_fusion_attention", call.q)
    check(call, return_lse, name)
    if name != "reference":
        call = call._replace(**_positive_scale(call))
    return _BACKENDS[name](call, return_lse)


def _positive_scale(call):
    """What to replace in a call whose scale is not positive: kernels look for the largest score before they scale, PyTorch's too, which
    gives NaN where keys are masked."""
    if call.scale is None or call.scale > 0:
        return {}
    return {"q": call.q * 0, "scale": 1.0} if call.scale == 0 else {"q": -call.q, "scale": -call.scale}
