"""The package flash-attn, twice: version 2, and version 4, which is called flash-attn-4."""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version

from bench.attempts import in_a_line
from bench.measuring import Missing
from bench.peers import needs_cuda
from bench.peers.attention.two_calls import Attention, two_calls


def flash_attn(distribution: str, module: str) -> Attention | Missing:
    """Both versions live under one import name: which is installed, only the distributions say."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return Missing(f"{distribution} is not installed")
    try:
        flash_attn_func = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
    except Exception as error:  # built for another PyTorch, it lacks a symbol: that costs no other row
        return Missing(f"{distribution} does not import: {in_a_line(error)}")

    def attention(q, k, v, is_causal):
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return partial(two_calls, attention)


_VERSIONS = {
    "flash-attn 2": needs_cuda("flash-attn 2", lambda case: flash_attn("flash-attn", "flash_attn")),
    "flash-attn 4": needs_cuda("flash-attn 4", lambda case: flash_attn("flash-attn-4", "flash_attn.cute")),
}
PEERS = {"attention": _VERSIONS, "decode": _VERSIONS}
