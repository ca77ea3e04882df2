"""What other launch configurations of one kernel compile to and are predicted to take: a program for whoever designs it.

python -m layalign.kernels.ahead_of_time.candidates forward 128x128x8x3xd 64x64x4x3 --model h200 --head-dim 128 --variant causal
python -m layalign.kernels.ahead_of_time.candidates key_value_gradients 64x128x8x2 --sizes B8 H32/8 S1024 T512

A configuration is rows x columns x warps x stages, with xkNUMBER for a product's inner size, xd for descriptors, and xa behind
it to start a tile ahead.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import Any

from ..launch import LaunchConfig
from .calls import SHIPPED_CALLS
from .gpus import GPUS
from .report import compile_lines, table


def config(text: str) -> LaunchConfig:
    """The LaunchConfig that a word such as 128x128x8x3xd means. ValueError where it means none."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(?:xk(\d+))?(xd)?(xa)?", text)
    if not found:
        raise ValueError(
            f"configuration: got {text}, takes rows x columns x warps x stages, such as 128x64x8x3 or 128x128x8x2xd"
        )
    rows, columns, warps, stages, inner = (int(number or 0) for number in found.groups()[:5])
    return LaunchConfig(
        block_m=rows,
        block_n=columns,
        warps=warps,
        stages=stages,
        block_k=inner,
        descriptors=bool(found[6]),
        ahead=bool(found[7]),
    )


def sizes(words: list[str]) -> dict[str, Any]:
    """Sizes of an attention call from words such as B8 H32/8 S1024 T512 (N: keys, S by default; forward: no gradients; paged: those
    of decoding over pages)."""
    got = {word[0]: word[1:] for word in words if word not in ("forward", "paged")}
    heads, _, kv_heads = got.get("H", "32/32").partition("/")
    queries = int(got.get("S", 1024))
    return dict(
        batch=int(got.get("B", 8)),
        heads=int(heads),
        kv_heads=int(kv_heads or heads),
        queries=queries,
        keys=int(got.get("N", queries)),
        cross=int(got.get("T", 256)),
        trained="forward" not in words,
        **({"paged": True} if "paged" in words else {}),
    )


def candidates(kernel: str, configs: list[LaunchConfig | None], call: dict[str, Any], gpu: str) -> list[dict[str, Any]]:
    """Lines of the report, with the model's figures for `gpu`, of one kernel under each configuration; None: the shipped one.

    call: fields of `calls.described_calls`, and maybe `sizes`, arguments of the operator's `run_sizes`.
    """
    lines = []
    for candidate in configs:
        chosen = {} if candidate is None else {"configs": {kernel: asdict(candidate)}}
        found = compile_lines(call | chosen | {"programs": GPUS[gpu].multiprocessors}, GPUS[gpu])
        lines += [line for line in found if line["kernel"] in (f"{kernel}_kernel", "launcher")]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", help="forward, key_value_gradients, query_gradients, decode, mix, ..., matmul")
    parser.add_argument("configs", nargs="*", help="such as 128x128x8x3xd; the shipped one is there anyway")
    parser.add_argument("--model", default="h100", choices=GPUS)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variant", default="causal")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--sizes", nargs="*", help="of a plain causal call instead of a variant: B8 H32/8 S1024 T512 [forward] [paged]"
    )
    given = parser.parse_args()
    operator = next(name for name, shipped in SHIPPED_CALLS.items() if given.variant in shipped.variants)
    call = dict(operator=operator, arch=GPUS[given.model].architecture, variant=given.variant, head_dim=given.head_dim)
    call |= dict(dtype=given.dtype, length=given.length)
    if given.sizes is not None:
        call["sizes"] = sizes(given.sizes)
    print(table(candidates(given.kernel, [None, *map(config, given.configs)], call, given.model)))


if __name__ == "__main__":
    main()
