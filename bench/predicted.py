"""The goals of speed, predicted without a GPU: `python -m bench predicted` writes bench/results/predicted.md and .json.

Each case is compiled ahead of time at its own sizes and timed by the static model (`layalign kernels --model`). What it is compared with
is not modelled: public figures of other kernels at these or the nearest sizes, and a measured copy bandwidth. Nothing here was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton

from layalign.kernels.ahead_of_time.calls import SHIPPED_CALLS
from layalign.kernels.ahead_of_time.gpus import GPUS, H200
from layalign.kernels.ahead_of_time.report import compile_lines

RESULTS = Path(__file__).parent / "results"
_GLUON = "adaptive_fusion_attention in Gluon"

# Public figures, in operations a second. H100, D = 128, 16,384 tokens, 16 heads: charts of the FlashAttention-3 paper (+-1 %), the
# better of cuDNN and FlashAttention-3. Backward, deterministic, at 2,048 on an H200: NVIDIA cudnn-frontend, cuDNN 9.27 and
# FlashAttention-4; taken to 1,024 by what the same kernels lose there without determinism (full), and forward (causal).
_FORWARD = {(512, "causal"): 315e12, (1024, "causal"): 423e12, (512, "full"): 497e12, (1024, "full"): 574e12}
_BACKWARD = {(1024, "causal"): 367e12 * 410 / 484, (1024, "full"): 493e12 * 424 / 501}
_BACKWARD_KERNELS = ("row_sums_kernel", "key_value_gradients_kernel", "query_gradients_kernel")
_DECODE_CALL = 9e-6  # of cuDNN 9.27 beside its bytes, from three figures on an H200: 24.8 us for 67 MB, 72.8 for 268, 256 for 1,070


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One case of a goal.

    number: of the goal; call: operator, sizes and kernels that count (all where empty); also: an operator and kernels of it that come on
    top; yardstick: what their time is over, seconds, given the model's lines; wanted: at most this ratio, or at least this share where
    `share`; by_library: backend="auto" leaves it to cuBLAS.
    """

    number: int
    title: str
    operator: str
    sizes: dict[str, Any]
    kernels: tuple[str, ...]
    yardstick: Callable[[list[dict[str, Any]]], float]
    wanted: float
    share: bool = False
    also: tuple[str, tuple[str, ...]] | None = None
    by_library: bool = False


def _attention(batch, kv_heads, length, cross, *, trained, queries=None):
    sizes = {"batch": batch, "heads": 32, "kv_heads": kv_heads, "queries": queries or length, "keys": length}
    return sizes | {"cross": cross, "trained": trained}


def _two_calls(sizes: dict[str, Any], backward: bool, lines: list[dict[str, Any]]) -> float:
    """Self- and cross-attention by the best public kernel each, and a combine of three passes over the output."""
    length, cross = sizes["queries"], sizes["cross"]
    width = 4 * sizes["batch"] * sizes["heads"] * 128
    own, other = width * length * (length + 1) / 2, width * length * cross
    seconds = own / _FORWARD[length, "causal"] + other / _FORWARD[length, "full"]
    combine = 3 * sizes["batch"] * sizes["heads"] * length * 128 * 2 / H200.bytes_per_second
    seconds += combine
    if backward:
        seconds += 2.5 * own / _BACKWARD[length, "causal"] + 2.5 * other / _BACKWARD[length, "full"] + combine
    return seconds


def _two_decode_calls(sizes: dict[str, Any], lines: list[dict[str, Any]]) -> float:
    moved = 2 * sizes["batch"] * sizes["kv_heads"] * (sizes["keys"] + sizes["cross"]) * 128 * 2
    return 2 * _DECODE_CALL + moved / H200.bytes_per_second + H200.launch


def _by_memory(lines: list[dict[str, Any]]) -> float:
    return sum(line["least"] for line in lines) / H200.bytes_per_second


def _by_products(lines: list[dict[str, Any]]) -> float:
    return sum(line["flops"] for line in lines) / H200.flops_per_second


def goals() -> list[Goal]:
    """Goals 3 to 7 on an H200, bf16, D = 128."""
    attention, aligner = "adaptive_fusion_attention", "layerwise_aligner"
    found = []
    for title, number, kv_heads, length, cross, trained, wanted in (
        ("(a) forward, MHA", 3, 32, 512, 256, False, 0.70),
        ("(a) forward, GQA 8", 3, 8, 512, 256, False, 0.70),
        ("(b) forward, MHA", 3, 32, 1024, 512, False, 0.90),
        ("(b) forward + backward, MHA", 4, 32, 1024, 512, True, 0.90),
    ):
        sizes = _attention(8, kv_heads, length, cross, trained=trained)
        common: dict[str, Any] = dict(number=number, sizes=sizes, kernels=(), wanted=wanted)
        common["yardstick"] = partial(_two_calls, sizes, trained)
        found.append(Goal(title=title, operator=attention, **common))
        if _GLUON in SHIPPED_CALLS and trained:
            forward = common | {"kernels": ("hopper_forward_kernel",)}
            also = (attention, _BACKWARD_KERNELS)
            found.append(Goal(title=f"{title}, warp-specialised forward", operator=_GLUON, also=also, **forward))
        if _GLUON in SHIPPED_CALLS:
            sums = (attention, _BACKWARD_KERNELS[:1]) if trained else None
            found.append(Goal(title=f"{title}, warp-specialised", operator=_GLUON, also=sums, **common))
    for name, kv_heads in (("GQA 8", 8), ("MHA", 32)):
        sizes = _attention(32, kv_heads, 1024, 256, trained=False, queries=1)
        common = dict(number=5, operator=attention, sizes=sizes, kernels=())
        found.append(
            Goal(title=f"(c) decode, {name}: of the bandwidth", yardstick=_by_memory, wanted=0.80, share=True, **common)
        )
        found.append(
            Goal(
                title=f"(c) decode, {name}: of two calls",
                yardstick=partial(_two_decode_calls, sizes),
                wanted=0.80,
                **common,
            )
        )
    mixed = dict(tokens=2048, states=24, width=2048, streams=64, columns=0, product=None)
    for title, kernels, wanted in (
        ("mix forward", ("mix_kernel",), 0.85),
        ("mix backward, weights", ("mix_weight_gradients_kernel",), 0.75),
        ("mix backward, states too", ("mix_weight_gradients_kernel", "mix_state_gradients_kernel"), 0.75),
    ):
        found.append(
            Goal(
                number=6,
                title=title,
                operator=aligner,
                sizes=mixed if title != "mix backward, weights" else mixed | {"of_states": False},
                kernels=kernels,
                yardstick=_by_memory,
                wanted=wanted,
                share=True,
            )
        )
    for title, product, width, columns in (
        ("product, one weight 4096 x 2048", "shared", 2048, 4096),
        ("product, listed, MHA 4096 x 4096", "listed", 4096, 4096),
        ("product, listed, GQA 8 1024 x 4096", "listed", 4096, 1024),
        ("product, folded, MHA 4096 x 2048", "strided", 2048, 4096),
        ("product, folded, GQA 8 1024 x 2048", "strided", 2048, 1024),
    ):
        found.append(
            Goal(
                number=7,
                title=title,
                operator=aligner,
                sizes=mixed | dict(width=width, columns=columns, product=product),
                kernels=("matmul_kernel",),
                yardstick=_by_products,
                wanted=0.95,
                share=True,
                by_library=product != "listed",
            )
        )
    return found


def predict(goal: Goal, model: str = "h200") -> dict[str, Any]:
    """One row: seconds, the yardstick's, the ratio or share, the limit of the longest kernel."""
    gpu = GPUS[model]
    lines = []
    for operator, kernels in [(goal.operator, goal.kernels), *([goal.also] if goal.also else [])]:
        call = dict(operator=operator, arch=gpu.architecture, variant="sizes", head_dim=128, dtype="bfloat16", length=0)
        compiled = compile_lines(call | {"sizes": goal.sizes, "programs": gpu.multiprocessors}, gpu)
        lines += [line for line in compiled if not kernels or line["kernel"] in kernels]
    if any(line["error"] is not None for line in lines):
        raise RuntimeError(f"{goal.title}: {next(line['error'] for line in lines if line['error'] is not None)}")
    launches = [line["predicted"] | {"kernel": line["kernel"]} for line in lines if line["predicted"] is not None]
    seconds = sum(kernel["seconds"] for kernel in launches)
    yardstick = goal.yardstick(launches)
    longest = max(launches, key=lambda kernel: kernel["seconds"])
    return {
        "seconds": seconds,
        "yardstick": yardstick,
        "value": yardstick / seconds if goal.share else seconds / yardstick,
        "limit": f"{longest['kernel'].removesuffix('_kernel')}: {longest['limit']}",
        "kernels": {kernel["kernel"]: kernel["seconds"] for kernel in launches},
        "calibrated": all(kernel["calibrated"] for kernel in launches),
    }


def _against(row: dict[str, Any], yardstick: float, goal: Goal) -> float:
    """The ratio or share of a row against a yardstick that need not be its own: kernels that read twice need not count that twice."""
    return yardstick / row["seconds"] if goal.share else row["seconds"] / yardstick


def table(before: dict[str, Any], after: dict[str, Any], listed: Sequence[Goal]) -> str:
    """Markdown: each goal, before and after, both against the latter's yardstick."""
    head = [
        "goal",
        "case",
        "predicted before, us",
        "predicted after, us",
        "yardstick, us",
        "before",
        "after",
        "goal",
        "after",
        "limit after (predicted)",
        "calibrated",
    ]
    rows = [head, ["---"] * 2 + ["---:"] * 6 + ["---"] * 3]
    for goal in listed:
        old, new = before.get(goal.title), after[goal.title]
        met = new["value"] >= goal.wanted if goal.share else new["value"] <= goal.wanted
        verdict = "predicted met" if met else "predicted missed"
        if goal.by_library:
            verdict = f"cuBLAS with auto; ours {verdict}"
        form = (lambda x: f"{x:.0%}") if goal.share else (lambda x: f"{x:.2f}x")
        rows.append(
            [
                str(goal.number),
                goal.title,
                "-" if old is None else f"{old['seconds'] * 1e6:.0f}",
                f"{new['seconds'] * 1e6:.0f}",
                f"{new['yardstick'] * 1e6:.0f}",
                "-" if old is None else form(_against(old, new["yardstick"], goal)),
                form(new["value"]),
                ("at least " if goal.share else "at most ") + form(goal.wanted),
                verdict,
                new["limit"],
                "yes" if new["calibrated"] else "uncalibrated",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(folder: Path = RESULTS, before: bool = False) -> Path:
    """Predict all goals and write predicted.json and predicted.md; before: as what later runs are compared with."""
    kept = folder / "predicted.json"
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    listed = goals()
    now = {"triton": triton.__version__, "rows": {goal.title: predict(goal) for goal in listed}}
    stored["before" if before or "before" not in stored else "after"] = now
    stored.setdefault("after", now)
    kept.write_text(json.dumps(stored, indent=1) + "\n")
    text = table(stored["before"]["rows"], stored["after"]["rows"], listed)
    path = folder / "predicted.md"
    path.write_text(_HEAD.format(triton=stored["after"]["triton"]) + text + "\n" + _FOOT)
    return path


_HEAD = """# Predicted, not measured

No GPU has run these kernels. The times below are predictions of the static model (`layalign kernels --model h200`, Triton {triton}) for an
H200, bf16, D = 128. "Before" is commit db4833c, "after" the present kernels. "Uncalibrated" are kernels of a kind of which no figure
is public, so that nobody knows how far off the model is there; with calibration it is within 25 % of 14 figures of an H100.

"""
_FOOT = """
Yardsticks, none of them modelled:

- Two calls: the better of cuDNN and FlashAttention-3 at the same length in the charts of the FlashAttention-3 paper (H100, 16,384
  tokens), a combine of three passes over the output at 4.3 TB/s; deterministic backward from cuDNN 9.27 and FlashAttention-4 at
  2,048 on an H200
  (NVIDIA cudnn-frontend), scaled to 1,024 by what the same kernels lose there without determinism.
- Two decode calls: 9 us and the bytes at 4.3 TB/s each, a line through three figures of cuDNN 9.27 on an H200.
- Warp-specialised: the Gluon kernels, off by default (`LAYALIGN_GLUON=1`); their producers' copies are taken to be in time. "Forward"
  alone: with the other backward.
- Bandwidth: 4.3 TB/s, a device-to-device copy measured on an H200. Products: 790 TFLOP/s, an 8,192-wide product of cuBLAS measured there.

How the model works, what it is calibrated with and how far it is off: docs/kernels.md, "Predicted times".
"""
