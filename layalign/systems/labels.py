"""Short names by which systems are told apart in one figure or table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def labels(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """A label each: the name, and where several have one, as many of the folders above as tell them apart.

    Args:
        names: of systems.
        places: of each its folder, file or hub name.

    Raises:
        ValueError: one thing twice.
    """
    above = [Path(os.path.abspath(place) if Path(place).exists() else place).parts[:-1] for place in places]
    found = list(names)
    for depth in range(1, 1 + max(map(len, above), default=0)):
        counts = Counter(found)
        for place, label in enumerate(found):
            if counts[label] > 1:
                found[place] = f"{names[place]} in {Path(*above[place][-depth:])}"
    if twice := [place for label, place in zip(found, places, strict=True) if found.count(label) > 1]:
        raise ValueError(f"models: got {twice[0]} twice")
    return found
