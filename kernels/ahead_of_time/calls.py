"""The calls whose kernels are compiled ahead of time and reported: `SHIPPED_CALLS`, an entry for each operator."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch

from ..adaptive_fusion_attention import shipped_calls as attention_calls
from ..adaptive_fusion_attention.gluon import shipped_calls as hopper_calls
from ..dispatch import malformed
from ..layerwise_aligner import shipped_calls as aligner_calls

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
    """One operator's calls: its module shipped_calls.

    module: run(variant, head_dim, dtype, length) there runs the launchers on meta tensors.
    variants: names of feature combinations.
    by_head_dim: whether the kernels differ by it; otherwise only the first asked for is compiled.
    lengths(variant, **of_launch_table): a length for each launch configuration that the variant can get.
    """

    module: str
    variants: tuple[str, ...]
    by_head_dim: bool
    lengths: Callable[..., tuple[int, ...]]


def _shipped(module):
    return ShippedCalls(module.__name__, module.VARIANTS, module.BY_HEAD_DIM, module.lengths)


SHIPPED_CALLS = {
    "adaptive_fusion_attention": _shipped(attention_calls),
    "adaptive_fusion_attention in Gluon": _shipped(hopper_calls),
    "layerwise_aligner": _shipped(aligner_calls),
}


def described_calls(
    architectures: Iterable[str],
    head_dims: Sequence[int] = (64, 128),
    dtypes: Iterable[str] = ("bfloat16",),
    variants: Iterable[str] = (),
) -> list[dict[str, str | int]]:
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
    calls: list[dict[str, str | int]] = []
    for arch, head_dim, dtype in product(dict.fromkeys(architectures), dict.fromkeys(head_dims), dict.fromkeys(dtypes)):
        for operator, shipped in SHIPPED_CALLS.items():
            if not shipped.by_head_dim and head_dim != head_dims[0]:
                continue
            for variant in (variant for variant in shipped.variants if not variants or variant in variants):
                call: dict[str, str | int] = dict(
                    operator=operator, arch=arch, variant=variant, head_dim=head_dim, dtype=dtype
                )
                lengths = shipped.lengths(variant, architecture=arch, head_dim=head_dim, dtype=getattr(torch, dtype))
                calls += [{**call, "length": length} for length in lengths]
    return calls
