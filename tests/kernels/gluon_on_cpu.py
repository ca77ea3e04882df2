"""Runs the Gluon kernel's own source on a CPU: no interpreter of Triton's does.

The functions of kernels/adaptive_fusion_attention/gluon are executed as Python over stand-ins of Gluon's functions: tensors are
torch tensors, shared memory holds NaN until it is written, and the agents (two groups and the producer) take turns that a random
generator chooses at every barrier, copy and product. A copy lands, and a product reads its operands, at any moment between its start
and the wait for it. What goes wrong is an error: a place that is overwritten while it is read, or read while it is written, a
shared-memory store that the tensor cores read without a fence, a misaligned descriptor, an agent that waits for ever.

What an agent did is kept as its trace, which `gluon_interleavings` searches for every order of the agents' steps.
"""

import ast
import functools
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import layalign.kernels
from layalign.kernels.launch import recording

FOLDER = Path(layalign.kernels.__path__[0]) / "adaptive_fusion_attention" / "gluon"


class Wrong(AssertionError):
    """The kernel's agents did what a GPU does not forgive."""


class Event(NamedTuple):
    """kind: wait, arrive, expect, copy, product, retire; barrier and places are (allocation, index)."""

    kind: str
    barrier: tuple | None = None
    number: int = 0  # a parity, a count, bytes, or products left to run
    places: tuple = ()
    content: tuple = ()


class Number(int):
    """An integer with the methods that the kernel calls; of 64 bits."""

    dtype = torch.int64

    def to(self, dtype):
        return self

    def __add__(self, other):
        return Number(int(self) + int(other)) if isinstance(other, int) else NotImplemented

    def __mul__(self, other):
        return Number(int(self) * int(other)) if isinstance(other, int) else NotImplemented


class Pointer:
    """An address, or a tensor of addresses, in the storage of a tensor."""

    def __init__(self, memory, offset, name):
        self.memory, self.offset, self.name = memory, offset, name
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset, self.name)


def pointers(arguments):
    """The arguments of a launch, tensors as pointers to where they start."""
    if isinstance(arguments, torch.Tensor):
        memory = arguments.new_empty(0).set_(arguments.untyped_storage())
        return Pointer(memory, arguments.storage_offset(), id(arguments))
    if isinstance(arguments, tuple):
        inner = [pointers(x) for x in arguments]
        return type(arguments)(*inner) if hasattr(arguments, "_fields") else tuple(inner)
    return arguments


class View:
    """A part of an allocation of shared memory; `place` is what hazards are looked for by."""

    def __init__(self, machine, values, place):
        self.machine, self.values, self.place = machine, values, place
        self.dtype = values.dtype

    def index(self, index):
        if not 0 <= index < len(self.values):
            raise Wrong(f"place {index} of {len(self.values)}")
        return View(self.machine, self.values[index], (self.place[0], int(index)))

    def slice(self, start, length):
        return View(self.machine, self.values[start : start + length], self.place)

    def permute(self, order):
        return View(self.machine, self.values.permute(order), self.place)

    def load(self, layout):
        self.machine.free_of_copies(self.place, "read")
        return self.values.clone()

    def store(self, values):
        self.machine.free_of_copies(self.place, "written")
        self.machine.free_of_products(self.place, "written")
        self.values.copy_(values)
        self.machine.unfenced.setdefault(self.place, set()).add(self.machine.current)


class Barrier:
    """An mbarrier: its phase ends when `pending` arrivals and `bytes` are both none."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def settle(self):
        if self.pending < 0:
            raise Wrong("more arrivals than a barrier takes")
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def passed(self, parity):
        return self.phase % 2 != parity


class Product:
    """A running product; its result is known when it is done."""

    def __init__(self, agent, left, right, total):
        self.agent, self.left, self.right, self.total = agent, left, right, total
        self.result = None
        self.places = tuple(x.place for x in (left, right) if isinstance(x, View))

    def compute(self):
        if self.result is None:
            left, right = ((x.values if isinstance(x, View) else x).float() for x in (self.left, self.right))
            self.result = left @ right if self.total is None else self.total + left @ right


class Machine:
    """One program: its shared memory, barriers, running copies and products, and agents.

    Unless `strict`, agents run one after the other, nobody waits and nothing is wrong: traces of a kernel that would not come to its end.
    """

    def __init__(self, seed, strict=True):
        self.strict = strict
        self.choose = random.Random(seed)
        self.allocations, self.barriers, self.unfenced = 0, {}, {}
        self.copies, self.products, self.traces = [], {}, {}
        self.current = "start"
        self.turns, self.blocked, self.failure, self.main = {}, {}, None, threading.Semaphore(0)

    def note(self, *event):
        self.traces.setdefault(self.current, []).append(Event(*event))

    def pause(self, condition=lambda: True):
        """Let others run, until this agent's condition holds and it is chosen."""
        if self.current == "start" or not self.strict:
            return
        agent = self.current
        self.blocked[agent] = condition
        self.main.release()
        self.turns[agent].acquire()
        if self.failure is not None:
            raise SystemExit
        self.current = agent

    def free_of_copies(self, place, verb):
        if self.strict and any(place == copy.destination.place for copy in self.copies):
            raise Wrong(f"{place} is {verb} by {self.current} while a copy to it runs")

    def free_of_products(self, place, verb):
        for agent, running in self.products.items():
            if self.strict and any(place in product.places for product in running):
                raise Wrong(f"{place} is {verb} while a product of {agent} reads it")

    def land(self, copy):
        self.copies.remove(copy)
        copy.destination.values.copy_(copy.source.box(copy.row))
        self.signal(copy.barrier, 0, -copy.bytes)

    def signal(self, barrier, arrivals, size):
        if self.strict:
            self.barriers[barrier].pending -= arrivals
            self.barriers[barrier].bytes += size
            self.barriers[barrier].settle()

    def run(self, agents):
        """Run {name: function} in turns."""
        if not self.strict:
            for name, function in agents.items():
                self.current = name
                function()
            return

        def body(name, function):
            self.turns[name].acquire()
            self.current = name
            try:
                if self.failure is None:
                    function()
            except SystemExit:
                pass
            except BaseException as error:
                self.failure = error
            finally:
                del self.blocked[name]
                self.main.release()

        threads = []
        for name, function in agents.items():
            self.turns[name], self.blocked[name] = threading.Semaphore(0), lambda: True
            threads.append(threading.Thread(target=body, args=(name, function), daemon=True))
            threads[-1].start()
        while self.blocked and self.failure is None:
            ready = [name for name, condition in self.blocked.items() if condition()] + list(self.copies)
            if not ready:
                self.failure = Wrong(f"{', '.join(self.blocked)} wait for ever")
                break
            chosen = self.choose.choice(ready)
            if isinstance(chosen, str):
                self.turns[chosen].release()
                self.main.acquire()
            else:
                self.land(chosen)
        for name in list(self.blocked):
            self.turns[name].release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        if self.copies or any(self.products.values()):
            raise Wrong("a copy or a product still runs at the end")


class Descriptor:
    """Rows of a matrix in memory; past `shape` it reads zeros."""

    def __init__(self, base, shape, strides, block_shape):
        size = base.memory.element_size()
        if base.offset * size % 16 or strides[0] * size % 16 or strides[0] <= 0 or strides[1] != 1 or shape[0] < 1:
            raise Wrong(f"no descriptor takes offset {base.offset}, shape {shape}, strides {strides}")
        self.base, self.shape, self.stride, self.block = base, shape, strides[0], block_shape
        self.bytes = block_shape[0] * block_shape[1] * size

    def box(self, row):
        box = torch.zeros(self.block, dtype=self.base.memory.dtype)
        there = max(0, min(self.shape[0] - row, self.block[0]))
        if there:
            start = self.base.offset + row * self.stride
            box[:there] = self.base.memory.as_strided((there, self.shape[1]), (self.stride, 1), int(start))
        return box


@functools.cache
def compiled(mutations):
    """-> code of schedule.py, and of the kernel's files without their imports. mutations: (text, replacement) pairs, each of a
    text that stands once in the files."""
    texts = {
        name: (FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in ("schedule", "work", "rings", "kernel")
    }
    for old, new in mutations:
        holders = [name for name, text in texts.items() if old in text]
        if len(holders) != 1 or texts[holders[0]].count(old) != 1:
            raise ValueError(f"{old!r} stands not once: {holders}")
        texts[holders[0]] = texts[holders[0]].replace(old, new)
    codes = []
    for name, text in texts.items():
        tree = ast.parse(text)
        tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        codes.append(compile(tree, str(FOLDER / f"{name}.py"), "exec"))
    return codes


def namespace(machine, program, mutations):
    """The names of the kernel's files, executed over stand-ins for one program."""
    schedule_code, *codes = compiled(mutations)
    schedule = {}
    exec(schedule_code, schedule)
    names = stand_ins(machine, program) | {"NamedTuple": NamedTuple, "Tensor": torch.Tensor}
    names |= {"schedule": SimpleNamespace(**schedule), "__name__": "gluon_on_cpu"}
    for code in codes:
        exec(code, names)
    return names


def stand_ins(machine, program):
    """What the kernel imports."""

    def tensor(x):
        return x if isinstance(x, torch.Tensor) else torch.tensor(x)

    def load(pointer, mask=None, other=0.0):
        if not isinstance(pointer.offset, torch.Tensor):
            value = pointer.memory[int(pointer.offset)]
            return value if value.is_floating_point() else Number(int(value))
        offset, mask = torch.broadcast_tensors(pointer.offset, tensor(True if mask is None else mask))
        return torch.where(
            mask, pointer.memory[torch.where(mask, offset, 0)], torch.tensor(other, dtype=pointer.memory.dtype)
        )

    def store(pointer, values, mask):
        offset, mask = torch.broadcast_tensors(pointer.offset, mask)
        pointer.memory[offset[mask]] = values.expand(offset.shape)[mask].to(pointer.memory.dtype)

    def allocate(dtype, shape, layout):
        machine.allocations += 1
        values = torch.zeros(shape, dtype=dtype) if dtype == torch.int64 else torch.full(shape, -1).to(dtype)
        values = values.fill_(torch.nan) if dtype.is_floating_point else values
        return View(machine, values, (machine.allocations, 0))

    def specialise(parts, warps, registers):
        names = [f"{number}: {function.__name__}" for number, (function, _) in enumerate(parts)]
        machine.run({name: lambda part=part: part[0](*part[1]) for name, part in zip(names, parts, strict=True)})

    def wait(barrier, parity):
        parity = int(parity)
        machine.note("wait", barrier.place, parity)
        machine.pause(lambda: machine.barriers[barrier.place].passed(parity))

    def arrive(barrier, count):
        machine.pause()
        machine.note("arrive", barrier.place, count)
        machine.signal(barrier.place, count, 0)

    def expect(barrier, size):
        machine.pause()
        machine.note("expect", barrier.place, size)
        machine.signal(barrier.place, 1, size)

    def copy(source, coordinates, barrier, destination):
        machine.pause()
        content = (source.base.name, int(source.base.offset), int(coordinates[0]))
        machine.note("copy", barrier.place, source.bytes, (destination.place,), content)
        machine.free_of_copies(destination.place, "copied to")
        machine.free_of_products(destination.place, "copied to")
        parts = dict(source=source, row=int(coordinates[0]), barrier=barrier.place, destination=destination)
        machine.copies.append(SimpleNamespace(bytes=source.bytes, **parts))
        if not machine.strict:
            machine.land(machine.copies[0])

    def multiply(left, right, total, use_acc=True, is_async=False):
        machine.pause()
        product = Product(machine.current, left, right, total if use_acc else None)
        machine.note("product", None, 0, product.places)
        for place in product.places:
            machine.free_of_copies(place, "read")
            if machine.strict and machine.unfenced.get(place):
                raise Wrong(f"{place} is multiplied before a fence")
        if machine.choose.random() < 0.5:
            product.compute()
        machine.products.setdefault(machine.current, []).append(product)
        return product

    def retire(left_running, deps):
        machine.pause()
        machine.note("retire", None, left_running)
        running = machine.products[machine.current]
        for product in running[: len(running) - left_running]:
            product.compute()
        machine.products[machine.current] = running[len(running) - left_running :]
        if machine.strict and any(x is product for x in deps for product in machine.products[machine.current]):
            raise Wrong("the result of a product that still runs is used")
        for x in deps if not machine.strict else ():
            x.compute()
        results = tuple(x.result if isinstance(x, Product) else x for x in deps)
        return results[0] if len(results) == 1 else results

    def fence():
        for agents in machine.unfenced.values():
            agents.discard(machine.current)

    def layout(*parts):
        return parts

    gl = SimpleNamespace(
        constexpr=lambda value: value,
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        uint32=torch.int64,
        uint64=torch.int64,
        to_tensor=lambda x: Number(x) if isinstance(x, int) else x,
        cast=lambda x, dtype: x,
        arange=lambda begin, end, layout: torch.arange(begin, end, dtype=torch.int32),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        where=lambda condition, a, b: torch.where(tensor(condition), a, b),
        exp2=torch.exp2,
        log2=torch.log2,
        abs=torch.abs,
        maximum=lambda a, b: torch.maximum(tensor(a), tensor(b)),
        minimum=lambda a, b: torch.minimum(tensor(a), tensor(b)),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        convert_layout=lambda x, layout: x,
        inline_asm_elementwise=lambda text, constraints, arguments, **options: arguments[0],
        load=load,
        store=store,
        program_id=lambda axis: program,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=specialise,
        **dict.fromkeys(("SliceLayout", "BlockedLayout", "NVMMADistributedLayout"), layout),
        **dict.fromkeys(("DotOperandLayout", "SwizzledSharedLayout"), layout),
        NVMMASharedLayout=SimpleNamespace(get_default_for=layout),
    )
    mbarrier = SimpleNamespace(MBarrierLayout=layout, wait=wait, arrive=arrive, expect=expect)
    mbarrier.init = lambda barrier, count: machine.barriers.__setitem__(barrier.place, Barrier(count))
    tma = SimpleNamespace(async_load=copy)
    tma.make_tensor_descriptor = lambda base, shape, strides, block_shape, layout: Descriptor(
        base, shape, strides, block_shape
    )
    gluon = SimpleNamespace(
        jit=lambda function=None, **options: function or (lambda f: f), constexpr_function=lambda f: f
    )
    products = dict(warpgroup_mma=multiply, warpgroup_mma_wait=retire, fence_async_shared=fence)
    return dict(gl=gl, gluon=gluon, mbarrier=mbarrier, tma=tma, **products)


def run_on_cpu(function, seed=0, mutations=(), stages=None, strict=True):
    """function() with its launches of the kernel run here, on CPU tensors -> its result, and the Machine of each program.

    stages: places in the rings, else as shipped.
    """
    machines = []

    def run(kernel, grid, arguments, constants, options):
        assert kernel.__name__ == "hopper_forward_kernel"
        compiled_for = constants["C"] if stages is None else constants["C"]._replace(STAGES=stages)
        given = pointers(arguments)
        for program in range(grid[0]):
            machine = Machine(seed + program, strict)
            names = namespace(machine, program, mutations)
            names["hopper_forward_kernel"](*given, compiled_for)
            machines.append(machine)

    with recording("sm_90", run):
        return function(), machines
