"""In which order and how many at a time texts are answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def longest_first(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of places, so that texts of like length are together and the first batch takes the most memory."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return (order[first : first + size] for first in range(0, len(order), size))
