"""Two ways to read a number out of an answer: as the published experiments did, and correctly.

Both take the last number of the text. The published reader is kept because the paper's figures depend on it; its quirks
are: minus signs are dropped (in predictions and answers alike), a comma between two digits vanishes whatever it meant,
no number counts as 0, so silence is right whenever the answer is 0, and answers within 1e-3 of each other are equal.

The strict reader follows these rules where a text is ambiguous:

- `1,234` (a comma and exactly three digits after one to three) is grouping; `1,5`, `0,234` and `1234,567` are decimals.
- `1.234` is a decimal. Where other numbers of the same text show that its decimal mark is the comma (`3,5`,
  `1.234.567`) and none shows a point, both turn round: `1.234` is grouping and `1,234` a decimal.
- Two kinds of mark: the last one is the decimal mark (`1.234,5`, `1,234.5`). Commas may group as in India (`1,14,200`).
- Spaces (plain, no-break, thin) and apostrophes group only in a complete pattern: `1 234` is 1234, `12 34` is 34.
- What fits no pattern is a list or a date and its last part counts: `1,2,3` is 3, `12.05.2024` is 2024.
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

TOLERANCE = Decimal("0.001")
_ARITHMETIC = Context(prec=50)

_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_OFFICIAL = re.compile(r"\d+(?:\.\d+)?")

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
        **dict.fromkeys("\u2019\u066c\uff0c", "'"),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        **dict.fromkeys("\u066b\uff0e", "."),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u061c\u2060\u2066\u2067\u2068\u2069\ufeff"),
        "\uff1d": "=",
        "\uff1a": ":",
    }
)
_LATEX_FRACTION = re.compile(r"(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_NOT_ASCII_DIGIT = re.compile(r"[^\W\D0-9]")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_NUMBER = re.compile(
    r"(?<![\d/])(?<!\d[.,'])(?:(?P<whole>\d+)\ )?(?P<numerator>\d+)/(?P<denominator>\d+)(?![\d/]|[.,]\d)"
    r"|(?:(?P<point>(?<![\w.])\.\d+)|(?P<body>\d+(?:[.,'\ ]\d+)*))"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})(?![\dA-Za-z]))?(?!\d|/\d)"
)
_GROUPS = re.compile(r"[1-9]\d{0,2}(?:([.,' ])\d{3})(?:\1\d{3})*")
_INDIAN_GROUPS = re.compile(r"[1-9]\d?(?:,\d{2})+,\d{3}")
_UNSPACED_SCRIPTS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def official_number(text: str) -> float:
    """The last number of `text` as a float, read as the published scorer reads it; 0.0 where there is none."""
    joined = _COMMA_BETWEEN_DIGITS.sub(lambda pair: pair[0].replace(",", ""), text)
    numbers = _OFFICIAL.findall(joined)
    return float(numbers[-1]) if numbers else 0.0


def strict_number(text: str) -> Decimal | None:
    """The last number of `text` as a Decimal, by the module's rules; None where there is none."""
    text = _plain(text)
    matches = list(_NUMBER.finditer(text))
    comma_is_decimal = _comma_is_decimal(match["body"] for match in matches)
    for match in reversed(matches):
        value = _value(match, comma_is_decimal)
        if value is not None:
            return value.copy_negate() if _is_negative(text, match.start()) else value
    return None


def exact_answer(value: Any) -> Decimal:
    """A reference answer (int, float, Decimal, or a str that is one number and nothing else) as a finite Decimal.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        text = _plain(value.strip())
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


def _plain(text: str) -> str:
    """`text` with ASCII digits, one kind of minus, space and apostrophe, fractions as n/d, and no invisible marks."""
    text = text.translate(_PLAIN).replace("{,}", ",")
    text = _LATEX_FRACTION.sub(lambda found: f"{_after(found[1])}{found[2]}/{found[3]} ", text)
    text = _VULGAR.sub(lambda found: _after(found[1]) + _spelled(found[2]) + " ", text)
    return _NOT_ASCII_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


def _after(digit: str) -> str:
    """A whole number's last digit set apart from the fraction that follows; empty where there is none."""
    return digit and digit + " "


def _spelled(fraction: str) -> str:
    """One character such as ½ as `1/2`."""
    return unicodedata.normalize("NFKC", fraction).replace("\u2044", "/")


def _value(match: re.Match[str], comma_is_decimal: bool) -> Decimal | None:
    """The unsigned Decimal of one match of _NUMBER, None for a fraction over zero."""
    if match["numerator"]:
        numerator, denominator = Decimal(match["numerator"]), Decimal(match["denominator"])
        if not denominator:
            return None
        mixed = match["whole"] is not None and numerator < denominator
        quotient = _ARITHMETIC.divide(numerator, denominator)
        return _ARITHMETIC.add(Decimal(match["whole"]), quotient) if mixed else quotient
    body = match["point"] or match["body"]
    while (digits := _digits(body, comma_is_decimal)) is None:
        body = body.split(" ", 1)[1] if " " in body else re.split(r"[.,']", body)[-1]
    return Decimal(f"{digits}E{match['exponent'] or 0}")


def _digits(body: str, comma_is_decimal: bool = False) -> str | None:
    """`body` (digits with separators) in plain notation, or None where it is not one number."""
    marks = re.findall(r"[.,]", body)
    if len(marks) == 1 and not re.search(r"[' ]", body):
        grouped = _GROUPS.fullmatch(body) and (marks[0] == ",") != comma_is_decimal
        return body.replace(marks[0], "" if grouped else ".")
    whole, decimals = body, None
    if marks and marks.count(marks[-1]) == 1:
        whole, decimals = body.rsplit(marks[-1], 1)
    grouped = whole.isdigit() or _GROUPS.fullmatch(whole) or _INDIAN_GROUPS.fullmatch(whole)
    if not grouped or not (decimals is None or decimals.isdigit()):
        return None
    return re.sub(r"\D", "", whole) + (f".{decimals}" if decimals else "")


def _comma_is_decimal(bodies: Iterable[str | None]) -> bool:
    """Whether the unambiguous numbers among `bodies` show a decimal comma and none shows a decimal point."""
    shown = set()
    for body in filter(None, bodies):
        marks = re.findall(r"[.,]", body)
        if not marks or _digits(body) is None:
            continue
        if len(marks) > 1 and len(set(marks)) == 1:
            shown.add("," if marks[0] == "." else ".")
        elif len(marks) > 1 or not _GROUPS.fullmatch(body):
            shown.add(marks[-1])
    return shown == {","}


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
