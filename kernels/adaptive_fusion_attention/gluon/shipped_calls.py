"""The calls of the Hopper kernels that the compile report compiles, on meta tensors; for sm_90, where this Triton has Gluon."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..call import Call
from ..gpu.arguments import Prepared
from ..shipped_calls import call_of_sizes
from .schedule import STAGES

_FORWARD = ("gluon", "gluon_spans", "gluon_everything")
_GRADIENTS = ("gluon_gradients", "gluon_gradients_spans", "gluon_gradients_everything")
VARIANTS = (*_FORWARD, *_GRADIENTS)
BY_HEAD_DIM = True


def lengths(variant: str, *, architecture: str, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """One length: the kernels are the same for all."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim in STAGES and architecture == "sm_90"
    return (1024,) if fits and find_spec("triton.experimental.gluon") else ()


def run(variant: str, head_dim: int, dtype: torch.dtype, length: int) -> None:
    """Forward, or all gradients, of 32 query heads over 8 key heads laid out as a model's projections.

    gluon: causal, whole tiles of cross keys; keeping the un-gated terms for a backward, and keeping none.
    gluon_spans: the same with spans, which is what a model's padding becomes.
    gluon_everything: spans, window, soft cap, a start per row and a gate per query.
    gluon_gradients...: the same calls' gradients, without the cap where they do not take it.
    """
    from ..gpu.forward import Kept
    from .forward import forward

    everything = variant.endswith("_everything")
    batch, cross_keys = 2, 256

    def projected(heads, tokens):
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    span = None if variant in ("gluon", "gluon_gradients") else torch.empty(batch, 2, dtype=torch.int32, device="meta")
    call = Call(
        projected(32, length),
        projected(8, length),
        projected(8, length),
        projected(8, cross_keys),
        projected(8, cross_keys),
        torch.empty((batch, 32, length) if everything else (1,), dtype=torch.float32, device="meta"),
        key_span=span,
        cross_span=span,
        query_start=torch.empty(batch, dtype=torch.int64, device="meta") if everything else None,
        scale=head_dim**-0.5,
        window=length // 2 if everything else None,
        softcap=50.0 if everything else None,
    )
    if variant in _GRADIENTS:
        _gradients(call)
        return
    forward(Prepared(call))
    if not everything:
        forward(Prepared(call), Kept(False, False, False))


def _gradients(call):
    """All gradients of a call."""
    from ..gpu.arguments import empty_like, rows
    from ..gpu.backward import Gradients, key_terms
    from ..gpu.query_gradients import Saved
    from .backward import key_value_gradients, query_gradients, takes_backward

    grad_out = torch.empty_like(call.q)
    if not takes_backward(call, grad_out, [True] * 6):
        call = call._replace(softcap=None)
    prepared = Prepared(call)
    sums = torch.empty(call.q.shape[:3], dtype=torch.float32, device="meta")
    grads = Gradients(*map(empty_like, prepared.tensors), None)
    saved = Saved(rows(grad_out), sums, sums, sums, sums)
    key_value_gradients(*key_terms(saved, grads, prepared), saved.grad_out, prepared)
    query_gradients(saved, grads.q, prepared)


def run_sizes(*, trained: bool, **sizes: Any) -> None:
    """The forward of a `call_of_sizes`, keeping what a backward needs where `trained`, and then all gradients too."""
    from ..gpu.forward import Kept
    from .forward import forward

    call = call_of_sizes(**sizes)
    forward(Prepared(call), Kept(trained, trained, trained))
    if trained:
        _gradients(call)
