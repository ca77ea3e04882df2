"""Triton's interpreter under test: its launches and matrix products counted, its addresses checked."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


@contextmanager
def counted_work():
    """Within, every launch is noted -> .dots, how many tl.dot each kernel ran; .tiles, its (BLOCK_M, BLOCK_N)."""
    work, running = SimpleNamespace(dots=Counter(), tiles={}), []
    multiply, run = interpreter.InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__

    def count(self, *args, **kwargs):
        work.dots[running[-1]] += 1
        return multiply(self, *args, **kwargs)

    def run_named(self, *args, **kwargs):
        running.append(self.fn.__name__)
        constants = kwargs["C"]._asdict() if "C" in kwargs else kwargs
        work.tiles[self.fn.__name__] = constants.get("BLOCK_M"), constants.get("BLOCK_N")
        try:
            return run(self, *args, **kwargs)
        finally:
            running.pop()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", count)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_named)
        yield work


@contextmanager
def guarded_addresses():
    """Within, a load or store outside the memory of the launch's tensors raises IndexError before it happens."""
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    run = interpreter.GridExecutor.__call__
    extents = []

    def check(pointers, mask):
        used = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.uint64)
        inside = np.zeros(used.shape, dtype=bool)
        for begin, end in extents:
            inside |= (used >= begin) & (used < end)
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} addresses outside all tensors")

    def checked_load(self, ptrs, mask, *rest, **options):  # descriptors name what else they give
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self, ptrs, value, mask, *rest, **options):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    def run_guarded(self, *args, **kwargs):
        extents[:] = map(_extent, _tensors(args))
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_guarded)
        # It copies every storage back onto itself, also what lies between rows and takes no memory yet.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        yield


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            yield argument


def _extent(tensor):
    """-> first byte and the byte past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
