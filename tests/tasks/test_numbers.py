"""The two scorers: tables of what each reads, and numbers formatted as the world writes them, read back."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layalign.tasks.numbers import (
    exact_answer,
    official_correct,
    official_number,
    strict_correct,
    strict_number,
)
from layalign.tasks.word_problems import SCORING

SEEDED = settings(deadline=None, derandomize=True)

STRICT = [
    # plain
    ("42", "42"),
    ("The answer is 42.", "42"),
    ("5 + 6 = 11. The answer is: 11", "11"),
    ("#### 18", "18"),
    ("\\boxed{18}", "18"),
    ("**18**", "18"),
    ("0", "0"),
    ("007", "7"),
    ("", None),
    ("I do not know.", None),
    ("...", None),
    ("½ or rather ten", "0.5"),
    # minus signs
    ("-5", "-5"),
    ("− 5", "5"),
    ("x = − 5", "-5"),
    ("Answer: - 5", "-5"),
    ("Options:\n- 5", "5"),
    ("\u22125", "-5"),
    ("-5", "-5"),
    ("–5 degrees", "-5"),
    ("10-15", "15"),
    ("10–15", "15"),
    ("3 - 8 = -5", "-5"),
    ("(-5)", "-5"),
    ("(3)-5", "5"),
    ("50%-5", "5"),
    ("the total--5", "5"),
    ("covid-19", "19"),
    ("उत्तर है-5", "5"),
    ("答案是-5", "-5"),
    ("คำตอบคือ-5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("-€1.234,5", "-1234.5"),
    ("-½", "-0.5"),
    # grouping and decimals
    ("1,234", "1234"),
    ("1,5", "1.5"),
    ("1,50", "1.50"),
    ("1,2345", "1.2345"),
    ("0,234", "0.234"),
    ("1234,567", "1234.567"),
    ("1.234", "1.234"),
    ("1,234,567", "1234567"),
    ("1.234.567", "1234567"),
    ("1,234.5", "1234.5"),
    ("1.234,5", "1234.5"),
    ("1,234,567.89", "1234567.89"),
    ("1.234.567,89", "1234567.89"),
    ("1,14,200", "114200"),
    ("1,00,00,000.5", "10000000.5"),
    ("1 234", "1234"),
    ("1\u00a0234", "1234"),
    ("1\u2009234\u2009567", "1234567"),
    ("1\u202f234,56", "1234.56"),
    ("1 234.56", "1234.56"),
    ("1'234.50", "1234.50"),
    ("1’234", "1234"),
    ("1{,}234", "1234"),
    ("12 34", "34"),
    ("0 234", "234"),
    ("5 1,234", "1234"),
    ("1 2 3", "3"),
    ("1, 2, 3", "3"),
    ("1,2,3", "3"),
    ("12.05.2024", "2024"),
    ("1,234.567,8", "8"),
    ("1.234 567", "567"),
    ("5'10", "10"),
    (".5", "0.5"),
    ("costs $.50", "0.50"),
    ("the end.5", "5"),
    ("42,", "42"),
    ("1.5e3", "1500"),
    ("2E-1", "0.2"),
    ("5east", "5"),
    # the text's own decimal mark
    ("3,5 kg zu 2 Euro sind 7. Zusammen 1.234", "1234"),
    ("1.234.567 minus 1.000.000 ergibt 234.567", "234567"),
    ("12,75 und 1,234", "1.234"),
    ("3,5 and 2.5 make 1.234", "1.234"),
    ("1,234.5 and 1,234", "1234"),
    # fractions, per cent, currency
    ("3/4", "0.75"),
    ("3 1/2", "3.5"),
    ("3½", "3.5"),
    ("½", "0.5"),
    ("1\u20442", "0.5"),
    ("-3 1/2", "-3.5"),
    ("5 7/4", "1.75"),
    ("3\\frac{1}{4}", "3.25"),
    ("-\\dfrac{1}{4}", "-0.25"),
    ("1.5 1/2", "0.5"),
    ("5/0", None),
    ("12/05/2024", "2024"),
    ("50%", "50"),
    ("12.5 %", "12.5"),
    ("$1,234.50", "1234.50"),
    ("5 €", "5"),
    ("₹1,14,200", "114200"),
    ("Ksh500", "500"),
    ("5kg", "5"),
    ("3 m²", "3"),
    # other digits
    ("উত্তর ৪২।", "42"),
    ("১,১৪,২০০", "114200"),
    ("ข้อ ๑๒", "12"),
    ("٤٢", "42"),
    ("١٬٢٣٤٫٥", "1234.5"),
    ("\u061c-٤٢", "-42"),
    ("४२", "42"),
    ("౪౨", "42"),
    ("答案是１，２３４。", "1234"),
    ("５，６", "6"),
    ("３．５", "3.5"),
    ("－５", "-5"),
    ("４２％", "42"),
]

OFFICIAL = [
    ("The answer is: 11.", 11.0),
    ("-5", 5.0),
    ("1,234", 1234.0),
    ("1,5", 15.0),
    ("1,2,3", 3.0),
    ("1.234,5", 1.2345),
    ("1 234", 234.0),
    ("3/4", 4.0),
    ("১২", 12.0),
    ("", 0.0),
    ("no idea", 0.0),
    ("3.", 3.0),
    (".5", 5.0),
]

# text, reference answer, official verdict, strict verdict
VERDICTS = [
    ("The answer is 18.", 18, True, True),
    ("The answer is -18.", 18, True, False),
    ("The answer is 18.", -18, True, False),
    ("The answer is −18.", -18, True, True),
    ("I cannot tell.", 0, True, False),
    ("", 0, True, False),
    ("I cannot tell.", 7, False, False),
    ("1 234", 1234, False, True),
    ("1.234.567", 1234567, False, True),
    ("1,5", 1.5, False, True),
    ("1,5", 15, True, False),
    ("3/4", 4, True, False),
    ("3/4", 0.75, False, True),
    ("18.0004", 18, True, False),
    ("18.000", 18, True, True),
    ("0.333", "0.3333", True, True),
    ("0.33", "0.3333", False, False),
    ("1/3", 0.3333, False, True),
    ("2125", "2,125", True, True),
    ("9007199254740993", 9007199254740992, True, False),
]


@pytest.mark.parametrize(("text", "number"), STRICT)
def test_strict_number(text, number):
    assert strict_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(("text", "number"), OFFICIAL)
def test_official_number(text, number):
    assert official_number(text) == number


@pytest.mark.parametrize(("text", "answer", "official", "strict"), VERDICTS)
def test_verdicts(text, answer, official, strict):
    assert official_correct(text, answer) is official
    assert strict_correct(text, answer) is strict


def test_a_run_of_digits_that_no_float_holds_is_no_reading():
    """JSON has no infinity."""
    fields = SCORING.fields("so it is " + "9" * 400, 9)
    assert fields["official_number"] is None and not fields["official"] and not fields["strict"]


def test_english_words_that_spanish_has_too_change_no_point():
    assert strict_number("Let y be the price for her son. The answer is 1.125") == Decimal("1.125")
    assert strict_number("El precio es 1.125") == 1125


@pytest.mark.parametrize(
    "answer", [None, True, "", "none", "12 34", "5/0", "5 apples", float("nan"), float("inf"), [5]]
)
def test_an_answer_that_is_no_number_is_refused(answer):
    with pytest.raises(ValueError, match="answer: got"):
        exact_answer(answer)


@pytest.mark.parametrize(
    ("answer", "number"),
    [(8, "8"), (8.0, "8"), (0.1, "0.1"), ("8.0", "8"), ("2,125", "2125"), (" -7 ", "-7"), ("3/4", "0.75")],
)
def test_reference_answers(answer, number):
    assert exact_answer(answer) == Decimal(number)


def grouped(digits, separator, indian=False):
    """`digits` with `separator` between groups of three, or the last three and then twos."""
    head, groups = digits, []
    size = 3
    while len(head) > size:
        head, group = head[:-size], head[-size:]
        groups.insert(0, group)
        size = 2 if indian else 3
    return separator.join([head, *groups])


def shifted(text, zero):
    """`text` with its ASCII digits replaced by the ten digits that start at `zero`."""
    return "".join(chr(ord(zero) + int(letter)) if letter.isdigit() else letter for letter in text)


# Group separator, decimal mark, and the digit zero where it is not ASCII's.
LOCALES = {
    **{"english": ",.", "swiss": "’.", "ungrouped": ("", ".")},
    **{"german": ".,", "french": "\u202f,", "russian": "\u00a0,"},
    **{"bengali": ",.০", "hindi": ",.०", "telugu": ",.౦", "thai": ",.๐"},
    **{"arabic": "\u066c\u066b٠", "full-width": "，．０"},
}
INDIAN_GROUPS = ("bengali", "hindi", "telugu")


@SEEDED
@pytest.mark.parametrize("locale", LOCALES)
@given(
    whole=st.integers(0, 10**12),
    decimals=st.sampled_from(["", "5", "25", "07"]),
    sign=st.sampled_from(["", "-", "−"]),
    frame=st.sampled_from(["{}", "The answer is {}.", "x = {}", "Total ({})", "${}", "{} %", "1 + 1 = 2\n{}"]),
)
def test_a_number_written_in_a_locale_is_read_back(locale, whole, decimals, sign, frame):
    separator, mark, zero = (*LOCALES[locale], "0")[:3]
    if locale == "german" and not decimals and 1000 <= whole < 10**6:
        decimals = "5"  # 1.234 alone is a decimal by the documented rule
    written = grouped(str(whole), separator, locale in INDIAN_GROUPS) + (mark + decimals if decimals else "")
    expected = Decimal(f"{whole}.{decimals or 0}")
    assert strict_number(frame.format(sign + shifted(written, zero))) == (-expected if sign else expected)


@SEEDED
@given(numerator=st.integers(0, 10**6), denominator=st.integers(1, 10**6), sign=st.sampled_from(["", "-"]))
def test_a_fraction_is_its_value(numerator, denominator, sign):
    value = strict_number(f"It is {sign}{numerator}/{denominator}.")
    error = abs(Fraction(value) - Fraction(numerator, denominator) * (-1 if sign else 1))
    assert error < Fraction(1, 10**30)


@SEEDED
@given(st.text(alphabet=st.sampled_from("0123456789.,' -−/½eE%$()=:x答১٣\u00a0\u066b\n"), max_size=40))
def test_any_text_is_read_without_an_error_and_wrapping_it_changes_nothing(text):
    number = strict_number(text)
    assert number is None or number.is_finite()
    assert strict_number(text + " apples.") == number
    assert isinstance(official_number(text), float)
    assert strict_correct(text, 7) == (number == 7)


def test_a_very_long_number_and_an_unusual_digit_are_fine():
    assert strict_number("9" * 5000) == Decimal("9" * 5000)
    assert strict_number("-" + "9" * 50) == Decimal("-" + "9" * 50)
    assert not official_correct("9" * 5000, 7)
    assert strict_number("1/" + "3" * 5000) > 0
