"""What every operator does before its backend runs: choose the backend, follow autocast, word the errors."""

import torch

BACKENDS = ("auto", "triton", "torch", "flash", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def malformed(argument, got, takes):
    """The error of every refused argument: its name, what it got and what it takes."""
    return ValueError(f"{argument}: got {got}, takes {takes}")


def choose_backend(backend, available, operator):
    """Name of the backend that serves this call; "auto" is the first of `available`."""
    if backend == "auto":
        return available[0]
    if backend in available:
        return backend
    if backend in BACKENDS:
        raise ValueError(
            f'backend="{backend}" is not available in this version for {operator}; available: {", ".join(available)}'
        )
    raise malformed("backend", repr(backend), f"one of {', '.join(map(repr, BACKENDS))}")


def check_tensors(backend, required, optional=None):
    """The floating tensors of one call, by argument name: all of one dtype and device, which the first one sets."""
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


def autocast_dtype(tensor):
    """The dtype that autocast prescribes for this call, None where autocast is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast_for_autocast(tensor, dtype):
    """As torch's own operators do under autocast: floating tensors follow, float64 and the rest stay."""
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor
