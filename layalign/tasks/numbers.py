"""Two ways to read a number out of an answer: as the published experiments did, and correctly.

Both take the last number of the text. The published reader is kept because the paper's figures depend on it; its quirks
are: minus signs are dropped (in predictions and answers alike), a comma between two digits vanishes whatever it meant,
no number counts as 0, so silence is right whenever the answer is 0, and answers within 1e-3 of each other are equal.

The strict reader follows these rules where a text is ambiguous:

- `1,234` (a comma and exactly three digits after one to three) is grouping; `1,5`, `0,234` and `1234,567` are decimals.
- `1.234` is a decimal. Where other numbers of the same text show that its decimal mark is the comma (`3,5`,
  `1.234.567`) and none shows a point, both turn round: `1.234` is grouping and `1,234` a decimal. Where none shows either
  and the text is German or Spanish by its words, both are grouping.
- Two kinds of mark: the last one is the decimal mark (`1.234,5`, `1,234.5`). Commas may group as in India (`1,14,200`).
- Spaces (plain, no-break, thin) and apostrophes group only in a complete pattern: `1 234` is 1234, `12 34` is 34.
- What fits no pattern is a list or a date and its last part counts: `1,2,3` is 3, `12.05.2024` is 2024.
- Digits of all scripts, fractions as they are said in Chinese and Japanese, `3万5千`, units with powers and words for a
  minus: as in `layalign.tasks.written_numbers`.
- A dash is a minus only if it touches the number (or its currency sign) and not a digit, a closing bracket or a word of
  a script that writes spaces: `10-15` is 15, `答案是-5` is -5. With a space it needs `=` or `:` before it.
- `3/4`, `3 1/2`, `½` are fractions; `x/0` is no number. Percent and currency signs are left out: `50%` is 50.

Nothing else is computed: `10^3` ends in 3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Context, Decimal
from typing import Any

from layalign.tasks.written_numbers import plain

TOLERANCE = Decimal("0.001")
_ARITHMETIC = Context(prec=50)

_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_OFFICIAL = re.compile(r"\d+(?:\.\d+)?")

_NUMBER = re.compile(
    r"(?<![\d/])(?<!\d[.,'])(?:(?P<whole>\d+)\ )?(?P<numerator>\d+)/(?P<denominator>\d+)(?![\d/]|[.,]\d)"
    r"|(?:(?P<point>(?<![\w.\u0900-\u0dff\u0e00-\u0e7f])\.\d+)|(?P<body>\d+(?:[.,'\ ]\d+)*))"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})(?![\dA-Za-z]))?(?!\d|/\d)"
)
_GROUPS = re.compile(r"[1-9]\d{0,2}(?:([.,' ])\d{3})(?:\1\d{3})*")
_INDIAN_GROUPS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}")
# Common words of German and of Spanish, where a point groups; two of a language tell it, as English has "die" and "con". Neither "son"
# nor "y", which English problems have together.
_POINT_GROUPS = (
    re.compile(r"\b(?:der|die|das|und|ist|sind|eine?n?|er|sie|nicht|mit|für|beträgt|kostet|insgesamt|zahlt|antwort)\b"),
    re.compile(r"\b(?:el|los|las|es|una|por|del|hay|cuesta|tiene|respuesta|con|se)\b"),
)
_UNSPACED_SCRIPTS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def official_number(text: str) -> float:
    """The last number of `text` as a float, read as the published scorer reads it; 0.0 where there is none."""
    joined = _COMMA_BETWEEN_DIGITS.sub(lambda pair: pair[0].replace(",", ""), text)
    numbers = _OFFICIAL.findall(joined)
    return float(numbers[-1]) if numbers else 0.0


def strict_number(text: str) -> Decimal | None:
    """The last number of `text` as a Decimal, by the module's rules; None where there is none."""
    text = plain(text)
    matches = list(_NUMBER.finditer(text))
    grouping = _grouping(text, (match["body"] for match in matches))
    for match in reversed(matches):
        value = _value(match, grouping)
        if value is not None:
            return value.copy_negate() if _is_negative(text, match.start()) else value
    return None


def exact_answer(value: Any) -> Decimal:
    """A reference answer (int, float, Decimal, or a str that is one number and nothing else) as a finite Decimal.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        text = plain(value.strip())
        match = _NUMBER.fullmatch(text.removeprefix("-").removeprefix("+"))
        number = strict_number(text) if match and (not match["body"] or _digits(match["body"])) else None
    elif isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        number = Decimal(str(value))
    else:
        number = None
    if number is None or not number.is_finite():
        raise ValueError(f"answer: got {value!r}, takes one finite number")
    return number


def official_correct(prediction: str, answer: Any) -> bool:
    """Whether the published scorer counts `prediction` as `answer` (a number or a str that is one)."""
    reference = official_number(format(exact_answer(answer), "f"))
    return abs(official_number(prediction) - reference) < float(TOLERANCE)


def strict_correct(prediction: str, answer: Any) -> bool:
    """Whether the last number of `prediction` is `answer`: exactly if that is an integer, else within 1e-3."""
    number, reference = strict_number(prediction), exact_answer(answer)
    if number is None:
        return False
    if reference == reference.to_integral_value():
        return number == reference
    return _ARITHMETIC.subtract(number, reference).copy_abs() <= TOLERANCE


def _value(match: re.Match[str], grouping: str) -> Decimal | None:
    """The unsigned Decimal of one match of _NUMBER, None for a fraction over zero."""
    if match["numerator"]:
        numerator, denominator = Decimal(match["numerator"]), Decimal(match["denominator"])
        if not denominator:
            return None
        mixed = match["whole"] is not None and numerator < denominator
        quotient = _ARITHMETIC.divide(numerator, denominator)
        return _ARITHMETIC.add(Decimal(match["whole"]), quotient) if mixed else quotient
    body = match["point"] or match["body"]
    while (digits := _digits(body, grouping)) is None:
        body = body.split(" ", 1)[1] if " " in body else re.split(r"[.,']", body)[-1]
    return Decimal(f"{digits}E{match['exponent'] or 0}")


def _digits(body: str, grouping: str = ",") -> str | None:
    """`body` (digits with separators) in plain notation, or None where it is not one number; a mark of `grouping` groups
    where it could do either.
    """
    marks = re.findall(r"[.,]", body)
    if len(marks) == 1 and not re.search(r"[' ]", body):
        groups = bool(_GROUPS.fullmatch(body)) and marks[0] in grouping
        return body.replace(marks[0], "" if groups else ".")
    whole, decimals = body, None
    if marks and marks.count(marks[-1]) == 1:
        whole, decimals = body.rsplit(marks[-1], 1)
    grouped = whole.isdigit() or _GROUPS.fullmatch(whole) or _INDIAN_GROUPS.fullmatch(whole)
    if not grouped or not (decimals is None or decimals.isdigit()):
        return None
    return re.sub(r"\D", "", whole) + (f".{decimals}" if decimals else "")


def _grouping(text: str, bodies: Iterable[str | None]) -> str:
    """The marks that group in `1,234` and `1.234`: as the unambiguous numbers among `bodies` show, else as words do."""
    shown = set()
    for body in filter(None, bodies):
        marks = re.findall(r"[.,]", body)
        if not marks or _digits(body) is None:
            continue
        if len(marks) > 1 and len(set(marks)) == 1:
            shown.add("," if marks[0] == "." else ".")
        elif len(marks) > 1 or not _GROUPS.fullmatch(body):
            shown.add(marks[-1])
    if shown == {","}:
        return "."
    by_words = not shown and any(len(set(common.findall(text.lower()))) > 1 for common in _POINT_GROUPS)
    return ",." if by_words else ","


def _is_negative(text: str, start: int) -> bool:
    """Whether the number at `start` has a minus sign of its own; `text` is plain."""
    before = text[:start]
    while before and unicodedata.category(before[-1]) == "Sc":
        before = before[:-1]
    if before.endswith("- "):
        return before[:-2].rstrip(" ").endswith(("=", ":"))
    if not before.endswith("-"):
        return False
    previous = before[-2:-1]
    if previous in (")", "]", "}", "%", "-"):
        return False
    in_word = previous and unicodedata.category(previous)[0] in "LMN"
    return not in_word or bool(_UNSPACED_SCRIPTS.match(previous))
