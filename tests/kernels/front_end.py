"""Calls of the attention kernels through Triton's front end, for a GPU that is not there; a program, which prints what does not compile.

Here arguments are what the interpreter does not make of them: strides of 1 are constants, and types must agree.
"""

import torch
import triton
from triton.backends.nvidia import compiler

from layalign.kernels.adaptive_fusion_attention.call import Call
from layalign.kernels.adaptive_fusion_attention.gpu.backward import backward
from layalign.kernels.adaptive_fusion_attention.gpu.decode import decode
from layalign.kernels.adaptive_fusion_attention.gpu.forward import forward
from layalign.kernels.ahead_of_time.worker import AbsentGPU
from layalign.kernels.launch import recording

GATES = {"layer": (1,), "head": (8,), "dynamic": (2, 8, 40), "dynamic of one head": (2, 1, 40)}
count = 0


class Made(Exception):
    """The kernel's IR is there; what follows takes seconds a kernel."""


def stages_of(backend, stages, options, *rest):
    def stop(source, metadata):
        raise Made

    stages.update(dict.fromkeys(("ttir", "ttgir", "llir", "ptx", "cubin"), stop))


def record(kernel, grid, args, constants, options):
    global count
    count += 1
    try:
        kernel.warmup(*args, grid=grid, **constants, **options)
    except Made:
        pass
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(f"{kernel.__name__}, {now}: {error!r}")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


compiler.CUDABackend.add_stages = stages_of
triton.runtime.driver.set_active(AbsentGPU("sm_90"))
with recording("sm_90", record):
    for name, gate in GATES.items():
        for width in (64, 1):
            for sink in (False, True):
                for length in (40, 1):
                    now = f"a gate of a {name}, D = {width}, S = {length}, {'a' if sink else 'no'} sink"
                    q, k, cross = (
                        empty(2, rows, heads, width).transpose(1, 2) for rows, heads in ((length, 8), (40, 2), (30, 2))
                    )
                    gates = empty(*gate[:2], *gate[2:] and (length,), dtype=torch.float32)
                    call = Call(q, k, k, cross, cross, gates, scale=0.1, sink=empty(8) if sink else None)
                    results = forward(call)
                    backward(torch.empty_like(results.out), results, call, [True] * 6 + [sink])
                    if length == 1:
                        decode(call, False)
print(f"{count} kernels")
