"""What a compiled kernel is predicted to take on a GPU that nobody has asked: its loops, and the time of one launch.

A loop's turn is timed by `timing.py`, what surrounds the loops too; programs then go to multiprocessors in the order in which they
start, each to the first that has room. Bytes that memory cannot deliver faster, and products that the power limit does not allow faster,
are floors under that. Every number from here is a prediction, and called one.
"""

from __future__ import annotations

import heapq
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from .gpus import GPU, resident_blocks
from .prefetch import LoopLoads, loop_loads
from .sass import Instruction, Loop, Program, counts, instructions
from .timing import LoopTime, loop_time, product_bytes, product_shape, straight_time
from .work import Launch, Work, work

# Kinds of kernels with public figures of the same kind on an H100, within 25 % of what the model says there (bench/calibration.py):
# attention forward without masks, and products. Of all others, and on other architectures, nobody knows how far off it is.
CALIBRATED = ("forward_kernel", "matmul_kernel")


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """One hot loop, a short turn of it (a full tile) and a long one (a masked tile), a warp's unless said otherwise.

    instructions, functions (MUFU): of each; block_barriers: CTA-wide BAR; fences: MEMBAR and FENCE; warp_syncs: WARPSYNC and
    WARPGROUP.ARRIVE; waits: for products (DEPBAR of the warp group); copy_waits: for copies; products: of a warp group;
    product_n: the least N among them; shared_rate: bytes of shared memory that they read in one cycle at full speed (a multiprocessor
    has 128), the most; shared_bytes: through LDS, STS, LDSM and STSM, a block's; ahead: turns from asking for a tile to waiting for it;
    unpipelined: loads of tiles that the turn itself waits for.
    """

    address: str
    instructions: int
    long_instructions: int
    functions: int
    block_barriers: int
    fences: int
    warp_syncs: int
    waits: int
    copy_waits: int
    products: int
    product_n: int | None
    shared_rate: float
    shared_bytes: int
    ahead: int
    unpipelined: int


@dataclass(frozen=True, slots=True)
class Hot:
    """A hot loop: where it is and its figures (None where only its time is asked for), a short and a long turn, what it reads."""

    loop: Loop | None
    short: list[Instruction]
    long: list[Instruction]
    loads: LoopLoads
    figures: LoopFigures | None


@dataclass(frozen=True, slots=True)
class Code:
    """A compiled kernel as the model sees it: its hot loops, what surrounds them, and one turn of the loop around them, if any."""

    hot: list[Hot]
    rest: list[Instruction]
    around: list[Instruction]

    @property
    def loops(self) -> list[LoopFigures]:
        return [x.figures for x in self.hot if x.figures is not None]


@lru_cache(maxsize=512)
def read_code(cubin: str) -> Code:
    """The Code of a compiled kernel in Triton's cache, where its GPU dialect lies beside it."""
    path = Path(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", path]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return code_of(sass, path.with_suffix(".ttgir").read_text())


def code_of(sass: str, dialect: str) -> Code:
    """The Code of a kernel from the text of `cuobjdump -sass` and Triton's GPU dialect."""
    program = Program(instructions(sass))
    turns = [(loop, program.turn(loop, False), program.turn(loop, True)) for loop in program.innermost()]
    hot = [x for x in turns if any(instruction.kind.endswith("MMA") for instruction in x[1])]
    loads = loop_loads(dialect)
    if len(loads) != len(hot):  # a loop that the compiler unrolled or merged: nothing is known of its loads
        loads = [LoopLoads(ahead=1)] * len(hot)
    found = [
        Hot(loop, short, long, read, _figures(short, long, read))
        for (loop, short, long), read in zip(hot, loads, strict=True)
    ]
    inner = [loop for loop, _, _ in hot]
    around = program.around(inner)
    outer = around[0] if around else None
    rest = program.rest(inner if outer is None else [*inner, *around])
    return Code(found, rest, [] if outer is None else program.turn(outer, True, inner))


def _figures(short, long, loads):
    kinds = counts(short)
    names = [x.name for x in short]
    products = [x for x in short if x.kind.endswith("MMA")]
    shapes = [shape for x in products if (shape := product_shape(x))]
    rates = [product_bytes(x) / (product_shape(x)[1] / 2) for x in products if product_shape(x)]
    local = sum(_local_bytes(x) for x in short if x.guard != "@!PT")
    return LoopFigures(
        address=hex(short[0].address),
        instructions=len(short),
        long_instructions=len(long),
        functions=kinds["MUFU"],
        block_barriers=sum(x.kind == "BAR" and "," not in x.operands for x in short),
        fences=kinds["MEMBAR"] + kinds["FENCE"],
        warp_syncs=kinds["WARPSYNC"] + names.count("WARPGROUP.ARRIVE"),
        waits=sum(name.startswith("WARPGROUP.DEPBAR") for name in names),
        copy_waits=sum(name.startswith("DEPBAR") for name in names)
        + sum(x.kind == "SYNCS" and "PHASECHK" in x.name for x in short),
        products=len(products),
        product_n=min((shape[1] for shape in shapes), default=None),
        shared_rate=max(rates, default=0.0),
        shared_bytes=local,
        ahead=loads.ahead,
        unpipelined=loads.unpipelined,
    )


def _local_bytes(x):
    if x.kind in ("LDS", "STS"):
        return 32 * next((int(m) // 8 for m in x.modifiers if m in ("64", "128")), 4)
    return 512 if x.kind in ("LDSM", "STSM") else 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """One launch on one GPU. seconds: predicted; floor: what memory and tensor cores cannot do faster; flops, least: operations and
    bytes that no kernel can do without; limit: the pipe that is busy
    most, and for how much of its time, or what else keeps it; blocks: on a multiprocessor at a time; turn_cycles: of each hot
    loop, a short turn; rest_cycles: of a program outside them; calibrated: whether the model is, for kernels of this kind."""

    seconds: float
    floor: float
    limit: str
    blocks: int
    turn_cycles: list[float]
    rest_cycles: float
    tensor_busy: float
    flops: float
    least: float
    calibrated: bool = False


def predict(line: dict[str, Any], gpu: GPU) -> Prediction | None:
    """The Prediction of a line of the report (with its launch); None where nobody described the kernel's work."""
    itemsize = 4 if line["dtype"] == "float32" else 2
    launch = Launch(tuple(line["grid"]), line["numbers"], line["tensors"], line["constants"], itemsize)
    doing = work(line["kernel"], launch)
    if doing is None:
        return None
    code = read_code(line["cubin"])
    found = predicted(code, doing, gpu, line["registers"], line["shared_bytes"], line["config"]["warps"])
    return replace(found, calibrated=gpu.architecture == "sm_90" and itemsize == 2 and line["kernel"] in CALIBRATED)


def predicted(code: Code, doing: Work, gpu: GPU, registers: int, shared_bytes: int, warps: int) -> Prediction:
    """The Prediction of a kernel's Code that does a Work. registers: a thread's; shared_bytes, warps: a block's."""
    if doing.groups:  # and one more of warps that copy, of which one does
        warps *= doing.groups + 1
    blocks = resident_blocks(gpu, registers, shared_bytes, warps)
    room = max(1, blocks)
    # Fewer programs than places: they spread out.
    together = max(1, min(room, -(-len(doing.programs) // gpu.multiprocessors)))
    if doing.streams:  # from memory: a multiprocessor's share of it, and its latency
        share = gpu.bytes_per_second / gpu.clock / gpu.multiprocessors
        gpu_of_loops = replace(gpu, fill_rate=min(gpu.fill_rate, share), cache_latency=gpu.memory_latency)
    else:
        gpu_of_loops = gpu
    hot, each = code.hot, together
    if doing.groups:
        hot, each, warps = code.hot[: len(doing.programs[0])], together * doing.groups, 4
        # What is copied for them is written to shared memory all the time.
        gpu_of_loops = replace(gpu_of_loops, shared_rate=gpu.shared_rate - int(gpu.fill_rate))
    times = [_turn_times(x, gpu_of_loops, warps, each, together * doing.copied) for x in hot]
    rest = straight_time(code.rest, gpu_of_loops, warps=warps, blocks=each)
    around = straight_time(code.around, gpu_of_loops, warps=warps, blocks=each) if code.around else 0.0
    durations = _durations(doing, times, rest, around, code)
    cycles = makespan(durations, gpu.multiprocessors * together)
    floor = max(doing.least / gpu.bytes_per_second, doing.flops / gpu.flops_per_second)
    by_loops = cycles / gpu.clock
    by_memory, by_power = doing.moved / gpu.bytes_per_second, doing.flops / gpu.flops_per_second
    seconds = max(by_loops, by_memory, by_power) + gpu.launch
    busy = doing.flops / (gpu.flops * gpu.multiprocessors * gpu.clock) / seconds
    limit = "memory" if by_memory >= max(by_loops, by_power) else "tensor cores' power"
    if by_loops > max(by_memory, by_power):
        limit = _limit(durations, times, rest, doing)
    return Prediction(
        seconds,
        floor,
        limit,
        blocks,
        [short.cycles for short, _ in times],
        rest + around,
        busy,
        doing.flops,
        doing.least,
    )


def _turn_times(hot: Hot, gpu: GPU, warps: int, blocks: int, copied: int) -> tuple[LoopTime, LoopTime]:
    """Of a short and a long turn; copied: bytes that others copy meanwhile."""

    def time(turn):
        ahead, moved = max(1, hot.loads.ahead), hot.loads.bulk_bytes
        found = loop_time(turn, gpu, warps=warps, blocks=blocks, distance=ahead, bulk_bytes=moved)
        filling = copied / gpu.fill_rate
        return LoopTime(max(found.cycles, filling), found.busy | {"fill": filling}) if copied else found

    short = time(hot.short)
    return short, short if hot.long == hot.short else time(hot.long)


def _durations(doing, times, rest, around, code):
    known: dict[Any, float] = {}
    durations = []
    for place, turns in enumerate(doing.programs):
        tiles = 1 if doing.tiles is None else doing.tiles[place]
        key = (turns, tiles)
        if key not in known:
            if turns and len(turns) != len(times):
                raise ValueError(f"{len(times)} hot loops in the code where the work has {len(turns)}")
            loops = (
                sum(
                    short * quick.cycles + long * slow.cycles
                    for (short, long), (quick, slow) in zip(turns, times, strict=True)
                )
                if turns
                else 0.0
            )
            # What stands around the loops runs once for each of them that turns at all.
            share = sum(any(turn) for turn in turns) / len(turns) if turns else 1.0
            known[key] = loops + rest * max(share, 0.25) + around * tiles
        durations.append(known[key])
    return durations


def _limit(durations, times, rest, doing):
    if not times or not doing.programs:
        return "instructions and latency"
    turns = max(doing.programs, key=lambda x: sum(map(sum, x)))
    inside = sum((short + long) * quick.cycles for (short, long), (quick, _) in zip(turns, times, strict=True))
    if inside < max(durations) / 2:
        return f"what surrounds the loops {1 - inside / max(durations):.0%}"
    longest = max(range(len(times)), key=lambda i: sum(turns[i]) * times[i][0].cycles)
    return times[longest][0].limit


def makespan(durations: Sequence[float], places: int) -> float:
    """When the last of some programs ends that start in this order, each at the first free place."""
    if len(durations) <= places:
        return max(durations, default=0.0)
    ends = list(durations[:places])
    heapq.heapify(ends)
    for duration in durations[places:]:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def figures(line: dict[str, Any], gpu: GPU) -> dict[str, Any]:
    """What `layalign kernels --model` adds to a line; all of it is static or predicted, none measured."""
    if line.get("cubin") is None:
        return {"model": gpu.name, "loops": [], "predicted": None}
    found = predict(line, gpu)
    code = read_code(line["cubin"])
    return {
        "model": gpu.name,
        "loops": [asdict(x) for x in code.loops],
        "predicted": None if found is None else asdict(found),
    }


# Of the report's table. Several hot loops are told apart by a slash, in the order of the code.
MODEL_TITLES = (
    "blocks",
    "instr",
    "mufu",
    "bar",
    "waits",
    "N",
    "B/cycle",
    "ahead",
    "unpiped",
    "predicted cycles/turn",
    "predicted us",
    "floor us",
    "predicted limit",
)


def model_cells(line: dict[str, Any]) -> list[str]:
    """Cells under MODEL_TITLES of a line with `figures`."""
    loops, found = line.get("loops") or [], line.get("predicted")

    def of_each(name, form="{}"):
        return "/".join(form.format("-" if loop[name] is None else loop[name]) for loop in loops) or "-"

    cells = [str(found["blocks"]) if found else "-"]
    cells += [of_each(name) for name in ("instructions", "functions", "block_barriers", "waits", "product_n")]
    cells += [of_each("shared_rate", "{:.0f}"), of_each("ahead"), of_each("unpipelined")]
    if found is None:
        return [*cells, "-", "-", "-", "-"]
    turns = "/".join(f"{cycles:.0f}" for cycles in found["turn_cycles"]) or "-"
    limit = found["limit"] + ("" if found["calibrated"] else ", uncalibrated")
    return [*cells, turns, f"{found['seconds'] * 1e6:.1f}", f"{found['floor'] * 1e6:.1f}", limit]
