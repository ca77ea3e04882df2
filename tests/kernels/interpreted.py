"""Triton's interpreter under test: made faster, and its launches and matrix products counted."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from triton.runtime import interpreter


@contextmanager
def quick_and_quiet():
    """The interpreter patches the language anew at every inner function call, which is half of its time: 227 ms of a
    forward against 108 with one patch a launch (8 heads of 17 queries and 28 keys)."""
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        languages = frozenset(
            id(value) for value in function.__globals__.values() if value in (interpreter.tl, interpreter.tl.core)
        )
        if languages in patched:
            return None
        patched.add(languages)
        return patch(function)

    def run_one_launch(self, *args, **kwargs):
        patched.clear()
        with np.errstate(all="ignore"):  # -inf - -inf is silent on a GPU
            return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_one_launch)
        yield


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
