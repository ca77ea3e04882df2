"""The calls whose kernels are compiled ahead of time and reported: `SHIPPED_CALLS`, an entry for each operator."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch

from .adaptive_fusion_attention.launch_table import decode_config, launch_config
from .dispatch import malformed

KB = 1024
SHARED_LIMITS = {  # architecture -> bytes of shared memory a block may have, from CUDA's programming guide
    "sm_80": 163 * KB,
    "sm_86": 99 * KB,
    "sm_87": 163 * KB,
    "sm_89": 99 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_103": 227 * KB,
    "sm_120": 99 * KB,
    "sm_121": 99 * KB,
}
DTYPES = ("bfloat16", "float16", "float32")


class ShippedCalls(NamedTuple):
    """One operator's calls.

    entry: "module:function"; function(variant, head_dim, dtype, length) runs the launchers on meta tensors.
    variants: names of feature combinations.
    by_head_dim: whether the kernels differ by it; otherwise only the first asked for is compiled.
    lengths(variant, **of_launch_table): a length for each launch configuration that the variant can get.
    """

    entry: str
    variants: tuple[str, ...]
    lengths: Callable
    by_head_dim: bool = True


def described_calls(architectures, head_dims=(64, 128), dtypes=("bfloat16",), variants=()):
    """The calls to compile: dicts of strings and ints. `variants` selects some; none given means all."""
    known = dict.fromkeys(variant for shipped in SHIPPED_CALLS.values() for variant in shipped.variants)
    given = (("arch", architectures, SHARED_LIMITS), ("dtype", dtypes, DTYPES), ("variant", variants, known))
    for name, values, takes in given:
        for value in values:
            if value not in takes:
                raise malformed(name, value, f"one of {', '.join(takes)}")
    for head_dim in head_dims:
        if not 0 < head_dim <= 256:
            raise malformed("head-dim", head_dim, "1 to 256")
    calls = []
    for arch, head_dim, dtype in product(*map(dict.fromkeys, (architectures, head_dims, dtypes))):
        for operator, shipped in SHIPPED_CALLS.items():
            if not shipped.by_head_dim and head_dim != head_dims[0]:
                continue
            for variant in (variant for variant in shipped.variants if not variants or variant in variants):
                call = dict(operator=operator, arch=arch, variant=variant, head_dim=head_dim, dtype=dtype)
                lengths = shipped.lengths(variant, architecture=arch, head_dim=head_dim, dtype=getattr(torch, dtype))
                calls += [{**call, "length": length} for length in lengths]
    return calls


def attention_lengths(variant, **of_launch_table):
    """The longest power of two of each bucket of lengths; of packed sequences the launch table does not know the length.

    Of decoding, the query tokens: of a group of 4 heads, tiles of 16, 32 and 64 rows.
    """
    if variant == "packed":
        return (4096,)
    if variant == "decode":
        of_launch_table = {name: of_launch_table[name] for name in ("architecture", "dtype", "head_dim")}
        return (1, 8, 16) if decode_config(**of_launch_table, rows=1) else ()
    of_launch_table["plain"] = variant == "causal"
    buckets = {}
    for length in (2**power for power in range(6, 15)):
        kernels = ("forward", "key_value_gradients", "query_gradients")
        buckets[tuple(launch_config(kernel, length=length, **of_launch_table) for kernel in kernels)] = length
    return tuple(buckets.values())


def attention(variant, head_dim, dtype, length):
    """Forward and backward with every gradient, of 32 query heads over 8 key heads laid out as a model's projections.

    causal: what a training step without padding runs.
    padded: the same with both masks, and lengths that are no multiple of a tile, as from here on.
    everything: window, soft cap, both masks, a start per row and a gate per query.
    packed: sequences end to end in one row, with both masks.
    decode: `length` tokens over a cache, plainly and with everything; no backward.
    """
    if variant == "decode":
        _decode(head_dim, dtype, length)
        return
    from .adaptive_fusion_attention.triton_backward import backward
    from .adaptive_fusion_attention.triton_forward import forward

    packed, everything = variant == "packed", variant == "everything"
    batch, queries, cross_keys = (1 if packed else 2), length, 256
    if variant != "causal":
        queries, cross_keys = length - 3, 253

    def projected(heads, tokens):
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    def flags(tokens):
        return None if variant == "causal" else torch.empty(batch, tokens, dtype=torch.bool, device="meta")

    bounds = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
    q, k, v = projected(32, queries), projected(8, queries), projected(8, queries)
    cross_k, cross_v = projected(8, cross_keys), projected(8, cross_keys)
    gate = torch.empty((batch, 32, queries) if everything else (1,), dtype=torch.float32, device="meta")
    tensors = (q, k, v, cross_k, cross_v, gate)
    options = dict(
        key_mask=flags(queries),
        cross_mask=flags(cross_keys),
        query_start=torch.empty(batch, dtype=torch.int64, device="meta") if everything else None,
        cu_seqlens=bounds,
        cross_cu_seqlens=bounds,
        causal=True,
        scale=head_dim**-0.5,
        window=length // 2 if everything else None,
        softcap=50.0 if everything else None,
    )
    results = forward(*tensors, **options)
    backward(torch.empty_like(results[0]), *results[1:], *tensors, **options, wanted=(True,) * 6)


def _decode(head_dim, dtype, queries):
    """32 query heads over 8 key heads plainly; with everything 4 over 1, few enough that a second launch merges splits."""
    from .adaptive_fusion_attention.triton_decode import decode

    def call(kv_heads, gate_shape, *options):
        heads = 4 * kv_heads
        q, cross = (empty(1, tokens, h, head_dim).transpose(1, 2) for tokens, h in ((queries, heads), (256, kv_heads)))
        cache = empty(1, kv_heads, 1024, head_dim)
        decode(q, cache, cache, cross, cross, empty(*gate_shape, dtype=torch.float32), *options)

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    scale = head_dim**-0.5
    call(8, (1,), None, None, 1000, True, scale, None, None, False)
    masks = (empty(1, keys, dtype=torch.bool) for keys in (1024, 256))
    call(1, (1, 4, queries), *masks, empty(1, dtype=torch.int64), True, scale, 500, 50.0, True)


def aligner_lengths(variant, **of_launch_table):
    """Encoder tokens: of a training batch, and of one question, where tiles of fewer rows serve."""
    return (1999,) if variant == "odd" else (2048, 48)


def aligner(variant, head_dim, dtype, length):
    """Forward and backward with every gradient: 24 encoder states, 32 LLM layers of 32 query and 8 key heads.

    folded, unfolded: keys and values of all layers, with biases, by either way through the projection.
    streams: mix and grouped linear layers on their own, the weight shared and one for each stream, unfolded.
    odd: the first two with widths whose rows start anywhere.
    """
    from .layerwise_aligner import key_values as algorithm
    from .layerwise_aligner import triton_backend

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    layers, odd = 32, variant == "odd"
    encoder_width, llm_width, kv_width = 2048 - odd, 32 * head_dim - odd, 8 * head_dim - odd
    states, mix = [empty(1, length, encoder_width) for _ in range(24)], (empty(2 * layers, 24), empty(2 * layers))
    if variant == "streams":
        streams = triton_backend._mix(*mix, states)
        triton_backend._mix_backward(streams, *mix, states, (True, True, True))
        for weight in (empty(kv_width, encoder_width), empty(2 * layers, kv_width, encoder_width)):
            out = triton_backend._linear(streams, weight, empty(*weight.shape[:-1]))
            triton_backend._linear_backward(out, streams, weight, (True, True, True))
        return
    weights, biases = ([empty(*shape) for _ in range(layers)] for shape in ((kv_width, llm_width), (kv_width,)))
    projection = empty(llm_width, encoder_width), empty(llm_width)
    arguments = algorithm.Arguments(states, *mix, *projection, weights, weights, biases, biases)
    for folded in (True, False) if odd else (variant == "folded",):
        plan = algorithm.plan(arguments, folded, None)
        out = algorithm.forward(triton_backend.PRODUCTS, arguments, plan)
        wanted = algorithm.Arguments(*(True,) * 9)
        algorithm.backward(triton_backend.PRODUCTS, out, arguments, plan, wanted)


SHIPPED_CALLS = {
    "adaptive_fusion_attention": ShippedCalls(
        "layalign.kernels.compile_calls:attention",
        ("causal", "padded", "everything", "packed", "decode"),
        attention_lengths,
    ),
    "layerwise_aligner": ShippedCalls(
        "layalign.kernels.compile_calls:aligner", ("folded", "unfolded", "streams", "odd"), aligner_lengths, False
    ),
}
