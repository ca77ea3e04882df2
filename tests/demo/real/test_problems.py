import itertools
import re

import pytest

from layalign.train.demo.problems import FURTHER, REAL
from layalign.train.demo.wording import wording

LANGUAGES = REAL.languages

CALCULATE = {"+": int.__add__, "-": int.__sub__}


def drawn(seed, split, count=1500):
    return list(itertools.islice(REAL.problems(seed, split), count))


def pair(problem):
    left, sign, right, _ = problem.steps[0]
    return (sign, *sorted((left, right))) if sign == "+" else (sign, left, right)


@pytest.mark.parametrize("split", ["held_out", "new_wording"])
def test_evaluation_shares_no_numbers_and_no_wording_with_training(split):
    seen, unseen = drawn("task 0", "training", 6000), drawn("evaluation 0", split)
    assert not {pair(problem) for problem in seen} & {pair(problem) for problem in unseen}
    assert not {(p.kind, p.clauses) for p in seen} & {(p.kind, p.clauses) for p in unseen}
    assert not {p.text("en") for p in seen} & {p.text("en") for p in unseen}
    for problems in (seen, unseen):
        assert {problem.kind for problem in problems} == set(REAL.kinds)
        assert all(0 < problem.number <= 40 and max(problem.numbers) <= 20 for problem in problems)


def test_new_wording_is_of_patterns_that_training_never_has():
    assert not any(REAL.new in problem.clauses for problem in drawn(0, "training", 3000))
    assert all(set(problem.clauses) == {REAL.new} for problem in drawn(0, "new_wording", 50))


def test_held_out_patterns_are_each_known_from_training():
    seen = drawn(0, "training", 3000)
    for place in range(3):
        assert {(p.kind, p.clauses[place]) for p in seen} == {
            (kind, clause) for kind in REAL.kinds for clause in range(REAL.new)
        }


def test_records_hold_every_language_and_the_right_answer():
    records = REAL.task_records(200, 1)
    assert {record["lang"] for record in records} == set(LANGUAGES) and len(LANGUAGES) == 10
    for record in records:
        left, sign, right, equals, result = record["target"].split()
        assert equals == "=" and int(result) == CALCULATE[sign](int(left), int(right))
    for record in REAL.translation_records(20, 1):
        assert (record["source"] == record["target"]) == (record["lang"] == "en")


@pytest.mark.parametrize("make", [REAL.task_records, REAL.translation_records])
def test_no_language_tells_the_sign(make):
    """With kinds and languages both in turn, a language had one sign alone, and nothing was learned of the question."""
    records, seen = make(4000, 1), {}
    problems = itertools.islice(REAL.problems(f"{make.__name__.split('_')[0]} 1"), len(records))
    for record, problem in zip(records, problems, strict=True):
        seen.setdefault(record["lang"], []).append(problem.steps[0][1] == "-")
    assert set(seen) == set(LANGUAGES)
    for language, signs in seen.items():
        assert len(signs) == 400 and 0.4 < sum(signs) / len(signs) < 0.6, language


def test_a_problem_is_the_same_in_every_language():
    rows = REAL.evaluation_problems(20, 0)
    for index in range(20):
        same = [row for row in rows if row["index"] == index]
        assert [row["lang"] for row in same] == list(LANGUAGES)
        digits = {tuple(re.findall(r"\d+", row["question"])) for row in same}
        assert len(digits) == 1
        assert len({(row["text"], row["answer"], row["worked_answer"]) for row in same}) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_wordings_are_complete(language):
    english, words = wording("en"), wording(language)
    for part in ("openings", "gains", "losses", "questions"):
        assert len(getattr(words, part)) == len(set(getattr(words, part))) == FURTHER.patterns
    assert len(words.names) == len(english.names) and len(words.nouns) == len(english.nouns)
    problems = drawn(3, "training", 300) + list(itertools.islice(FURTHER.problems(3), 600))
    texts = [problem.text(language) for problem in problems]
    assert not any(re.search(r"[{}\x02-\x04]|  ", text) for text in texts)
    if language == "en":
        assert all(text.isascii() for text in texts)


@pytest.mark.parametrize(
    ("language", "noun", "number", "expected"),
    [
        ("ru", 10, 2, "У Аши две книги."),
        ("ru", 10, 5, "У Аши пять книг."),
        ("ru", 1, 2, "У Аши два карандаша."),
        ("sw", 10, 12, "Asha ana vitabu kumi na viwili."),
        ("sw", 0, 12, "Asha ana kalamu kumi na mbili."),
        ("sw", 11, 4, "Asha ana madaftari manne."),
        ("zh", 10, 2, "阿莎有两本书。"),
        ("zh", 10, 12, "阿莎有十二本书。"),
        ("ja", 10, 3, "アーシャは本を三冊持っています。"),
    ],
)
def test_numerals_agree(language, noun, number, expected):
    words = wording(language)
    assert words.clause(words.openings[0], (0, noun, 0), (number,)) == expected
    assert str(number) in words.clause(words.openings[0], (0, noun, 0), (number,), digits=True)
