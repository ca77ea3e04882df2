"""Numbers as the world writes them, brought to one spelling before they are read.

Native and full-width digits become ASCII, and so do dashes, spaces and apostrophes of all kinds. Fractions become `n/d`:
one character, LaTeX's, `4分之3` and `4分の3`. `3万5千`, `1億2千万`, `1万2,000` are multiplied out. The power of a unit (`25 m2`,
`cm^3`) goes. A word for a sign (negative, マイナス, 负, ...) becomes one, and so does one for a minus (minus, moins, ...) behind
a word such as "is" or before degrees; anywhere else it takes something off.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from math import prod

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
_LATEX_FRACTION = re.compile(r"(\d?)\\[dt]?frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_NOT_ASCII_DIGIT = re.compile(r"[^\W\D0-9]")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_SAID_FRACTION = re.compile("(?:(\\d+)[と又])?(\\d+)分[之の](\\d+)")

_UNIT = r"(?:[kcdm]?m|in|ft|yd|mi|[кдс]?м|мм)"
_UNIT_DIGIT = re.compile(rf"(\d ?{_UNIT})[23](?![0-9A-Za-z\u0400-\u04ff]|[.,]\d)")
_UNIT_POWER = re.compile(rf"((?<![^\W\d_]){_UNIT}\}}?)\^\{{?[23]\}}?(?!\d)")

_PART = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
# 千 stands before metric units for kilo: 5千克 are five of them.
_SCALE = "(?:[億亿万萬]|千(?![克米瓦卡赫字帕兆焦伏吨分])|百(?!分))"
# Behind the last scale what is left over. Digits that are no such rest (4万55555) leave all as it is written.
_SCALED = re.compile(rf"(?<![\d.,/])(?:{_PART}{_SCALE}+)+(?:(?:\d{{1,4}}|\d,\d{{3}})(?:\.\d+)?)?(?!\d|[.,/]\d)")
_SCALED_PART = re.compile(rf"({_PART})([億亿万萬千百]*)")
_HUNDREDS, _MYRIADS = {"千": 1000, "百": 100}, {"億": 10**8, "亿": 10**8, "万": 10**4, "萬": 10**4}

_MINUS_WORD = re.compile(
    r"(?<!\w)(?:(?P<sign>negative|hasi)|minus|moins|menos|минус|মাইনাস|మైనస్) +(?=\W?\d)"
    r"|(?:(?P<mark>マイナス|[负負]の?)|ลบ ?)(?=\W?\d)",
    re.IGNORECASE,
)
# What stands before a minus that is no operation, and behind its number.
_IS = re.compile(
    r"(?:^|[=≈:(\n]|(?<!\w)(?:is|was|are|be|equals|gives|of|ist|sind|war|beträgt|ergibt|gleich|est|sont|fait|es|son|era|равно"
    r"|составляет|হল|হলো|হয়|కాబట్టి)|คือ|เป็น|เท่ากับ) *$",
    re.IGNORECASE,
)
_DEGREES = re.compile(r"\W?\d[\d.,]* ?(?:°|℃|degree|grad|degré|градус|องศา|ডিগ্রি|డిగ్రీ|nyuzi|digrii)", re.IGNORECASE)


def plain(text: str) -> str:
    """`text` with every number in ASCII digits, one kind of minus, space and apostrophe, fractions as n/d, and no
    invisible marks.
    """
    text = text.translate(_PLAIN).replace("{,}", ",")
    text = _NOT_ASCII_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = _LATEX_FRACTION.sub(lambda found: f"{_after(found[1])}{found[2] or found[3]}/{found[4] or found[5]} ", text)
    text = _VULGAR.sub(lambda found: _after(found[1]) + _spelled(found[2]) + " ", text)
    text = _SAID_FRACTION.sub(lambda found: f"{_after(found[1])}{found[3]}/{found[2]} ", text)
    text = _UNIT_POWER.sub(r"\1", _UNIT_DIGIT.sub(r"\1", text))
    return _MINUS_WORD.sub(_sign, _SCALED.sub(_multiplied, text))


def _after(whole: str | None) -> str:
    """A whole number set apart from the fraction that follows; empty where there is none."""
    return f"{whole} " if whole else ""


def _spelled(fraction: str) -> str:
    """One character such as ½ as `1/2`."""
    return unicodedata.normalize("NFKC", fraction).replace("\u2044", "/")


def _multiplied(found: re.Match[str]) -> str:
    """`3千2百万` is (3000 + 200) myriads: 千 and 百 count below the next 万 or 億, and a greater one multiplies all before it."""
    total = section = Decimal(0)
    last = 0
    for number, scales in _SCALED_PART.findall(found[0]):
        value = Decimal(number.replace(",", "")) * prod(_HUNDREDS.get(scale, 1) for scale in scales)
        myriads = prod(_MYRIADS.get(scale, 1) for scale in scales)
        section += value
        if myriads > 1:
            total = (total + section) * myriads if myriads > last else total + section * myriads
            section, last = Decimal(0), myriads
    total += section
    return format(total.to_integral_value() if total == total.to_integral_value() else total, "f")


def _sign(found: re.Match[str]) -> str:
    before, after = found.string[: found.start()], found.string[found.end() :]
    if re.search(r"[\d)\]}%] *$", before):
        return found[0]
    signs = found["sign"] or found["mark"] or _IS.search(before) or _DEGREES.match(after)
    return "-" if signs else found[0]
