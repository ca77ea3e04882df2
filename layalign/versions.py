"""The versions that results were made with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

CORE = ("layalign", "torch", "transformers")


def versions(packages: Sequence[str] = CORE) -> dict[str, str]:
    """Version by name, of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
