"""What every operator does around its backend: choose it, follow autocast, word the errors, refuse second gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .launch import INTERPRETING, constant_when_compiled, stands_in

BACKENDS = ("auto", "triton", "torch", "flash", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_refused: set[torch.device] = set()  # GPUs that "auto" has warned of


def malformed(argument: str, got: object, takes: object) -> ValueError:
    """The error of every refused argument: its name, what it got and what it takes."""
    return ValueError(f"{argument}: got {got}, takes {takes}")


def choose_backend(backend: object, available: Sequence[str], operator: str, tensor: object) -> str:
    """Name of the backend that serves this call on the device of `tensor`.

    "auto" is "triton" on the GPUs it covers and "torch" elsewhere.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise malformed("backend", repr(backend), f"one of {', '.join(map(repr, BACKENDS))}")
    device = tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")
    if backend == "auto":
        return "triton" if device.type == "cuda" and "triton" in available and covered(device) else "torch"
    if backend not in available:
        raise ValueError(f'backend="{backend}" is not available here for {operator}; available: {", ".join(available)}')
    if backend == "triton" and device.type != "cuda" and stands_in() is None:
        if not INTERPRETING:
            takes = (
                "CUDA or HIP tensors (TRITON_INTERPRET=1, set before the start, runs the kernels on a CPU to test them)"
            )
            raise malformed(f'backend="triton" of {operator}', f"tensors on {device}", takes)
        if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16:
            takes = "float32 or float16: Triton's interpreter computes with the bits of bfloat16"
            raise malformed(f'backend="triton" of {operator}', "bfloat16 under TRITON_INTERPRET=1", takes)
    return backend


@constant_when_compiled
def covered(device: torch.device) -> bool:
    """Whether the kernels support this GPU; says once of each that they do not."""
    if torch.version.hip or device in _refused:
        return device not in _refused
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return True
    _refused.add(device)
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; LayAlign's Triton kernels need 8.0, "
        'so backend="auto" takes "torch" there',
        stacklevel=4,
    )
    return False


def check_tensors(backend: str, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError unless the floating tensors of one call, by argument name, are of one dtype and device, which the first
    one sets."""
    given = required if not optional else {**required, **{k: v for k, v in optional.items() if v is not None}}
    first_name = None
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise malformed(name, type(tensor).__name__, "a tensor")
        if first_name is None:
            first_name, dtype, device = name, tensor.dtype, tensor.device
            if dtype not in KERNEL_DTYPES and not (backend == "reference" and dtype == torch.float64):
                raise malformed(name, dtype, 'float32, float16 or bfloat16 (float64 with backend="reference")')
        elif tensor.dtype != dtype:
            raise malformed(name, tensor.dtype, f"the dtype of {first_name}, {dtype}")
        elif tensor.device != device:
            raise malformed(name, f"a tensor on {tensor.device}", f"one on the device of {first_name}, {device}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast prescribes for this call, None where autocast is off."""
    device = tensor.device.type
    if device == "meta":  # there is no autocast, and asking is an error
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast_for_autocast(tensor: Any, dtype: torch.dtype) -> Any:
    """As torch's own operators do under autocast: floating tensors follow, float64 and the rest stay."""
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def first_gradients_only(
    backward: Callable[..., Any], instead: str = 'this backend has first ones only, backend="reference" has both'
) -> Callable[..., Any]:
    """A `backward` of an autograd function whose own derivative raises a RuntimeError.

    torch's once_differentiable does not do: it cuts the gradients off, so that torch.autograd.grad of a loss and a penalty on its
    gradients leaves the penalty out without a word. The derivative is known to be asked for by what the function has saved: a tensor
    of the graph must be among that.

    Args:
        backward: of the autograd function.
        instead: what the error says after naming it.
    """

    @wraps(backward)
    def run(ctx, *grads):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            made = backward(ctx, *grads)
        made = made if isinstance(made, tuple) else (made,)
        inputs = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
        marked = iter(
            _NoSecondGradients.apply(
                f"second gradients (of {type(ctx).__name__.strip('_').removesuffix('Backward')}): {instead}",
                len(inputs),
                *inputs,
                *(x for x in made if x is not None),
            )
        )
        return tuple(x if x is None else next(marked) for x in made)

    return run


class _NoSecondGradients(torch.autograd.Function):
    """First gradients as they are, tied to what they were made from."""

    @staticmethod
    def forward(ctx, refusal, count, *tensors):
        ctx.refusal = refusal
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.refusal)
