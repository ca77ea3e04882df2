"""The strict scorer on answers checked by hand, in strict_numbers.jsonl: a text, the number that it states, and what is special
in it. The numbers were written down before the scorer saw the texts; the last ten are like places of GSM8K, MGSM and MSVAMP
that it had read otherwise.
"""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from layalign.languages import MATHEMATICS
from layalign.tasks.numbers import strict_number

LINES = (Path(__file__).parent / "strict_numbers.jsonl").read_text(encoding="utf-8").splitlines()
ANSWERS = [json.loads(line) for line in LINES]


def test_at_least_three_hundred_in_eleven_languages():
    languages = Counter(answer["lang"] for answer in ANSWERS)
    assert set(languages) == set(MATHEMATICS)
    assert min(languages.values()) >= 25
    assert len({(answer["lang"], answer["text"]) for answer in ANSWERS}) == len(ANSWERS) >= 300
    assert sum(answer["number"] is None for answer in ANSWERS) >= 33


@pytest.mark.parametrize(
    "answer", ANSWERS, ids=[f"{number}-{answer['lang']}-{answer['why']}" for number, answer in enumerate(ANSWERS, 1)]
)
def test_strict_number(answer):
    found = strict_number(answer["text"])
    if answer["number"] is None:
        assert found is None
    else:
        assert found is not None
        assert abs(Fraction(found) - Fraction(answer["number"])) < Fraction(1, 10**30)
