"""How many cycles a loop takes: a warp scheduler of a multiprocessor, in order, with what the machine code says of its own timing.

One of the four schedulers of a multiprocessor is followed, since all four do the same: a quarter of each block's warps. An instruction
starts when its warp's last one lets it (the stall count), the counters it waits for are zero, its pipe is free, and no other warp starts
one in that cycle. Products run on the tensor core in the order they came, beside everything else; barriers hold a block's warps
together. What overlaps is so found and not assumed.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .gpus import GPU
from .sass import Instruction

_PIPES = {
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I",
    "half": "HFMA2 HADD2 HMUL2 HFMA2_MMA",
    "int_multiply": "IMAD IMUL IDP",
    "mufu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "uniform": "UIADD3 UMOV USHF ULEA ULOP3 USEL UISETP USGXT UIMAD ULDC R2UR VOTEU UPLOP3 UPRMT UP2UR UFLO UBREV UPOPC UIMNMX",
    "lsu": "LDS STS LDSM STSM SHFL LDG STG LD ST LDGSTS LDL STL LDC ATOM ATOMS ATOMG RED MATCH",
    "tensor": "HMMA HGMMA QGMMA IGMMA BGMMA QMMA IMMA DMMA",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
# Products of one warp that wait for the tensor core before its issue does; the one number chosen by calibration (bench/calibration.py).
_QUEUED = 2
_TURNS = 20
_SETTLED, _LAST = 8, 18  # the turns that are counted: neither while the pipeline fills nor while it empties


@dataclass(frozen=True, slots=True)
class LoopTime:
    """cycles: of one turn of all blocks that share a multiprocessor. busy: of those, by pipe, in cycles. A pipe that is busy all the
    time limits the loop; where none is, waiting does."""

    cycles: float
    busy: dict[str, float]

    @property
    def limit(self) -> str:
        """The pipe that is busy longest, and for how much of the time."""
        pipe = max(self.busy, key=lambda name: self.busy[name], default="nothing")
        return f"{pipe} {self.busy.get(pipe, 0) / self.cycles:.0%}" if self.cycles else "nothing"


def product_shape(x: Instruction) -> tuple[int, int, int] | None:
    """M, N and K of a tensor-core instruction of a warp group; None for another."""
    found = _SHAPE.search(x.name) if _PIPE_OF.get(x.kind) == "tensor" else None
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def product_bytes(x: Instruction) -> int:
    """Bytes of shared memory that a warp group's product reads: right side always, left side where it is not in registers."""
    shape = product_shape(x)
    if shape is None:
        return 0
    left = 0 if re.match(r"R\d+, R\d+, ", x.operands) else shape[0]
    return (left + shape[1]) * 32  # K is 32 bytes of any type


def product_cycles(x: Instruction, gpu: GPU, shared_rate: float) -> float:
    """Cycles that the tensor core of a scheduler needs. shared_rate: bytes a cycle that shared memory has left for it."""
    shape = product_shape(x)
    if shape is not None:  # all four work on it; K takes the same time in every type
        return max(shape[1] / 2 * 4096 / gpu.flops, product_bytes(x) / shared_rate)
    size = next((m for m in x.modifiers if m.isdigit()), "16816")
    m, n, k = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4), "884": (8, 8, 4)}.get(size, (16, 8, 16))
    rate = gpu.flops / 4 / (2 if "TF32" in x.modifiers else 1)
    # A warp's products reach 63 % of Hopper's tensor cores (arXiv 2402.13499).
    return 2 * m * n * k / rate / (0.63 if gpu.architecture == "sm_90" else 1)


def access_bytes(x: Instruction) -> int:
    """Bytes of one thread of a load or store."""
    if x.kind in ("LDSM", "STSM"):
        return 4 * int(x.modifiers[-1]) if x.modifiers[-1].isdigit() else 4
    return next((_WIDTH[m] for m in x.modifiers if m in _WIDTH), 4)


def reduced(x: Instruction) -> Instruction:
    """The instruction without anything that its time does not depend on, which is nearly all of its operands."""
    operands = ""
    if product_shape(x) is not None:
        operands = "gdesc, " if product_bytes(x) > product_shape(x)[1] * 32 else "R0, R0, "  # type: ignore[index]
        operands += "gsb0" if "gsb0" in x.operands else ""
    elif x.kind in ("BAR", "DEPBAR") or x.name.startswith("WARPGROUP.DEPBAR"):
        operands = x.operands
    return replace(x, address=0, guard=x.guard if x.guard == "@!PT" else "", operands=operands)


@dataclass(slots=True)
class _Warp:
    block: int
    place: int = 0
    turn: int = 0
    ready: float = 0.0
    counters: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    groups: list[float] = field(default_factory=list)  # when committed products are done
    products: deque[float] = field(default_factory=lambda: deque(maxlen=_QUEUED))  # when the last ones start
    latest_product: float = 0.0
    copies: float = 0.0  # when the last asynchronous copy is there
    waiting: tuple[str, float] | None = None
    bulk_waits: int = 0
    ends: list[float] = field(default_factory=list)


class _Scheduler:
    def __init__(self, gpu, warps, blocks, distance, bulk_bytes):
        self.gpu, self.distance, self.bulk_bytes = gpu, distance, bulk_bytes
        count = max(1, -(-warps // 4))
        self.warps = [_Warp(block) for block in range(blocks) for _ in range(count)]
        self.first = {block: self.warps[block * count] for block in range(blocks)}
        self.free = Counter()
        self.busy = Counter()
        self.arrived: dict[tuple[int, str], list[_Warp]] = {}
        self.bulk: dict[int, list[float]] = {block: [] for block in range(blocks)}
        self.count = count
        self.looping = True

    def run(self, turn, turns):
        """Every warp goes through `turn` as often as `turns`; -> when each ended each of them."""
        self.looping = turns > 1
        for index, warp in enumerate(self.warps):  # blocks do not start together, nor do their warp groups
            warp.ready = 40.0 * index
        per_turn = sum(x.kind == "UTMALDG" for x in turn)
        if self.looping:  # what was asked for before the loop
            for block in self.bulk:
                for _ in range(self.distance * per_turn):
                    self.bulk[block].append(self._bulk(block, 0.0))
        now, last = 0.0, None
        while True:
            best, when = None, 0.0
            for warp in self.warps:
                if warp.turn == turns or warp.waiting is not None:
                    continue
                start = self._start(warp, turn[warp.place], per_turn)
                if start is None:
                    continue
                start = max(start, now)
                if best is None or start < when or (start == when and warp is last):
                    best, when = warp, start
            if best is None:
                if all(warp.turn == turns for warp in self.warps):
                    return [warp.ends for warp in self.warps]
                self._release()  # a barrier that some who left the loop will not reach
                continue
            self._issue(best, turn[best.place], when)
            now, last = when + 1, best
            self.busy["issue"] += 1
            best.place += 1
            if best.place == len(turn):
                best.place, best.bulk_waits = 0, 0
                best.turn += 1
                best.ends.append(when)

    def _start(self, warp, x, per_turn):
        """When the warp may start x; None where that is not yet known."""
        start = max(warp.ready, self.free[_PIPE_OF.get(x.kind, "alu")] if _PIPE_OF.get(x.kind) != "tensor" else 0.0)
        for counter in x.waits:
            start = max(start, *warp.counters[counter], 0.0)
        if x.kind == "WARPGROUP" and "DEPBAR" in x.name:
            left = int(x.operands.rsplit(",")[-1].strip(), 16)
            if len(warp.groups) > left:
                start = max(start, warp.groups[len(warp.groups) - left - 1])
        elif x.kind == "DEPBAR" and "LE" in x.modifiers:
            counter, left = re.match(r"SB(\d), (0x[0-9a-f]+)", x.operands).groups()
            pending = sorted(warp.counters[int(counter)])
            left = int(left, 16)
            if len(pending) > left:
                start = max(start, pending[len(pending) - left - 1])
        elif x.kind == "SYNCS" and "PHASECHK" in x.name and per_turn:
            wanted = warp.turn * per_turn + warp.bulk_waits % per_turn
            if self.looping:
                there = self.bulk[warp.block]
                if wanted >= len(there):
                    return None
                start = max(start, there[wanted])
        elif _PIPE_OF.get(x.kind) == "tensor":
            if x.kind.endswith("GMMA"):
                if len(warp.products) == _QUEUED:
                    start = max(start, warp.products[0])
            else:
                start = max(start, self.free["tensor"])
        return start

    def _issue(self, warp, x, now):
        gpu = self.gpu
        warp.ready = now + max(1, x.stall)
        pipe = _PIPE_OF.get(x.kind, "alu")
        done = now + 6
        if pipe == "tensor":
            begin = max(now + 4, self.free["tensor"])
            # Tiles that arrive are written to shared memory meanwhile.
            arriving = gpu.fill_rate if self.free["fill"] > begin else 0.0
            cycles = product_cycles(x, gpu, gpu.shared_rate - arriving)
            self.free["tensor"] = begin + cycles
            self.busy["tensor"] += cycles
            done = begin + cycles + gpu.tensor_latency
            warp.products.append(begin)
            warp.latest_product = done
            if "gsb0" in x.operands:
                warp.groups.append(done)
        elif pipe == "lsu":
            done = self._memory(warp, x, now)
        elif x.kind in ("BAR", "B2R") and "SYNC" in x.name:
            self._arrive(warp, x, now)
        elif x.kind == "WARPGROUP":
            if "DEPBAR" in x.name:
                left = int(x.operands.rsplit(",")[-1].strip(), 16)
                warp.groups = warp.groups[len(warp.groups) - left :] if left else []
        elif x.kind == "LDGDEPBAR":
            done = warp.copies
        elif x.kind in ("MEMBAR", "FENCE"):
            done = now + gpu.fence_latency
        elif x.kind == "UTMALDG":
            if warp is self.first[warp.block]:
                self.bulk[warp.block].append(self._bulk(warp.block, now))
            done = now + 8
        elif x.kind == "SYNCS":
            done = now + gpu.fence_latency
            if "PHASECHK" in x.name:
                warp.bulk_waits += 1
        elif x.kind not in ("BRA", "NOP", "BSSY", "BSYNC", "WARPSYNC", "EXIT", "ELECT"):
            cycles = 32 / gpu.lanes[pipe]
            self.free[pipe] = now + cycles
            self.busy[pipe] += cycles
            if pipe == "mufu":
                done = now + gpu.function_latency
            elif x.kind == "S2R" or x.kind == "ULDC":
                done = now + gpu.shared_latency
        if x.raises is not None:
            warp.counters[x.raises] = [t for t in warp.counters[x.raises] if t > now] + [done]
        if x.reads is not None:
            # Operands are read when the instruction has gone through its pipe's queue.
            read = max(now + 8, self.free[pipe] if pipe in ("lsu", "mufu") else now)
            warp.counters[x.reads] = [t for t in warp.counters[x.reads] if t > now] + [read]

    def _memory(self, warp, x, now):
        gpu = self.gpu
        if x.guard == "@!PT":  # stands there for its effect on the order of others
            return now + 1
        moved = 32 * access_bytes(x) * 4  # by the warps of all four schedulers
        cycles = max(4.0, moved / gpu.shared_rate)
        if x.kind == "SHFL":
            cycles = 4.0
        elif x.kind == "LDC":
            return now + gpu.shared_latency
        begin = max(now, self.free["lsu"])
        self.free["lsu"] = begin + cycles
        self.busy["lsu"] += cycles
        if x.kind == "LDGSTS":
            done = self._fill(begin, moved if self.looping else 0, 0)
            warp.copies = max(warp.copies, done)
            return done
        if x.kind in ("LDG", "LD", "ATOMG"):
            return self._fill(begin, moved, 0)
        if x.kind in ("STG", "ST", "RED"):
            self._fill(begin, moved, 0)
            return begin + cycles + gpu.shared_latency
        return begin + cycles + gpu.shared_latency - 4

    def _bulk(self, block, now):
        number = len(self.bulk[block])
        moved = self.bulk_bytes[number % len(self.bulk_bytes)] if self.bulk_bytes else 0
        return self._fill(now, moved, self.gpu.bulk_latency)

    def _fill(self, now, moved, extra):
        begin = max(now, self.free["fill"])
        cycles = moved / self.gpu.fill_rate
        self.free["fill"] = begin + cycles
        self.busy["fill"] += cycles
        return begin + cycles + self.gpu.cache_latency + extra

    def _arrive(self, warp, x, now):
        operands = [part.strip() for part in x.operands.split(",")]
        here = self.count
        if len(operands) > 1 and operands[1].startswith("0x"):  # of some of the block's threads
            here = max(1, min(here, int(operands[1], 16) // 128))
        there = self.arrived.setdefault((warp.block, operands[0] + ("" if here == self.count else str(here))), [])
        there.append(warp)
        if len(there) >= here:
            for other in there:
                other.waiting = None
                other.ready = max(other.ready, now + self.gpu.barrier_latency)
            there.clear()
        else:
            warp.waiting = ("barrier", now)

    def _release(self):
        for there in self.arrived.values():
            for warp in there:
                warp.waiting = None
            there.clear()


def loop_time(
    turn: Sequence[Instruction],
    gpu: GPU,
    *,
    warps: int,
    blocks: int = 1,
    distance: int = 1,
    bulk_bytes: Sequence[int] = (),
) -> LoopTime:
    """One turn of a loop, in the middle of many.

    warps: of a block; blocks: that share a multiprocessor; distance: turns between asking for a bulk copy and waiting for it;
    bulk_bytes: of each such copy of a turn.
    """
    if not turn:
        return LoopTime(0.0, {})
    scheduler = _Scheduler(gpu, warps, max(1, blocks), distance, bulk_bytes)
    ends = scheduler.run(list(turn), _TURNS)
    # By all turns together: a scheduler may let one warp run ahead of the others.
    times, warps = sorted(time for end in ends for time in end), len(ends)
    cycles = (times[_LAST * warps - 1] - times[_SETTLED * warps - 1]) / (_LAST - _SETTLED)
    return LoopTime(cycles, {pipe: min(busy / _TURNS, cycles) for pipe, busy in scheduler.busy.items()})


def straight_time(code: Sequence[Instruction], gpu: GPU, *, warps: int, blocks: int = 1) -> float:
    """Cycles of code that runs once in each block, such as what surrounds the loops, `blocks` of them at a time.

    Copies that fill a loop's pipeline cost their latency only: their bytes are among those of the loop's turns.
    """
    if not code:
        return 0.0
    scheduler = _Scheduler(gpu, warps, max(1, blocks), 1, ())
    return max(end[-1] for end in scheduler.run(list(code), 1))
