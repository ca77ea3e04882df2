"""What a hot loop must not hold, and the loops that are known to hold it: gates of the report with --model, as spills are without.

An allowance says which kernels it is for, what they are allowed and why, so that it goes when the reason does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST_N = (
    64  # columns of a warp group's product on sm_90: with fewer it reads more than shared memory's 128 bytes a cycle
)
MOST_BARRIERS = 5  # of the whole block in a turn: what Triton's two bulk copies a tile bring along
MOST_UNPIPELINED = 0  # loads that the turn which asks for them waits for


@dataclass(frozen=True, slots=True)
class Allowance:
    """kernel, and the fields of a line that must equal (head_dim as ("<=", 64) too); what is allowed instead of the gate; why."""

    kernel: str
    reason: str
    where: Mapping[str, Any] = field(default_factory=dict)
    least_n: int = LEAST_N
    most_barriers: int = MOST_BARRIERS
    most_unpipelined: int = MOST_UNPIPELINED

    def covers(self, line: Mapping[str, Any]) -> bool:
        return self.kernel == line["kernel"] and all(
            _equal(line.get(name), value) for name, value in self.where.items()
        )


def _equal(got, wanted):
    return got in wanted if isinstance(wanted, tuple) else got == wanted


_PLAIN = ("causal", "spanned", "sizes")
_MASKED = ("padded", "everything", "packed")
_FEW = "few queries, or heads of 256: tiles of 32 keys, with wider ones too many registers"
_SHARED_ROWS = "heads of 256: two warp groups share 64 queries, whose maxima and sums meet in shared memory"
_OLDER = "not looked into: goals of speed are those of sm_90"
_BIAS = "the bias of a group is read where a tile is written, in the one loop over the turns of all tiles"
_ANYWHERE = "widths whose rows start anywhere: no descriptors, small tiles, numbers read one by one"
_READ_TWICE = (
    "tiles of states and weights are turned over in shared memory between the products: memory is what it waits for"
)
# As the report has them for bf16 and heads of 64, 128 and 256 (sm_90). The first that covers a line is the one.
ALLOWANCES: tuple[Allowance, ...] = (
    Allowance("forward_kernel", _SHARED_ROWS, {"head_dim": 256, "arch": "sm_90"}, 16, 9, 2),
    Allowance("query_gradients_kernel", _SHARED_ROWS, {"head_dim": 256, "arch": "sm_90"}, 16, 13, 2),
    Allowance("forward_kernel", _OLDER, {"arch": "sm_80", "variant": _PLAIN}, most_barriers=9),
    Allowance("query_gradients_kernel", _OLDER, {"arch": "sm_80", "variant": _PLAIN}, most_barriers=7),
    Allowance(
        "key_value_gradients_kernel",
        "masked keys: 32 queries a tile, with 64 beside the masks too many registers",
        {"variant": _MASKED},
        least_n=32,
    ),
    Allowance(
        "forward_kernel",
        "a mask is read where it is used: its list of tiles says which, a turn before; few queries: 32 keys",
        {"variant": _MASKED},
        least_n=32,
        most_unpipelined=2,
    ),
    Allowance(
        "query_gradients_kernel",
        "as the forward of masked calls",
        {"variant": _MASKED},
        least_n=32,
        most_unpipelined=2,
    ),
    Allowance("forward_kernel", _FEW, {"variant": _PLAIN}, least_n=32),
    Allowance("query_gradients_kernel", _FEW, {"variant": _PLAIN}, least_n=32),
    Allowance(
        "decode_kernel",
        "a group of heads has 16 rows, and chunks merge through shared memory: memory is what it waits for; masks as in the forward",
        least_n=16,
        most_barriers=17,
        most_unpipelined=3,
    ),
    Allowance("matmul_kernel", _ANYWHERE, {"variant": "odd"}, least_n=32, most_unpipelined=2),
    Allowance("summed_matmul_kernel", _ANYWHERE, {"variant": "odd"}, least_n=32, most_unpipelined=2),
    Allowance("matmul_kernel", _BIAS, most_unpipelined=1),
    Allowance(
        "mix_weight_gradients_kernel",
        f"{_READ_TWICE}; the bias is summed by a product with 16 columns, which 8 warps halve",
        least_n=8,
        most_barriers=12,
        most_unpipelined=4,
    ),
    Allowance("mix_kernel", _READ_TWICE, least_n=16, most_barriers=8, most_unpipelined=2),
    Allowance("mix_state_gradients_kernel", _READ_TWICE, least_n=16, most_barriers=12, most_unpipelined=4),
)


def loop_failures(line: Mapping[str, Any]) -> list[str]:
    """What the loops of a line with the model's figures hold that neither the gates nor an allowance permits."""
    if line.get("error") is not None or not line.get("loops"):
        return []
    allowed = next((x for x in ALLOWANCES if x.covers(line)), Allowance(line["kernel"], "none"))
    found = []
    for number, loop in enumerate(line["loops"]):
        narrow = line["arch"] == "sm_90" and loop["product_n"] is not None and loop["product_n"] < allowed.least_n
        if narrow:
            found.append(f"loop {number}: HGMMA of N = {loop['product_n']}, at least {allowed.least_n} wanted")
        if loop["block_barriers"] > allowed.most_barriers:
            found.append(
                f"loop {number}: {loop['block_barriers']} barriers of the block a turn, {allowed.most_barriers} allowed"
            )
        if loop["unpipelined"] > allowed.most_unpipelined:
            found.append(
                f"loop {number}: {loop['unpipelined']} loads that the turn waits for, {allowed.most_unpipelined} allowed"
            )
    return found
