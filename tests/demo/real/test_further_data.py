"""What the second experiment generates to train on and to ask."""

import itertools
import re
import statistics
from collections import Counter

import pytest

from layalign.train.demo.problems import FURTHER, HELD_OUT, NEW_WORDING, REAL, TWO_STEPS, place_by_place
from layalign.train.demo.real import further_data
from layalign.train.demo.real.persons import person_problems
from layalign.train.demo.real.schoolbook import schoolbook_problems
from layalign.train.demo.real.stories import STORIES, story_problems
from layalign.train.demo.real.translated_stories import stories_in, translated_stories
from layalign.train.demo.wording import spell, wording


def test_further_problems_keep_from_training_what_the_first_ones_do():
    seen = list(itertools.islice(FURTHER.problems(0), 300))
    assert {len(problem.steps) for problem in seen} == {1, 2}
    numbers = [number for problem in seen for step in problem.steps for number in (step[0], step[2], step[3])]
    assert min(numbers) > 0 and 90 < max(numbers) <= 100
    for problem in seen:
        assert not any(REAL.pair_held_out(*pair) for pair in problem.pairs)
        assert REAL.new not in problem.clauses
        assert len(problem.digits) == len(problem.kind)
    for split in (HELD_OUT, NEW_WORDING):
        for problem in itertools.islice(TWO_STEPS.problems(0, split), 50):
            assert len(problem.steps) == 2 and all(REAL.pair_held_out(*pair) for pair in problem.pairs)
    # One-step problems of both kinds are of the same split in either source.
    ones = [problem for problem in itertools.islice(REAL.problems(0, HELD_OUT), 50)]
    assert all(FURTHER.split_of(problem) == HELD_OUT for problem in ones)
    for problem in seen[:50]:
        steps = worked(FURTHER.worked_answer(problem))
        assert [step[:3] for step in steps] == [step[:3] for step in problem.steps] and steps[-1][3] == problem.number


def worked(answer):
    """(left, sign, right, result) of every step of an answer; its sides are worth the same, and none is kept from training."""
    steps = []
    for step in answer.split(", "):
        *sides, result = step.split(" = ")
        pairs = [(int(left), sign, int(right)) for left, sign, right in (side.split() for side in sides)]
        assert {eval(side) for side in sides} == {int(result)}
        assert not any(REAL.pair_held_out(*pair) for pair in pairs if pair[1] in "+-")
        steps.append((*pairs[0], int(result)))
    return steps


@pytest.mark.parametrize(
    ("step", "written"),
    [
        ((47, "+", 14, 61), "47 + 14 = 57 + 4 = 61"),
        ((89, "-", 81, 8), "89 - 81 = 9 - 1 = 8"),
        ((9, "+", 5, 14), "9 + 5 = 14"),
        ((90, "-", 40, 50), "90 - 40 = 50"),
        ((340, "+", 125, 465), "340 + 125 = 440 + 25 = 460 + 5 = 465"),
        ((150, "-", 105, 45), "150 - 105 = 50 - 5 = 45"),
        ((48, "/", 12, 4), "48 / 12 = 4"),
    ],
)
def test_sums_are_worked_place_by_place(step, written):
    assert place_by_place(*step) == written


@pytest.mark.parametrize(
    ("count", "expected"),
    [(4, "4 ручки"), (12, "12 ручек"), (14, "14 ручек"), (20, "20 ручек"), (22, "22 ручки"), (99, "99 ручек")],
)
def test_russian_nouns_follow_the_last_digit(count, expected):
    russian = wording("ru")
    assert expected in russian.clause(russian.openings[0], (0, 0, 0), (count,), digits=True)


def test_russian_numerals_agree_with_their_last_word():
    russian = wording("ru")
    assert "двадцать две ручки" in russian.clause(russian.openings[0], (0, 0, 0), (22,))
    assert "двадцать два карандаша" in russian.clause(russian.openings[0], (0, 1, 0), (22,))
    found = (number for problem in itertools.islice(FURTHER.problems(1), 400) for number in problem.numbers)
    assert not any(number > 20 and number % 10 == 1 for number in found)


def test_bare_sums_are_in_digits_and_in_words_of_every_language():
    rows = further_data.bare_sums(400, 0)
    spelt = {language: {spell(n, language): n for n in range(1, 101)} for language in FURTHER.languages}
    digits = 0
    for row in rows:
        first, *rest = re.split(r" ([+-]) ", row["source"])
        told = [spelt[row["lang"]].get(number) or int(number) for number in (first, *rest[1::2])]
        digits += sum(number.isdigit() for number in (first, *rest[1::2]))
        value = told[0]
        for sign, number, step in zip(rest[::2], told[1:], worked(row["target"]), strict=True):
            assert step[:3] == (value, sign, number)
            value = step[-1]
    assert {row["lang"] for row in rows if not any(map(str.isdigit, row["source"]))} == set(FURTHER.languages)
    assert 200 < digits < 350 and sum("," in row["target"] for row in rows) > 200
    assert statistics.median(step[-1] for row in rows for step in worked(row["target"])) < 40


def test_schoolbook_problems_are_what_their_equations_say():
    rows = list(schoolbook_problems(600, 0))
    assert rows == list(schoolbook_problems(600, 0)) and len({row["source"] for row in rows}) > 590
    signs = set()
    for row in rows:
        ((left, sign, right, _),) = worked(row["target"])
        numbers = [int(number) for number in re.findall(r"\d+", row["source"])]
        assert {left, right} <= set(numbers) and len(numbers) in (2, 3) and max(numbers) <= 144, row
        assert row["source"].endswith("?") and "{" not in row["source"]
        signs.add(sign)
    assert signs == set("+-*/")


def test_stories_hold_more_numbers_than_their_questions_need():
    rows = list(story_problems(1200, 0))
    assert rows == list(story_problems(1200, 0)) and len({row["source"] for row in rows}) > 1190
    signs, counts, styles = set(), Counter(), Counter()
    for row in rows:
        ((left, sign, right, _),) = worked(row["target"])
        numbers = [int(number) for number in re.findall(r"\d+", row["source"])]
        assert {left, right} <= set(numbers) and max(left, right) <= 144 and not re.search(r"[{}]", row["source"]), row
        signs.add(sign)
        counts[len(numbers)] += 1
        styles[row["source"].endswith(" ?")] += 1
    assert signs == set("+-*/") and set(counts) == {2, 3, 4} and counts[2] < 200 and min(styles.values()) > 500
    places = [place for place, _ in enumerate(STORIES)]
    asked = {
        place: {row["target"].split(" = ")[0].split()[1] for row in rows[place :: len(STORIES)]} for place in places
    }
    assert asked == {place: {question.split()[1] for question in STORIES[place][1].values()} for place in places}
    # The same story, more than one question.
    assert sum(len(questions) > 1 for _, questions in STORIES) > 30


def test_translated_stories_are_the_same_in_every_language():
    english = stories_in("en")
    for language in FURTHER.languages:
        found = stories_in(language)
        assert len(found) == len(english) > 40
        for ours, theirs in zip(found, english, strict=True):
            assert list(ours["asked"]) == list(theirs["asked"])
            slots = [
                [sorted(re.findall(r"{(\w)}", text)) for text in (story["told"], *story["asked"].values())]
                for story in (ours, theirs)
            ]
            assert slots[0] == slots[1], (language, ours)
        # No two ask the same.
        assert len({question for story in found for question in (story["told"], *story["asked"].values())}) > 140
    rows = list(translated_stories(3000, 0))
    assert rows == list(translated_stories(3000, 0)) and {row["lang"] for row in rows} == set(FURTHER.languages)
    for row in rows:
        ((left, _, right, _),) = worked(row["target"])
        numbers = [int(number) for number in re.findall(r"[0-9]+", row["source"])]
        assert {left, right} <= set(numbers) and max(left, right) <= 144, row
        if row["lang"] == "ru":
            assert all(number % 10 in (0, 5, 6, 7, 8, 9) or number % 100 in range(11, 20) for number in numbers)


def test_problems_of_two_persons_are_what_their_questions_ask():
    rows = list(person_problems(4000, 0))
    assert rows == list(person_problems(4000, 0)) and {row["lang"] for row in rows} == set(FURTHER.languages)
    assert all(wording(language).comparisons.keys() == {"more", "fewer", "together"} for language in FURTHER.languages)
    new = [wording("en").openings[REAL.new].split("{count}")[1], wording("en").gains[REAL.new].split()[1]]
    compared = beside = 0
    for row in (row for row in rows if row["lang"] == "en"):
        steps = worked(row["target"])
        assert not any(phrase in row["source"] for phrase in new)
        *told, question = re.split(r"(?<=[.]) ", row["source"])
        numbers = [re.search(r"\d+", sentence) for sentence in told]
        if not all(numbers):
            continue
        used = [steps[0][0], *(step[2] for step in steps)]
        if asked := re.search(r"(more|fewer) \w+ does (\w+) have than (\w+)", question):
            more, one, other = asked.groups()
            first, second = (one, other) if more == "more" else (other, one)
        elif asked := re.search(r"do (\w+) and (\w+) have together", question):
            first, second = asked.groups()
        else:
            noun = re.search(r"how many (\w+)", question.lower())[1]
            name = next((name for forms in wording("en").names if (name := forms["name"]) in question), "")
            meant = [
                int(number[0])
                for number, text in zip(numbers, told, strict=True)
                if re.search(rf"\b{noun}\b", text) and name in text
            ]
            beside += 1
            assert meant == used and len(told) == len(used) + 1, row
            continue
        of = {
            name: int(number[0])
            for number, text in zip(numbers, told, strict=True)
            for name in (first, second)
            if name in text
        }
        assert used == [of[first], of[second]], row
        compared += 1
    assert compared > 30 and beside > 30
