"""One launch made again: through Triton, or directly as Triton would, without its binder.

Of a launch's 12 to 20 microseconds on the host Triton's binder takes more than half, and finds each time what it found before:
the same compiled kernel. The compiled kernel is called with what the binder would have handed it, but for tensors, for which their
addresses stand. That is an inner interface of Triton, the same from 3.6 to 3.9, and no more is believed of it than was seen: the
first repetition of each compiled kernel goes through Triton, watched (`rehearse`), and if what Triton hands over is anything else, or
if a direct launch is refused, Triton's own path stays.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from .launch import Launched, allow_descriptors

_rehearsing = threading.Lock()
# Compiled kernels that Triton was seen to launch as `RepeatedLaunch.direct` does.
_rehearsed: weakref.WeakSet[Any] = weakref.WeakSet()
_refused = False


class Place(NamedTuple):
    """Stands in a launch's arguments for a tensor, by its number among all of a plan."""

    number: int


class RepeatedLaunch:
    """A launch that was noted, without its tensors: place(tensor) -> the Place that stands for it."""

    def __init__(self, launched: Launched, place: Callable[[Tensor], Place]) -> None:
        numbers: list[Any] = []
        words: list[str] = []
        args = tuple(_placed(x, place, numbers, words) for x in launched.args)
        self._launched = launched._replace(args=args)
        # Launches with the tensors at these addresses, on this stream; after `allow_descriptors` where it `needs_scratch`.
        self.direct: Callable[[Sequence[int], int], Any] | None = None
        kernel, compiled = launched.kernel, launched.compiled
        # HIP's binder looks at the size of a tensor's memory too.
        if compiled is None or torch.version.hip or getattr(kernel, "pre_run_hooks", True):
            return
        try:
            self._start = compiled.run
            self._before = ((*launched.grid, 1, 1)[:3], compiled.function, compiled.packed_metadata)
            constants = [launched.constants[name] for name in kernel.arg_names[len(args) :]]
        except (AttributeError, KeyError):
            return
        for constant in constants:  # not looked into, whatever it is
            words.append(_NUMBERS[len(numbers)])
            numbers.append(constant)
        self._text, self._numbers = "".join(words), tuple(numbers)
        self.direct = self._calling(self._start)

    def _calling(self, start):
        """A function of addresses and a stream that calls start as Triton does."""
        return _maker(self._text, len(self._numbers))(start, *self._before, self._numbers)

    @property
    def needs_scratch(self) -> bool:
        """Whether it makes tensor descriptors in memory that Triton asks for."""
        return self._launched.config.descriptors

    def is_known(self) -> bool | None:
        """Whether `direct` does what Triton does: None until `rehearse` has seen it."""
        if self.direct is None or _refused:
            return False
        return True if self._launched.compiled in _rehearsed else None

    def through_triton(self, tensors: Sequence[Tensor]) -> None:
        """Launch with these tensors."""
        kernel, grid, config, args, constants, options, _ = self._launched
        if config.descriptors:
            allow_descriptors()
        kernel[grid](*_filled(args, tensors), **constants, **options)

    def rehearse(self, tensors: Sequence[Tensor], stream: int) -> None:
        """Launch through Triton, and see whether `direct` would have handed over the same."""
        compiled, handed, thread = self._launched.compiled, [], threading.get_ident()

        def start(*arguments):
            if threading.get_ident() == thread:
                handed.append(arguments)
            return self._start(*arguments)

        with _rehearsing:
            compiled._run = start
            try:
                self.through_triton(tensors)
            finally:
                compiled._run = self._start
        ours = self._calling(lambda *arguments: arguments)([x.data_ptr() for x in tensors], stream)
        if len(handed) == 1 and _equal((*handed[0][:6], *handed[0][9:]), (*ours[:6], *ours[9:])):
            _rehearsed.add(compiled)
        else:
            self.direct = None


def refuse(error: Exception) -> None:
    """No direct launches from here on."""
    global _refused
    if not _refused:
        warnings.warn(
            f"Triton {triton.__version__} refuses direct launches ({error}): calls cost more time", stacklevel=2
        )
    _refused = True


def observed() -> bool:
    """Whether a profiler wants to see launches, which only Triton's own path shows."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or knobs.compilation.instrumentation_mode
    )


def current_stream() -> int:
    """Of the current device."""
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


# Names in the source that `_maker` compiles: of addresses, and of what is no tensor.
_ADDRESSES = [f"a[{number}]," for number in range(100)]
_NUMBERS = [f"n{number}," for number in range(300)]


def _placed(argument, place, numbers, words):
    """An argument with a Place for each tensor. What is no tensor is added to `numbers`, and `words` grow by the argument's source,
    with plain tuples for named ones: compiled kernels take them as well."""
    if isinstance(argument, tuple):
        words.append("(")
        members = [_placed(member, place, numbers, words) for member in argument]
        words.append("),")
        return argument._make(members) if hasattr(argument, "_make") else tuple(members)
    if isinstance(argument, Tensor):
        placed = place(argument)
        words.append(_ADDRESSES[placed.number])
        return placed
    words.append(_NUMBERS[len(numbers)])
    numbers.append(argument)
    return argument


@cache  # one for each kernel and pattern of Nones
def _maker(text, count):
    """A function that binds all of a direct launch but addresses and stream: names that Python looks up once, not each time."""
    source = f"""
def make(start, grid, function, metadata, numbers):
    x, y, z = grid
    {"".join(_NUMBERS[:count])} = numbers
    return lambda a, stream: start(x, y, z, stream, function, metadata, None, None, None, {text})
"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102, of words that stand here
    return namespace["make"]


def _filled(argument, tensors):
    """An argument with tensors in their places."""
    if isinstance(argument, Place):
        return tensors[argument.number]
    if isinstance(argument, tuple):
        members = (_filled(member, tensors) for member in argument)
        return argument._make(members) if hasattr(argument, "_make") else tuple(members)
    return argument


def _equal(theirs, ours):
    """Whether two launches agree, in one of which addresses stand for tensors."""
    if isinstance(theirs, Tensor):
        return theirs.data_ptr() == ours
    if isinstance(theirs, tuple):
        return len(theirs) == len(ours) and all(map(_equal, theirs, ours))
    return theirs == ours
