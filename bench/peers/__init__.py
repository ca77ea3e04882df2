"""Peers: other implementations of what the suites measure, one file each.

Every file in a folder here is found by itself. It holds PEERS = {suite: {name: make}}; the folder's own text says which
suites there are, what `make` is given and what it returns. Where a machine lacks the peer, that is Missing with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.measuring import LEFT_OUT, Missing

Make = Callable[[Any], Any]


def peers_of(folder: str, suite: str) -> dict[str, Make]:
    """{name: make} of all files of a folder, in the order of the files' names.

    Raises:
        ValueError: two files have a peer of the same name.
    """
    found: dict[str, Make] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name(folder))])):
        peers = importlib.import_module(f"{__name__}.{folder}.{module}").PEERS.get(suite, {})
        if twice := found.keys() & peers.keys():
            raise ValueError(f"bench/peers/{folder}/{module}.py: there is a {', '.join(twice)} of {suite} already")
        found |= peers
    return {name: _left_out(name) if name in machine().left_out else make for name, make in found.items()}


def everywhere(function: Callable) -> Make:
    """`make` of a function that runs on any machine and needs to know nothing of the case."""
    return lambda case: function


def needs_cuda(name: str, make: Make) -> Make:
    """`make` of a peer that a GPU alone has."""
    return lambda case: make(case) if case.device == "cuda" else Missing(f"{name} needs a CUDA device")


def _left_out(name):
    return lambda case: Missing(f"{name} {LEFT_OUT}")
