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
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from ..launch import compiled_for, recording

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SHOWN = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DESCRIPTORS")  # of what a kernel is compiled for
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


def compile_call(module, arch, variant, head_dim, dtype, length, skip, emit):
    """Run the shipped calls of `module` on meta tensors and compile each kernel with just the arguments that it would be launched with."""
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
        repeated = compiled.hash in seen  # such as the tile lists of two masks
        seen.add(compiled.hash)
        files = [str(path) for path in compiled.metadata_group.values() if str(path).endswith(".cubin")]
        figures = None if repeated else {**inspect(compiled), "seconds": round(seconds, 2), "cubin": files[0]}
        emit({"launch": launch, "figures": figures})

    with recording(arch, record):
        import_module(module).run(variant, head_dim, getattr(torch, dtype), length)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or an interrupted ptxas looks like one that failed
    # Triton and LLVM print to standard output when they fail: keep it for the lines of the protocol.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    compile_call(**json.loads(sys.argv[1]), emit=lambda line: print(json.dumps(line), file=lines))


if __name__ == "__main__":
    main()
