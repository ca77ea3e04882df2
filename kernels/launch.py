"""How Triton kernels are started: the launch configuration, the device's architecture, and the one place all launches go through."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

# Whether Triton kernels run in Triton's interpreter, on CPU tensors: Triton decides it when it defines them.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Tile sizes and resources of one launch.

    block_m, block_n: rows and columns of a tile (of attention: queries and keys); block_k: what a product takes of its
    inner dimension at a time, 0 for a kernel that takes all; warps: of 32 threads each; stages: tiles in flight in the
    software pipeline; descriptors: read tiles by tensor descriptors (TMA) instead of pointers; ahead: with descriptors, start
    a product of the next tile before this one's is used.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    ahead: bool = False
    block_k: int = 0


# (architecture, function called instead of a launch or None), set by `recording` and `pretending`
_recorder: tuple[str, Callable[..., None] | None] | None = None
_noting = threading.local()  # .launches, set by `noting`


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import torch._dynamo for this one attribute: 2.6 s of processor time that
    `layalign kernels` and each of its processes would spend."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_when_compiled
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., or "interpreter" for CPU tensors."""
    if _recorder is not None:
        return _recorder[0]
    return _gpu(device)[0] if device.type == "cuda" else "interpreter"


@cache  # asked several times for every launch
def _gpu(device):
    """-> architecture, multiprocessors"""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


# Architectures without lines of their own in a launch table -> those whose lines fit.
_FAMILIES = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_120": "sm_89", "sm_121": "sm_89"}


def family(architecture: str) -> str:
    """The architecture whose lines of a launch table serve this one."""
    return _FAMILIES.get(architecture, architecture)


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run side by side; a fixed number where there is no GPU to ask."""
    if _recorder is not None or device.type != "cuda":
        return 4
    return _gpu(device)[1]


def float32_precision() -> str:
    """What torch.get_float32_matmul_precision says, also where torch.backends.*.fp32_precision has said it, of which that raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def dot_precision(dtype: torch.dtype, architecture: str) -> str:
    """How tiles are multiplied: fp32 as torch.set_float32_matmul_precision says for torch's own products.

    "highest" is three tf32 products on tensor cores, to within a few roundings of fp32: products without tensor cores
    keep both tiles in registers and spill 2,600 bytes where these spill none (attention forward, D = 128, 32 x 32).
    """
    if dtype != torch.float32 or not architecture.startswith("sm_"):
        return "ieee"
    return "tf32x3" if float32_precision() == "highest" else "tf32"


class Launched(NamedTuple):
    """A launch as `noting` notes it: what `launch` was given, Triton's options, and the compiled kernel that ran; None in the
    interpreter."""

    kernel: Any
    grid: tuple[int, ...]
    config: LaunchConfig
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: Any


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, *args: Any, **constants: Any) -> None:
    """Start `kernel` on `grid`; C: a named tuple of what it is compiled for.

    Floating-point fusion is asked for by name: Triton's default changes with 3.10.
    """
    options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
    if _recorder is not None and _recorder[1] is not None:
        _recorder[1](kernel, grid, args, constants, options)
        return
    if config.descriptors and not INTERPRETING:
        allow_descriptors()
    compiled = kernel[grid](*args, **constants, **options)
    launches = getattr(_noting, "launches", None)
    if launches is not None:
        launches.append(Launched(kernel, grid, config, args, constants, options, compiled))


def allow_descriptors() -> None:
    """Before each launch of a kernel that makes tensor descriptors: it holds for one thread, and backward passes have their own."""
    import triton

    triton.set_allocator(allocate_scratch)


def compiled_for(constants: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of what a launch that was recorded compiles for: the fields of its C, or its constants as they are."""
    return constants["C"]._asdict() if "C" in constants else constants


def allocate_scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory in which a kernel makes its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda" if _recorder is None else "cpu")


@contextmanager
def noting(launches: list[Launched] | None) -> Iterator[None]:
    """Within, this thread's launches are appended to `launches`; None: not noted."""
    before, _noting.launches = getattr(_noting, "launches", None), launches
    try:
        yield
    finally:
        _noting.launches = before


@contextmanager
def pretending(name: str) -> Iterator[None]:
    """Within, CPU tensors pass for a GPU's of architecture `name`, whose driver Triton must have been given."""
    with _standing_in(name, None):
        yield


def stands_in() -> str | None:
    """The architecture of `recording` or `pretending`, None outside."""
    return None if _recorder is None else _recorder[0]


def launches_replaced() -> bool:
    """Whether `recording` takes the launches."""
    return _recorder is not None and _recorder[1] is not None


@contextmanager
def recording(name: str, record: Callable[..., None]) -> Iterator[None]:
    """Within, devices are of architecture `name`, and record(kernel, grid, args, constants, options) replaces launches."""
    with _standing_in(name, record):
        yield


@contextmanager
def _standing_in(name, record):
    global _recorder
    before, _recorder = _recorder, (name, record)
    try:
        yield
    finally:
        _recorder = before
