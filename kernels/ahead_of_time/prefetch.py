"""How far ahead a kernel reads, from Triton's GPU dialect: what ptxas makes of it no longer shows which copy a wait belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_FOR = re.compile(r"\bscf\.(for|while)\b")
_COPY = re.compile(r"\bttn?g\.async_(tma_copy|copy)_global_to_local\b")
_LOAD = re.compile(r"\btt\.(load|descriptor_load)\b.*?(?:->|:)\s*(.*)$")
_WAIT = re.compile(r"\bttg\.async_wait\b.*?num = (\d+)")
_TILE = re.compile(r"(?:memdesc|tensor)<(?:\d+x)*?(\d+)x(\d+)x(bf16|f16|f32|i8|i1)")
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1, "i1": 1}


@dataclass(slots=True)
class LoopLoads:
    """What one innermost loop of the dialect reads.

    copies: asynchronous ones a turn; ahead: turns between asking for one and the turn that waits for it; pending: the least number
    of copies that an `async_wait` leaves under way, None where it waits for barriers; unpipelined: loads whose result the turn that
    asks for it needs; bulk_bytes: of each copy by a tensor descriptor, in order; products: tensor-core products a turn.
    """

    copies: int = 0
    ahead: int = 0
    pending: int | None = None
    unpipelined: int = 0
    bulk_bytes: list[int] = field(default_factory=list)
    products: int = 0
    _inner: bool = field(default=True, repr=False)


def loop_loads(dialect: str) -> list[LoopLoads]:
    """Of every innermost loop with a product, in order."""
    loops: list[LoopLoads] = []
    stack: list[tuple[int, LoopLoads | None]] = []  # (depth of braces, loop or None for the function)
    found: list[LoopLoads] = []
    before = 0  # copies since the last loop began or ended: those that fill the pipeline
    depth = 0
    for line in dialect.splitlines():
        text = line.split(" loc(")[0]
        if _FOR.search(text):
            for _, outer in stack:
                if outer is not None:
                    outer._inner = False
            loop = LoopLoads()
            loop.ahead = before
            stack.append((depth, loop))
            found.append(loop)
            before = 0
        depth += text.count("{") - text.count("}")
        while stack and depth <= stack[-1][0] and "{" not in text.split("}")[-1]:
            stack.pop()
            before = 0
        loop_now = stack[-1][1] if stack else None
        if _COPY.search(text):
            if loop_now is None:
                before += 1
            else:
                loop_now.copies += 1
                before += 1
                if "tma_copy" in text:
                    loop_now.bulk_bytes.append(_size(text))
        if loop_now is None:
            continue
        if "warp_group_dot " in text or re.search(r"\btt\.dot\b", text) or "tc_gen5_mma " in text:
            loop_now.products += 1
        waited = _WAIT.search(text)
        if waited:
            number = int(waited[1])
            loop_now.pending = number if loop_now.pending is None else min(loop_now.pending, number)
        load = _LOAD.search(text)
        if load and "tensor<" in text:
            loop_now.unpipelined += 1
    for loop in found:
        if loop._inner and loop.products:
            loop.ahead = loop.ahead // loop.copies if loop.copies else 0
            loops.append(loop)
    return loops


def _size(text: str) -> int:
    tiles: Iterable[tuple[str, str, str]] = _TILE.findall(text)
    return max((int(rows) * int(columns) * _BYTES[kind] for rows, columns, kind in tiles), default=0)
