"""Tensors of files that may be larger than the memory: mapped, and compared without keeping the files in memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

# Of tensors compared at once.
CHUNK = 64 << 20
# madvise: the kernel may take these pages back now. Nothing is lost: what was changed is kept, what was not is read again.
PAGEOUT = 21


def load(path: str | Path) -> Any:
    """What torch.save wrote in a file, its tensors mapped. Only tensors are read: a pickle with code in it is refused, unexecuted.

    Raises:
        pickle.UnpicklingError, RuntimeError, EOFError, ValueError: as torch.load, for a file that is damaged or holds more.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        # torch maps so that tensors can be written to, for which the kernel wants as much memory as the file is long.
        if "unable to mmap" not in str(error):
            raise
    return load_read_only(path)


def load_read_only(path: str | Path) -> Any:
    """The same, its tensors in memory that cannot be written to: a change of them ends the process."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # reads no data, and says where each tensor's begins
        found = torch.load(path, map_location="cpu", weights_only=True)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def there(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: there(own) for name, own in value.items()}
        if not torch.is_tensor(value) or value.numel() == 0:
            return torch.empty(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
        storage = value.untyped_storage()
        count = storage.nbytes() // value.itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            whole = torch.frombuffer(memory, dtype=value.dtype, count=count, offset=storage._checkpoint_offset or 0)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    return there(found)


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same values, rounded to the narrower of their dtypes. Of files that are mapped no more
    than a part is in memory at a time."""
    dtype = min(right.dtype, left.dtype, key=lambda own: own.itemsize)
    if left.dim() == 0:
        return torch.equal(left.to(dtype), right.cpu().to(dtype))
    rows = max(1, CHUNK // max(1, left[:1].nbytes, right[:1].nbytes))
    for first in range(0, len(left), rows):
        parts = left[first : first + rows], right[first : first + rows]
        same = torch.equal(parts[0].to(dtype), parts[1].cpu().to(dtype))
        for part in parts:
            let_go(part)
        if not same:
            return False
    return True


def let_go(tensor: torch.Tensor) -> None:
    """Tell the kernel that a tensor's memory is not needed soon; a file's pages are then no part of this process' memory. Without effect
    on other systems than Linux and on other devices."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        # What it cannot do (an older kernel, another's file) it leaves undone.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), PAGEOUT)
