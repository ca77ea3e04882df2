"""Texts as they are asked: one each, with their languages, and in which order and how many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Asked(NamedTuple):
    """Texts of one batch, the language of each where they are known, and their places among all that are asked."""

    texts: list[str]
    langs: list[str] | None
    places: list[int]


def asked_together(texts: list[str], languages: list[str] | None, places: Sequence[int]) -> Asked:
    """Those of the texts at some places."""
    return Asked([texts[place] for place in places], languages and [languages[place] for place in places], list(places))


def listed(texts: Iterable[str]) -> list[str]:
    """Texts in a list. Raises ValueError for one text, of which each letter would be one."""
    if isinstance(texts, str):
        raise ValueError(f"texts: got one text, {texts!r}, takes a list of them")
    return list(texts)


def languages_of(langs: Sequence[str] | None, count: int) -> list[str] | None:
    """A language for each of `count` texts, or None. Raises ValueError for another number of them."""
    if langs is None:
        return None
    if isinstance(langs, str) or len(langs) != count:
        raise ValueError(f"langs: got {langs!r}, takes a code for each of {count} texts")
    return list(langs)


def longest_first(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of places, so that texts of like length are together and the first batch takes the most memory."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return (order[first : first + size] for first in range(0, len(order), size))
