"""The calls of the Hopper forward that the compile report compiles, on meta tensors; for sm_90, where this Triton has Gluon."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..call import Call
from ..gpu.arguments import Prepared
from ..shipped_calls import call_of_sizes
from .schedule import STAGES

VARIANTS = ("gluon", "gluon_spans", "gluon_everything")
BY_HEAD_DIM = True


def lengths(variant: str, *, architecture: str, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """One length: the kernel is the same for all."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim in STAGES and architecture == "sm_90"
    return (1024,) if fits and find_spec("triton.experimental.gluon") else ()


def run(variant: str, head_dim: int, dtype: torch.dtype, length: int) -> None:
    """Forward of 32 query heads over 8 key heads laid out as a model's projections.

    gluon: causal, whole tiles of cross keys; keeping the un-gated terms for a backward, and keeping none.
    gluon_spans: the same with spans, which is what a model's padding becomes.
    gluon_everything: spans, window, soft cap, a start per row and a gate per query.
    """
    from ..gpu.forward import Kept
    from .forward import forward

    everything = variant == "gluon_everything"
    batch, cross_keys = 2, 256

    def projected(heads, tokens):
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    span = None if variant == "gluon" else torch.empty(batch, 2, dtype=torch.int32, device="meta")
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
    forward(Prepared(call))
    if not everything:
        forward(Prepared(call), Kept(False, False, False))


def run_sizes(*, trained: bool, **sizes: Any) -> None:
    """The forward of a `call_of_sizes`, keeping what a backward needs where `trained`."""
    from ..gpu.forward import Kept
    from .forward import forward

    forward(Prepared(call_of_sizes(**sizes)), Kept(trained, trained, trained))
