"""Compiles the kernels of one call for a GPU that need not be there; a program, since Triton can abort its process.

python -m layalign.kernels.ahead_of_time.worker CALL, a JSON object with the fields of `calls.described_calls` and `skip`,
the launches to leave out. Standard output: two JSON lines a launch, when its compilation starts and what came of it.
The compiled kernels are in Triton's own cache afterwards, where a launch on such a GPU finds them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..launch import LaunchConfig, compiled_for, recording

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SHOWN = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DESCRIPTORS", "AHEAD")  # of what a kernel is compiled for
_ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class AbsentGPU:
    """A Triton driver that knows its target and nothing else: all that compiling asks of a driver."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(resource_usage, sass):
    """Figures from the text of `cuobjdump -res-usage` and `-sass` of one kernel.

    spill_bytes: spilled registers go through local memory, so these are the bytes of all STL or of all LDL instructions,
    whichever is more: the "spill stores" and "spill loads" of ptxas -v, which a kernel from the cache does not show.
    stack_bytes: the local memory a thread sets aside, for those (a place may be stored to more than once) and for
    values that are indexed at run time.
    """
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resource_usage).groups()
    instructions = Counter(_INSTRUCTION.findall(sass))
    local = Counter()
    products = Counter()
    for instruction, count in instructions.items():
        name, *modifiers = instruction.split(".")
        if name in ("STL", "LDL"):
            local[name] += count * next((_ACCESS_BYTES[m] for m in modifiers if m in _ACCESS_BYTES), 4)
        if name.endswith("MMA"):  # HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)
            products[name] += count
    return {
        "registers": int(registers),
        "spill_bytes": max(local.values(), default=0),
        "stack_bytes": int(stack),
        "tensor_core_instructions": products.total(),
        "tensor_core_kind": "+".join(sorted(products)) or None,
    }


def inspect(compiled):
    """Figures of a compiled kernel."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        texts = [
            subprocess.run([cuobjdump, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    return {
        **resources(*texts),
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory_columns": compiled.metadata.tmem_size or 0,
        "matrix_products": _matrix_products(compiled.asm),
    }


def _matrix_products(asm):
    """How often a kernel multiplies matrices; Gluon starts from Triton's GPU dialect."""
    return asm["ttir"].count("tt.dot ") if "ttir" in asm else asm["ttgir"].count("ttng.warp_group_dot ")


def _arguments(kernel, args):
    """-> {name: number} of a launch's arguments, and {name: bytes of one number} of its tensors (0 of what is none); those in a named
    tuple as "tuple.field"."""
    numbers, tensors = {}, {}
    for name, value in zip(kernel.arg_names, args, strict=False):
        fields = value._asdict() if hasattr(value, "_asdict") else {"": value}
        for field, part in fields.items():
            place = f"{name}.{field}" if field else name
            if isinstance(part, (int, float)) and not isinstance(part, bool):
                numbers[place] = part
            elif part is not None:
                held = part[0] if isinstance(part, tuple) and part else part
                tensors[place] = held.element_size() if isinstance(held, torch.Tensor) else 0
    return numbers, tensors


@contextmanager
def replacing(name, function):
    """Within, every module of the kernels that has a function of that name has this one."""
    modules = [module for place, module in sys.modules.items() if place.startswith("layalign.kernels.")]
    found = [(module, getattr(module, name)) for module in modules if callable(getattr(module, name, None))]
    for module, _ in found:
        setattr(module, name, function)
    try:
        yield [original for _, original in found]
    finally:
        for module, original in found:
            setattr(module, name, original)


@contextmanager
def configured(configs):
    """Within, launch tables give these: {kernel: fields of a LaunchConfig}, "decode" and "matmul" among the kernels."""
    with ExitStack() as stack:
        for name in ("launch_config", "mix_config", "decode_config", "matmul_config"):
            table = {kernel: LaunchConfig(**fields) for kernel, fields in configs.items()}
            originals: list = []

            def choose(*args, table=table, originals=originals, name=name, **call):
                kernel = args[0] if args else name.removesuffix("_config")
                return table[kernel] if kernel in table else originals[0](*args, **call)

            originals += stack.enter_context(replacing(name, choose))[:1]
        yield


def compile_call(module, arch, variant, head_dim, dtype, length, skip, emit, sizes=None, configs=None, programs=None):
    """Run the shipped calls of `module` on meta tensors and compile each kernel with just the arguments that it would be launched with.

    sizes: of a call beside the shipped ones, arguments of `run_sizes` there; configs: see `configured`; programs: multiprocessors.
    """
    triton.runtime.driver.set_active(AbsentGPU(arch))
    launches, seen = 0, set()

    def record(kernel, grid, args, constants, options):
        nonlocal launches
        launch, launches = launches, launches + 1
        if launch in skip:
            return
        named = compiled_for(constants)
        config = {name.lower(): named[name] for name in _SHOWN if name in named}
        config = {name: value for name, value in config.items() if value != 0 or name == "descriptors"}
        config |= {"warps": options["num_warps"], "stages": options["num_stages"]}
        emit({"launch": launch, "kernel": kernel.__name__, "config": config})
        start = time.perf_counter()
        # A meta tensor's address is 0 plus its storage offset: aligned just where a real one is.
        compiled = kernel.warmup(*args, grid=grid, **constants, **options)
        seconds = time.perf_counter() - start
        repeated = compiled.hash in seen and sizes is None  # such as the tile lists of two masks
        seen.add(compiled.hash)
        figures = None
        if not repeated:
            numbers, tensors = _arguments(kernel, args)
            files = [str(path) for path in compiled.metadata_group.values() if str(path).endswith(".cubin")]
            figures = {**inspect(compiled), "seconds": round(seconds, 2), "cubin": files[0], "grid": list(grid)}
            figures |= {"numbers": numbers, "tensors": tensors, "constants": _plain(named)}
        emit({"launch": launch, "figures": figures})

    with ExitStack() as stack:
        stack.enter_context(recording(arch, record))
        shipped = import_module(module)
        stack.enter_context(configured(configs or {}))
        if programs is not None:
            stack.enter_context(replacing("multiprocessors", lambda device: programs))
        if sizes is None:
            shipped.run(variant, head_dim, getattr(torch, dtype), length)
        else:
            shipped.run_sizes(head_dim=head_dim, dtype=getattr(torch, dtype), **sizes)


def _plain(constants):
    return {name: value for name, value in constants.items() if isinstance(value, (bool, int, float, str))}


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or an interrupted ptxas looks like one that failed
    # Triton and LLVM print to standard output when they fail: keep it for the lines of the protocol.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    compile_call(**json.loads(sys.argv[1]), emit=lambda line: print(json.dumps(line), file=lines))


if __name__ == "__main__":
    main()
