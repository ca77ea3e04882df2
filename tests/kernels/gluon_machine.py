"""What the Gluon kernel runs on in `gluon_on_cpu`: memory, shared memory, barriers, descriptors, and agents that take turns.

Everything that a GPU does not forgive, and need not show, is an error here.
"""

import math
import random
import threading
from types import SimpleNamespace
from typing import NamedTuple

import torch


class Wrong(AssertionError):
    """The kernel's agents did what a GPU does not forgive."""


class Event(NamedTuple):
    """kind: wait, arrive, expect, copy, product, retire, store, load; barrier and places are (allocation, index)."""

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

    def reshape(self, shape):
        return View(self.machine, self.values.view(shape), self.place)

    def load(self, layout):
        self.machine.pause()
        self.machine.note("load", None, 0, (self.place,))
        self.machine.free_of_copies(self.place, "read")
        return self.values.clone()

    def store(self, values):
        self.machine.pause()
        self.machine.note("store", None, 0, (self.place,))
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
    """One program of a kernel: its shared memory, barriers, running copies and products, and agents.

    Unless `strict`, agents run one after the other, nobody waits and nothing is wrong: traces of a kernel that would not come to its end.
    """

    def __init__(self, kernel, seed, strict=True):
        self.kernel, self.strict = kernel, strict
        self.choose = random.Random(seed)
        self.allocations, self.barriers, self.unfenced = 0, {}, {}
        self.copies, self.products, self.traces = [], {}, {}
        self.current = "start"
        self.turns, self.blocked, self.failure, self.main = {}, {}, None, threading.Semaphore(0)

    def note(self, *event):
        if self.current == "start":  # alone
            return
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
        copy.destination.values.copy_(copy.source.box(copy.corner))
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
    """Rows in memory, of two dimensions or more; past `shape` it reads zeros."""

    def __init__(self, base, shape, strides, block_shape):
        size = base.memory.element_size()
        apart = strides[:-1]
        if base.offset * size % 16 or any(x * size % 16 or x < 0 for x in apart) or apart[-1] == 0 or strides[-1] != 1:
            raise Wrong(f"no descriptor takes offset {base.offset}, strides {strides}")
        if min(shape) < 1:
            raise Wrong(f"no descriptor takes shape {shape}")
        self.base, self.shape, self.strides, self.block = base, shape, strides, block_shape
        self.bytes = math.prod(block_shape) * size

    def box(self, corner):
        box = torch.zeros(self.block, dtype=self.base.memory.dtype)
        places = list(zip(self.shape, self.block, corner, strict=True))
        there = [max(0, min(length - at, size)) for length, size, at in places]
        if all(there):
            start = self.base.offset + sum(at * stride for at, stride in zip(corner, self.strides, strict=True))
            inside = tuple(slice(0, count) for count in there)
            box[inside] = self.base.memory.as_strided(there, [int(x) for x in self.strides], int(start))
        return box
