"""Word problems, whose answer is one number: how a row is read and an answer scored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from layalign.tasks.numbers import exact_answer, official_correct, official_number, strict_correct, strict_number
from layalign.tasks.reading import field, text
from layalign.tasks.task import Verdicts


def _official_reading(prediction: str) -> float | None:
    """None for a run of digits that no float holds, as a model repeats itself: JSON has no infinity."""
    number = official_number(prediction)
    return number if math.isfinite(number) else None


def _strict_reading(prediction: str) -> str | None:
    number = strict_number(prediction)
    return None if number is None else str(number)


SCORING = Verdicts(
    scorers={"official": official_correct, "strict": strict_correct},
    readings={"official_number": _official_reading, "strict_number": _strict_reading},
)


def word_problem(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """{"question", "answer"} of a row as MGSM, MSVAMP and their copies name its fields; ValueError with its place."""
    question = field(place, row, ("m_query", "question"))
    answer = field(place, row, ("answer_number", "response", "answer"))
    return {"question": text(place, "question", question), "answer": number(place, answer)}


def number(place: str, answer: Any) -> int | float:
    """A reference answer, int where it is whole; ValueError with its place for anything but one finite number."""
    try:
        found = exact_answer(answer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return int(found) if found == found.to_integral_value() else float(found)
