"""Triton's interpreter in two fifths of its time: what it computes anew at every operation is computed once. Results are the same."""

import dataclasses
import functools
import math
from contextlib import contextmanager

import numpy as np
import pytest
from triton.language import core, semantic
from triton.runtime import interpreter

# Of two operands of one of these types and one shape nothing is promoted, cast or broadcast, in a division either.
CLOSED = frozenset(("int1", "int32", "int64", "fp32"))


@contextmanager
def quick_and_quiet():
    """Within, launches take two fifths of the time and -inf - -inf warns of nothing, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        _patch_languages_once_a_launch(patch)
        _types_once(patch)
        with overflow_checks(False):
            yield


@contextmanager
def overflow_checks(on):
    """Within, every sum, difference and product of 32 bits is computed in 64 as well and compared, or is not. That is a third of the
    interpreter's time, and an overflow needs tensors that few tests have."""
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=on))
        yield


def _patch_languages_once_a_launch(patch):
    """The interpreter patches the language anew at every inner function call, which is half of its time: 227 ms of a
    forward against 108 with one patch a launch (8 heads of 17 queries and 28 keys)."""
    patch_language, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    @functools.cache
    def languages(function):
        return frozenset(
            id(value) for value in function.__globals__.values() if value in (interpreter.tl, interpreter.tl.core)
        )

    def patch_once(function):
        if languages(function) in patched:
            return None
        patched.add(languages(function))
        return patch_language(function)

    def run_one_launch(self, *args, **kwargs):
        patched.clear()
        with np.errstate(all="ignore"):
            return run(self, *args, **kwargs)

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter.GridExecutor, "__call__", run_one_launch)


def _types_once(patch):
    """A type is made, checked and named, and the type in NumPy looked up, at every operation; here once each."""
    make_type, check_operands = core.block_type.__init__, semantic.TritonSemantic.binary_op_type_checking_impl
    equal, numpy_type = core.dtype.__eq__, interpreter._get_np_dtype
    made, numpy_types = {}, {}

    def make_type_once(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in made:
            make_type(self, element_ty, shape)
            made[key] = vars(self) | _shape_of_tensors(self.shape)
        self.__dict__.update(made[key])

    scalar = _shape_of_tensors(())

    def make_tensor(self, handle, type):
        self.handle, self.type = handle, type
        shape = vars(type) if type.is_block() else scalar
        self.dtype, self.shape, self.numel = type.scalar, shape["tensor_shape"], shape["tensor_numel"]

    def operands(self, lhs, rhs, *args, **kwargs):
        same = type(lhs) is type(rhs) is core.tensor and lhs.shape is rhs.shape and lhs.dtype is rhs.dtype
        if same and lhs.dtype.name in CLOSED:
            return lhs, rhs
        return check_operands(self, lhs, rhs, *args, **kwargs)

    def numpy_type_once(of):
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    patch.setattr(core.block_type, "__init__", make_type_once)
    patch.setattr(core.tensor, "__init__", make_tensor)
    patch.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    patch.setattr(semantic.TritonSemantic, "binary_op_type_checking_impl", operands)
    patch.setattr(interpreter, "_get_np_dtype", numpy_type_once)


def _shape_of_tensors(shape):
    """What all tensors of a shape hold of it; nothing changes it in place."""
    return {
        "tensor_shape": core.tuple([core.constexpr(size) for size in shape]),
        "tensor_numel": core.constexpr(math.prod(shape)),
    }
