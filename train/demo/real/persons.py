"""Problems in ten languages in which a second person or thing stands: beside the point, or to be compared with the first."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layalign.train.demo.problems import FURTHER, REAL, FurtherProblems, Problem, place_by_place, takes_singular
from layalign.train.demo.wording import Wording, wording

SIGNS = {"more": "-", "fewer": "-", "together": "+"}
SOURCES = FURTHER, FurtherProblems((1,)), FurtherProblems((1,), limit=41)


def person_problems(count: int, seed: int) -> Iterator[dict]:
    """So many training records: in turn a generated problem with a statement of another person's things, or of other things, in it, and a
    comparison or a sum of what two persons have, with a third one's things in a third of them. What is kept from the generated problems is
    kept from these: numbers that are worked, patterns, combinations of patterns."""
    choose = random.Random(f"persons {seed}")
    streams = [source.problems(f"persons {seed}") for source in SOURCES]
    for place in range(count):
        language = choose.choice(REAL.languages)
        words = wording(language)
        if place % 2 == 0:
            sentences, target = _with_aside(next(choose.choice(streams)), words, choose)
        else:
            sentences, target = _compared(words, choose)
        yield {"source": words.space.join(sentences), "target": target, "lang": language}


def _with_aside(problem: Problem, words: Wording, choose: random.Random) -> tuple[list[str], str]:
    sentences = problem.sentences(words.code)
    name, noun = problem.name, problem.noun
    # Where the question says whose things are meant, another's stand beside the point.
    named = "{name}" in wording("en").questions[problem.clauses[-1]]
    if named and choose.random() < 0.5:
        name = _other(name, REAL.names, choose)
    else:
        noun = _other(noun, REAL.nouns, choose)
    sentences.insert(choose.randrange(len(sentences)), _statement(words, name, noun, _number(choose), choose))
    return sentences, FURTHER.worked_answer(problem)


def _compared(words: Wording, choose: random.Random) -> tuple[list[str], str]:
    asked, sign = choose.choice(list(SIGNS.items()))
    left, right = _pair(sign, choose)
    name, other, third = choose.sample(range(REAL.names), 3)
    noun = choose.randrange(REAL.nouns)
    persons = [(name, left), (other, right)] + [(third, _number(choose))] * (choose.random() < 1 / 3)
    choose.shuffle(persons)
    sentences = [_statement(words, person, noun, number, choose) for person, number in persons]
    sentences.append(words.comparison(asked, name, other, noun))
    result = left + right if sign == "+" else left - right
    return sentences, place_by_place(left, sign, right, result)


def _statement(words: Wording, name: int, noun: int, number: int, choose: random.Random) -> str:
    opening = words.openings[choose.choice(FURTHER.seen)]
    return words.clause(opening, (name, noun, 0), (number,), digits=choose.random() < 0.7)


def _other(index: int, count: int, choose: random.Random) -> int:
    return choose.choice([place for place in range(count) if place != index])


def _number(choose: random.Random) -> int:
    """Of things; none takes the singular, which the wordings lack."""
    most = choose.choice((20, 99))
    return choose.choice([number for number in range(2, most) if not takes_singular(number)])


def _pair(sign: str, choose: random.Random) -> tuple[int, int]:
    while True:
        left, right = _number(choose), _number(choose)
        result = left + right if sign == "+" else left - right
        if 1 <= result <= 100 and not REAL.writes_held_out(left, sign, right):
            return left, right
