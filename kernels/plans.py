"""Calls like one that was made before, at the price of their launches.

What an operator's host code works out from a call - checks, launch configuration, sizes of results, the order in which a kernel
takes its arguments - is the same for every call whose tensors agree in shape, strides, dtype, device and alignment, and whose
other arguments agree. So the first of them is watched: what it allocates (`fresh`) and what it launches. The Plan that comes of it
allocates and launches the same, with the new call's addresses in their places.

A function that is watched may do nothing with tensors but allocate by `fresh`, launch, and return what it allocated. A launch of
anything else, such as a copy that was made of a strided input, leaves a call without a plan: it goes the long way each time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .launch import Launched, allocate_scratch, launches_replaced, noting
from .repeated_launch import Place, RepeatedLaunch, current_stream, observed, refuse

MOST_PLANS = 256  # of one operator: a growing cache takes a new one each step, which all layers share
ALIGNMENT = 16  # bytes: all that is compiled into a kernel of an address

enabled = os.environ.get("LAYALIGN_PLANS") != "0"

_shape_and_dtype = attrgetter("shape", "dtype")
_lasting: list[Tensor] = []  # a few words each
_watching = threading.local()  # .made, what `fresh` was given: backward passes have threads of their own


def fresh(tensor: Tensor) -> Tensor:
    """`tensor`, which was just allocated, and which a plan of this call allocates anew."""
    made = getattr(_watching, "made", None)
    if made is not None:
        made.append(tensor)
    return tensor


def lasting(tensor: Tensor) -> Tensor:
    """`tensor`, which lives as long as the process, and which any plan may hold."""
    _lasting.append(tensor)
    return tensor


@cache
def nothing(device: torch.device) -> Tensor:
    """One fp32 that nobody reads, for a pointer that a kernel takes and not every call needs."""
    with torch.inference_mode(False):
        return lasting(torch.empty(1, dtype=torch.float32, device=device))


class Described(NamedTuple):
    """A call as plans see it: what must agree, its tensors with their addresses, and the plan for it, if there is one."""

    key: tuple[Hashable, ...]
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    plan: Plan | None


class _Places:
    """Of arguments of such types, which are tensors."""

    def __init__(self, kinds):
        tensors = [place for place, kind in enumerate(kinds) if issubclass(kind, Tensor)]
        others = [place for place in range(len(kinds)) if place not in tensors]
        self.tensors, self.others = itemgetter(*tensors), itemgetter(*others)


@lru_cache(maxsize=256)
def _places(kinds):
    if any(issubclass(kind, Tensor) and kind not in (Tensor, torch.nn.Parameter) for kind in kinds):
        return None
    return _Places(kinds)


class Plans:
    """The plans of one operator, at most MOST_PLANS, the oldest forgotten first. They hold no tensor of any call."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Hashable, ...], Plan | None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        """Forget all: for tests, and after changing what no key holds."""
        with self._lock:
            self._plans.clear()

    def describe(self, arguments: tuple[Any, ...], state: Hashable) -> Described | None:
        """The Described of a call of two tensors and two others at least; None where it can have no plan.

        state: whatever else the host code looks at.
        """
        kinds = tuple(map(type, arguments))
        places = _places(kinds)
        if places is None or not enabled or launches_replaced():
            return None
        tensors = places.tensors(arguments)
        try:
            addresses = [*map(Tensor.data_ptr, tensors)]
            # Types too: to a dictionary True is 1 and 1.0, to the checks it is not.
            key = (
                *(kinds, places.others(arguments), state),
                *map(_shape_and_dtype, tensors),
                *map(Tensor.stride, tensors),
                *map(Tensor.get_device, tensors),
                *[address % ALIGNMENT for address in addresses],
            )
            return Described(key, tensors, addresses, self._plans.get(key))
        except (RuntimeError, TypeError):  # a tensor without memory, as of function transforms; what is no number
            return None

    def make(self, described: Described | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), a named tuple of tensors and None, and a plan for the next call like it."""
        if (
            described is None
            or described.key in self._plans
            or len({*map(id, described.tensors)}) < len(described.tensors)
        ):
            return function(*arguments)  # of a tensor given twice nobody could tell which was meant
        with _watched() as (made, launches):
            results = function(*arguments)
        plan = _plan(described, made, launches, results)
        with self._lock:
            if len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[described.key] = plan
        return results


@contextmanager
def _watched() -> Iterator[tuple[list[Tensor], list[Launched]]]:
    made: list[Tensor] = []
    launches: list[Launched] = []
    _watching.made = made
    try:
        with noting(launches):
            yield made, launches
    finally:
        _watching.made = None


class _Unknown(Exception):
    """A tensor that is neither the call's nor fresh."""


class _View(NamedTuple):
    """A view of the tensor of number `of`, counted from its start."""

    of: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    elements: int
    bytes: int


class _Tensors:
    """Which tensor is which while a plan is made: the call's, fresh ones, lasting ones, then views of those."""

    def __init__(self, given, made, device):
        self.made, self.views, self.first, self.device = made, [], len(given), device
        self.lasting = list(_lasting)
        self.known = [*given, *made, *self.lasting]
        self.numbers = {id(x): number for number, x in enumerate(self.known)}

    @cached_property
    def memories(self):
        """What a view is told by, unless several tensors share it: in the next call they need not."""
        memories = [x.untyped_storage().data_ptr() for x in self.known]
        return {x: number for number, x in enumerate(memories) if x and memories.count(x) == 1}

    def place(self, x):
        number = self.numbers.get(id(x))
        return Place(self.place_of_view(x) if number is None else number)

    def place_of_view(self, x):
        of = self.memories.get(x.untyped_storage().data_ptr())
        if of is None or self.known[of].dtype != x.dtype:
            raise _Unknown
        elements = x.storage_offset() - self.known[of].storage_offset()
        view = _View(of, tuple(x.shape), x.stride(), elements, elements * x.element_size())
        if view not in self.views:
            self.views.append(view)
        return len(self.known) + self.views.index(view)


def _plan(described, made, launches, results):
    """The Plan that repeats a call, or None."""
    tensors = _Tensors(described.tensors, made, described.tensors[0].device)
    try:
        steps = [RepeatedLaunch(x, tensors.place) for x in launches]
        wanted = [None if x is None else tensors.place(x).number - tensors.first for x in results]
    except _Unknown:
        return None
    if not all(number is None or 0 <= number < len(made) for number in wanted):
        return None
    return Plan(steps, tensors, wanted, type(results)._make)


def _allocation(made, given):
    """How to allocate a tensor anew, in the first way of three that will do (0.7, 0.9 and 1.0 microseconds): like one of the call's in
    all, like one in dtype, or like none -> numbers of both or None, size, strides, dtype."""
    about = made.shape, made.stride(), made.dtype
    alike = (number for number, x in enumerate(given) if x.shape == about[0] and (x.stride(), x.dtype) == about[1:])
    like = next(alike, None)
    related = next((number for number, x in enumerate(given) if x.dtype == made.dtype), None)
    return like, related, *about


class Plan:
    """What a call allocates and launches. `run` makes it again."""

    def __init__(
        self, steps: list[RepeatedLaunch], tensors: _Tensors, wanted: list[int | None], result: Callable[..., Any]
    ) -> None:
        self._steps, self._views, self._wanted, self._result = steps, tensors.views, wanted, result
        self._made = [_allocation(x, tensors.known[: tensors.first]) for x in tensors.made]
        self._device = tensors.device
        self._lasting, self._lasting_addresses = tensors.lasting, [x.data_ptr() for x in tensors.lasting]
        self._needs_scratch = any(step.needs_scratch for step in steps)
        self._direct = _are_known(steps)

    def run(self, described: Described) -> Any:
        """The results of a call that agrees with the one that was watched."""
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self._run(described)
        return self._run(described)

    def _run(self, described):
        given = described.tensors
        made = [
            torch.empty_like(given[like])
            if like is not None
            else given[related].new_empty_strided(size, stride)
            if related is not None
            else torch.empty_strided(size, stride, dtype=dtype, device=self._device)
            for like, related, size, stride, dtype in self._made
        ]
        if not (self._direct and self._launch_directly(described, made)):
            self._launch_through_triton(described, made)
        return self._result([None if number is None else made[number] for number in self._wanted])

    def _launch_directly(self, described, made):
        """-> whether it did."""
        if observed():
            return False
        addresses = [*described.addresses, *map(Tensor.data_ptr, made), *self._lasting_addresses]
        addresses += [addresses[view.of] + view.bytes for view in self._views]
        stream = current_stream()
        if self._needs_scratch:
            triton.set_allocator(allocate_scratch)
        try:
            for step in self._steps:
                step.direct(addresses, stream)
        except (TypeError, AttributeError, SystemError) as error:  # as of another interface: nothing ran
            refuse(error)
            self._direct = False
            return False
        return True

    def _launch_through_triton(self, described, made):
        tensors = [*described.tensors, *made, *self._lasting]
        for of, size, stride, elements, _ in self._views:
            tensors.append(tensors[of].as_strided(size, stride, tensors[of].storage_offset() + elements))
        for step in self._steps:
            if step.is_known() is None and not observed():
                step.rehearse(tensors, current_stream())
            else:
                step.through_triton(tensors)
        self._direct = _are_known(self._steps)


def _are_known(steps):
    return bool(steps) and all(step.is_known() for step in steps)
