"""How Triton kernels are started: the launch configuration, the device's architecture, and the one place all launches go through."""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Whether Triton kernels run in Triton's interpreter, on CPU tensors: Triton decides it when it defines them.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Tile sizes and resources of one launch.

    block_m: rows of queries in a tile; block_n: keys in a tile; warps: of 32 threads each; stages: tiles in flight in
    the software pipeline; descriptors: read tiles by tensor descriptors (TMA) instead of pointers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False


_recorder = None  # (architecture, function called instead of a launch), set by `recording`


def architecture(device):
    """ "sm_90", "gfx942", ..., or "interpreter" for CPU tensors."""
    if _recorder is not None:
        return _recorder[0]
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch(kernel, grid, config, *args, **constants):
    """Start `kernel` on `grid`. Floating-point fusion is asked for by name: Triton's default changes with 3.10."""
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
    if _recorder is not None:
        _recorder[1](kernel, grid, args, constants, options)
        return
    if config.descriptors and not INTERPRETING:
        import triton

        triton.set_allocator(_allocate)  # every time: it holds for one thread, and backward passes have their own
    kernel[grid](*args, **constants, **options)


def _allocate(size, alignment, stream):
    """Memory in which a kernel makes its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@contextmanager
def recording(name, record):
    """Within, devices are of architecture `name`, and record(kernel, grid, args, constants, options) replaces launches."""
    global _recorder
    before, _recorder = _recorder, (name, record)
    try:
        yield
    finally:
        _recorder = before
