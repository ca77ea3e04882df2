"""Words and parts of messages: short names of dtypes, what a misspelt name was meant to be, what an error says first, what is no text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def did_you_mean(given: Any, known: Iterable[Any], otherwise: str = "") -> str:
    """The end of a message about a name that is none of the known ones: "; did you mean 'nearest'?".

    Args:
        given: the name.
        known: those that there are.
        otherwise: what is said where none is near.
    """
    close = difflib.get_close_matches(str(given), [str(name) for name in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def did_you_mean_or_known(given: Any, known: Iterable[Any]) -> str:
    """The same, with all known ones where none is near."""
    names = [str(name) for name in known]
    return did_you_mean(given, names, f"; known: {', '.join(names)}")


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, takes a positive int")


def long_dtype(name: str | None) -> str | None:
    """A dtype's name as torch has it, of one as recipes write `precision`: bf16 is bfloat16."""
    return SHORT_DTYPES.get(name or "", name)


def first_line(error: Exception) -> str:
    """What an error says first; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def no_text(text: str) -> str | None:
    """Why no tokenizer takes a text: half of a surrogate pair, as JSON's escapes can write it; None if one does."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a surrogate, which is no character (character {error.start + 1})"
    return None
