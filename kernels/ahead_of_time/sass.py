"""Machine code as text, read into instructions, blocks and loops: what `cuobjdump -sass` prints of one kernel.

Since Volta every instruction carries what the compiler decided about its timing: how long its warp waits afterwards, which of six
counters it raises until its result is there or its operands are read, and which counters must be zero before it starts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_LINE = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>.+?)\s*;\s+/\* 0x(?P<low>[0-9a-f]{16}) \*/\s*\n"
    r"\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_TEXT = re.compile(r"^(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*)$")
_TARGET = re.compile(r"(0x[0-9a-f]+)$")
_CONTROL = 41  # the first of the control bits in the upper word
_NONE = 7  # no counter
_DETOUR = 1_000_000  # instructions: more than any kernel has


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a warp.

    address: in bytes; guard: its predicate, such as "@!P0", or ""; name: with modifiers, such as "LDS.128"; stall: cycles until its
    warp may go on; raises, reads: counters (0 to 5, or None) that it holds until its result is there, its operands are read; waits:
    counters that must be zero before.
    """

    address: int
    guard: str
    name: str
    operands: str
    stall: int
    raises: int | None
    reads: int | None
    waits: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.name.split(".")[1:])

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        found = _TARGET.search(self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass(slots=True, eq=False)
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop: its header's number, the numbers of all its blocks, and of those that jump back; nested: loops within it."""

    header: int
    blocks: frozenset[int]
    latches: tuple[int, ...]

    def holds(self, other: Loop) -> bool:
        return other.header != self.header and other.header in self.blocks


def instructions(sass: str) -> list[Instruction]:
    """All of one kernel's, from the text of `cuobjdump -sass`."""
    found = []
    for line in _LINE.finditer(sass):
        guard, name, operands = _TEXT.match(line["text"].strip()).groups()  # type: ignore[union-attr]
        control = int(line["high"], 16) >> _CONTROL
        raises, reads = control >> 5 & 7, control >> 8 & 7
        found.append(
            Instruction(
                address=int(line["address"], 16),
                guard=(guard or "").strip(),
                name=name,
                operands=operands,
                stall=control & 15,
                raises=None if raises == _NONE else raises,
                reads=None if reads == _NONE else reads,
                waits=tuple(counter for counter in range(6) if control >> 11 + counter & 1),
            )
        )
    return found


class Program:
    """The control flow of one kernel: blocks in the order of addresses, the first one's the entry, and loops in the order of their
    headers."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.blocks = _blocks(code)
        self.loops = _loops(self.blocks)

    @cached_property
    def spins(self) -> frozenset[int]:
        """Blocks that wait for a barrier in memory by asking again and again: they run once where the barrier is reached."""
        found: set[int] = set()
        for loop in self.loops:
            body = [x for number in loop.blocks for x in self.blocks[number].instructions]
            if len(body) <= 8 and any(x.kind == "SYNCS" for x in body):
                found |= loop.blocks
        return frozenset(found)

    def innermost(self) -> list[Loop]:
        """Loops that hold no other, but for those that wait for a barrier."""
        real = [loop for loop in self.loops if not loop.blocks <= self.spins]
        return [loop for loop in real if not any(loop.holds(other) for other in real)]

    def turn(self, loop: Loop, longest: bool, without: Iterable[Loop] = ()) -> list[Instruction]:
        """One turn of a loop, without any of the loops in it: along the shortest way from its header back, or the longest, which
        takes every branch that a masked tile takes."""
        skipped = frozenset(number for other in without for number in other.blocks)
        numbers = self._way(loop.header, set(loop.blocks), set(loop.latches), longest, skipped)
        return [x for number in numbers if number not in skipped for x in self.blocks[number].instructions]

    def around(self, loops: Sequence[Loop]) -> list[Loop]:
        """The loops that hold one of these, the innermost first."""
        return sorted(
            (outer for outer in self.loops if any(outer.holds(loop) for loop in loops)), key=lambda x: len(x.blocks)
        )

    def rest(self, without: Iterable[Loop]) -> list[Instruction]:
        """The longest way from the entry to the end, without any turn of these loops."""
        skipped = frozenset(number for loop in without for number in loop.blocks)
        ends = {number for number, block in enumerate(self.blocks) if not block.followers}
        numbers = self._way(0, set(range(len(self.blocks))), ends, True, skipped)
        return [x for number in numbers if number not in skipped for x in self.blocks[number].instructions]

    def _way(self, start, inside, ends, longest, skipped):
        better: Callable = max if longest else min
        back = {(latch, loop.header) for loop in self.loops for latch in loop.latches}
        known: dict[int, tuple[int, list[int]] | None] = {}

        def best(number):
            # Depth first, without recursion: a kernel has hundreds of blocks.
            stack, open_ones = [number], set()
            while stack:
                at = stack[-1]
                if at in known:
                    stack.pop()
                    continue
                ahead = [n for n in self.blocks[at].followers if n in inside and (at, n) not in back and n != start]
                open_ones.add(at)  # a way back to one of these is a loop that has two entries
                ahead = [n for n in ahead if n not in open_ones or n in known]
                missing = [n for n in ahead if n not in known]
                if missing and at not in ends:
                    stack += missing
                    continue
                size = 0 if at in skipped else len(self.blocks[at].instructions)
                if at in self.spins and at not in skipped:  # the model of time waits before: go around where one can
                    size = -_DETOUR if longest else _DETOUR
                ways = [] if at in ends else [known[n] for n in ahead if known[n] is not None]
                if at in ends:
                    known[at] = (size, [at])
                elif ways:
                    length, way = better(ways, key=lambda x: x[0])
                    known[at] = (size + length, [at, *way])
                else:
                    known[at] = None
                stack.pop()
            return known[number]

        found = best(start)
        return [] if found is None else found[1]


def counts(turn: Iterable[Instruction]) -> Counter[str]:
    """How often each kind of instruction is there."""
    return Counter(x.kind for x in turn)


def _blocks(code):
    starts = {code[0].address} if code else set()
    for index, x in enumerate(code):
        if x.target is not None:
            starts.add(x.target)
        if x.kind in ("BRA", "EXIT", "RET", "BRX", "JMX") and index + 1 < len(code):
            starts.add(code[index + 1].address)
    blocks: list[Block] = []
    number = {}
    for x in code:
        if x.address in starts:
            number[x.address] = len(blocks)
            blocks.append(Block([]))
        blocks[-1].instructions.append(x)
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.target in number:
            block.followers.append(number[last.target])
        ends = last.kind in ("EXIT", "RET") or last.kind == "BRA"
        if (not ends or last.guard) and index + 1 < len(blocks):
            block.followers.append(index + 1)
    return blocks


def _loops(blocks):
    """Natural loops: an edge to a block that every way to its start comes through."""
    above: list[set[int]] = [set(range(len(blocks))) for _ in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for follower in block.followers:
            before[follower].append(number)
    if blocks:
        above[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            ways = [above[n] for n in before[number]]
            new = {number} | (set.intersection(*ways) if ways else set())
            if new != above[number]:
                above[number], changed = new, True
    latches: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        for follower in block.followers:
            if follower in above[number] and blocks[number].instructions != blocks[follower].instructions[-1:]:
                latches.setdefault(follower, []).append(number)
    loops = []
    for header, ends in sorted(latches.items()):
        members, waiting = {header}, list(ends)
        while waiting:
            number = waiting.pop()
            if number not in members:
                members.add(number)
                waiting += before[number]
        loops.append(Loop(header, frozenset(members), tuple(ends)))
    return loops
