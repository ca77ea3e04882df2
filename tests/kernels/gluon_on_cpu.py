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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import layalign.kernels
from layalign.kernels.adaptive_fusion_attention.gpu.rows import Rows
from layalign.kernels.launch import recording
from tests.kernels.gluon_machine import Barrier, Descriptor, Machine, Number, Product, View, Wrong, pointers

FOLDER = Path(layalign.kernels.__path__[0]) / "adaptive_fusion_attention" / "gluon"
# Kernel -> the files that it is in.
_SHARED = ("schedule", "work", "rings", "kernel")
FILES = {
    "hopper_forward_kernel": _SHARED,
    "hopper_key_value_gradients_kernel": (*_SHARED, "query_rings", "key_tiles", "key_value_gradients"),
    "hopper_query_gradients_kernel": (*_SHARED, "query_gradients"),
}


@functools.cache
def compiled(files, mutations):
    """-> code of schedule.py, and of the kernel's files without their imports. mutations: (text, replacement) pairs, each of a
    text that stands once in the files."""
    texts = {name: (FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in files}
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


def namespace(kernel, machine, program, mutations):
    """The names of a kernel's files, executed over stand-ins for one program."""
    schedule_code, *codes = compiled(FILES[kernel], mutations)
    schedule = {}
    exec(schedule_code, schedule)
    names = stand_ins(machine, program) | {"NamedTuple": NamedTuple, "Tensor": torch.Tensor, "Rows": Rows}
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
        corner = [int(x) for x in coordinates]
        content = (source.base.name, int(source.base.offset), *corner)
        machine.note("copy", barrier.place, source.bytes, (destination.place,), content)
        machine.free_of_copies(destination.place, "copied to")
        machine.free_of_products(destination.place, "copied to")
        parts = dict(source=source, corner=corner, barrier=barrier.place, destination=destination)
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
        thread_barrier=lambda: None,  # a group is one agent
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


def row_sums(grad_out, self_out, cross_out, self_sums, cross_sums, queries):
    """What the kernel of that name computes."""
    for term, sums in ((self_out, self_sums), (cross_out, cross_sums)):
        if sums is not None:
            sums.copy_((grad_out.pointer.float() * term.pointer.float()).sum(-1))


def sum_heads(sums, total, queries):
    """What the kernel of that name computes."""
    total.copy_(sums.sum(1, keepdim=True))


def run_on_cpu(function, seed=0, mutations=(), stages=None, strict=True):
    """function() with its launches of Gluon kernels run here, on CPU tensors -> its result, and the Machine of each program.

    stages: places in the rings, else as shipped.
    """
    machines, others = [], {"row_sums_kernel": row_sums, "sum_heads_kernel": sum_heads}

    def run(kernel, grid, arguments, constants, options):
        if kernel.__name__ not in FILES:
            others[kernel.__name__](*arguments)
            return
        compiled_for = constants["C"] if stages is None else constants["C"]._replace(STAGES=stages)
        given = pointers(arguments)
        for program in range(grid[0]):
            machine = Machine(kernel.__name__, seed + program, strict)
            names = namespace(kernel.__name__, machine, program, mutations)
            names[kernel.__name__](*given, compiled_for)
            machines.append(machine)

    with recording("sm_90", run):
        return function(), machines
