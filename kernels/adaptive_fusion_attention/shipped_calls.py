"""The calls of `adaptive_fusion_attention` whose kernels the compile report compiles, on meta tensors."""

from __future__ import annotations

from typing import Any

import torch

from .call import Call
from .gpu.backward import backward
from .gpu.decode import decode
from .gpu.forward import Kept, forward
from .gpu.launch_table import decode_config, launch_config
from .gpu.paged import decode_pages
from .paged import PagedCall

VARIANTS = ("causal", "spanned", "padded", "everything", "packed", "decode", "paged")
BY_HEAD_DIM = True


def lengths(variant: str, **of_launch_table: Any) -> tuple[int, ...]:
    """The longest power of two of each bucket of lengths; of packed sequences the launch table does not know the length.

    Of decoding, the query tokens: of a group of 4 heads, tiles of 16, 32 and 64 rows.
    """
    if variant == "packed":
        return (4096,)
    if variant in ("decode", "paged"):
        of_launch_table = {name: of_launch_table[name] for name in ("architecture", "dtype", "head_dim")}
        return (1, 8, 16) if decode_config(**of_launch_table, rows=1) else ()
    of_launch_table["plain"] = variant in ("causal", "spanned")
    buckets = {}
    for length in (2**power for power in range(6, 15)):
        kernels = ("forward", "key_value_gradients", "query_gradients")
        buckets[tuple(launch_config(kernel, length=length, **of_launch_table) for kernel in kernels)] = length
    return tuple(buckets.values())


def run(variant: str, head_dim: int, dtype: torch.dtype, length: int) -> None:
    """Forward and backward with every gradient, of 32 query heads over 8 key heads laid out as a model's projections.

    causal: what a training step without padding runs.
    spanned: the same with padding as spans, and lengths that are no multiple of a tile, as from here on.
    padded: with both masks.
    everything: window, soft cap, both masks, a start per row and a gate per query.
    packed: sequences end to end in one row, with both masks.
    decode: `length` tokens over a cache, plainly and with everything; no backward.
    paged: the same over pages of 16 keys, vLLM's, 64 rows at once plainly.
    """
    if variant in ("decode", "paged"):
        (_decode if variant == "decode" else _paged)(head_dim, dtype, length)
        return
    packed, everything = variant == "packed", variant == "everything"
    batch, queries, cross_keys = (1 if packed else 2), length, 256
    if variant != "causal":
        queries, cross_keys = length - 3, 253

    def projected(heads, tokens):
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    def flags(tokens):
        return None if variant in ("causal", "spanned") else torch.empty(batch, tokens, dtype=torch.bool, device="meta")

    span = torch.empty(batch, 2, dtype=torch.int32, device="meta") if variant == "spanned" else None
    bounds = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
    call = Call(
        projected(32, queries),
        projected(8, queries),
        projected(8, queries),
        projected(8, cross_keys),
        projected(8, cross_keys),
        torch.empty((batch, 32, queries) if everything else (1,), dtype=torch.float32, device="meta"),
        key_mask=flags(queries),
        cross_mask=flags(cross_keys),
        key_span=span,
        cross_span=span,
        query_start=torch.empty(batch, dtype=torch.int64, device="meta") if everything else None,
        cu_seqlens=bounds,
        cross_cu_seqlens=bounds,
        causal=True,
        scale=head_dim**-0.5,
        window=length // 2 if everything else None,
        softcap=50.0 if everything else None,
    )
    results = forward(call)
    backward(torch.empty_like(results.out), results, call, [True] * 6)


def _decode(head_dim, dtype, queries):
    """32 query heads over 8 key heads plainly and with spans; with everything 4 over 1, few enough that a second launch merges splits."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(kv_heads, gate_shape, **options):
        heads = 4 * kv_heads
        q, cross = (empty(1, tokens, h, head_dim).transpose(1, 2) for tokens, h in ((queries, heads), (256, kv_heads)))
        cache = empty(1, kv_heads, 1024, head_dim)
        gate = empty(*gate_shape, dtype=torch.float32)
        return Call(q, cache, cache, cross, cross, gate, causal=True, scale=head_dim**-0.5, **options)

    decode(call(8, (1,), query_start=1000), False)
    spans = (empty(1, 2, dtype=torch.int32) for _ in range(2))
    decode(call(8, (1,), query_start=1000, **dict(zip(("key_span", "cross_span"), spans, strict=True))), False)
    key_mask, cross_mask = (empty(1, keys, dtype=torch.bool) for keys in (1024, 256))
    everything = dict(
        key_mask=key_mask, cross_mask=cross_mask, query_start=empty(1, dtype=torch.int64), window=500, softcap=50.0
    )
    decode(call(1, (1, 4, queries), **everything), True)


def _paged(head_dim, dtype, queries):
    """32 query heads over 8 key heads plainly; with everything 4 over 1, few enough that a second launch merges splits."""
    everything = dict(gate_shape=(1, 4, queries), window=500, softcap=50.0)
    for sizes in (dict(batch=64, heads=32, kv_heads=8), dict(batch=1, heads=4, kv_heads=1, **everything)):
        decode_pages(paged_call(head_dim=head_dim, dtype=dtype, queries=queries, keys=1024, cross=256, **sizes), False)


def paged_call(
    *,
    head_dim: int,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    cross: int,
    gate_shape: tuple[int, ...] = (1,),
    **options: Any,
) -> PagedCall:
    """A call over pages of 16 keys as vLLM lays them out, keys and values of a head beside each other."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def pages(count: int) -> dict[str, torch.Tensor]:
        cache = empty(batch * count // 16, kv_heads, 16, 2 * head_dim).transpose(1, 2)
        table = empty(batch, count // 16, dtype=torch.int32)
        names = ("k_cache", "v_cache", "block_table", "seq_lens")
        return dict(zip(names, (*cache.split(head_dim, dim=-1), table, empty(batch, dtype=torch.int32)), strict=True))

    q = empty(batch, queries, heads, head_dim).transpose(1, 2)
    gate = empty(*gate_shape, dtype=torch.float32)
    given: dict[str, Any] = pages(keys) | {f"cross_{name}": x for name, x in pages(cross).items()} | options
    return PagedCall(q=q, gate=gate, scale=head_dim**-0.5, **given)


def call_of_sizes(
    *,
    head_dim: int,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    cross: int,
) -> Call:
    """A plain causal call of these sizes, laid out as a model's projections."""

    def projected(heads, tokens):
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    k, v, cross_k, cross_v = (projected(kv_heads, tokens) for tokens in (keys, keys, cross, cross))
    gate = torch.empty(1, dtype=torch.float32, device="meta")
    return Call(projected(heads, queries), k, v, cross_k, cross_v, gate, scale=head_dim**-0.5)


def run_sizes(*, trained: bool, paged: bool = False, **sizes: Any) -> None:
    """A `call_of_sizes`: forward, and backward where `trained`, or decoding over a cache where the queries are few and it is not; over
    pages where `paged`."""
    if paged:
        decode_pages(paged_call(**sizes), False)
        return
    call = call_of_sizes(**sizes)
    if call.q.shape[2] <= 16 and not trained:
        cache = torch.empty(call.k.shape, dtype=call.k.dtype, device="meta")
        call = call._replace(k=cache, v=cache)
        decode(call, False)
        return
    results = forward(call, Kept(trained, trained, trained))
    if trained:
        backward(torch.empty_like(results.out), results, call, [True] * 6)
