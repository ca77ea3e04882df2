"""Generated word problems of one and two steps, the same problem in every language of the demo.

A problem is a kind (which steps, in which order), one clause template per part (opening or groups, events, question),
numbers, a name, a noun and a container. All numbers and results stay below 100. What evaluation uses is held out of
every training there is, that of the shipped bases included:

- templates: about a quarter of the clause combinations of each kind. Each clause alone is seen in training, its
  combination with the others is not: the bases are far too small to understand wordings they never saw.
- numbers: one in six pairs of an addition (in either order) and of a subtraction. In an evaluation problem every
  addition and subtraction is such a pair; in training none is, not as a step of a longer problem either. Tables that a
  pupil learns by heart cannot be worked out from their other entries: sums and differences of two numbers up to 20 are
  never held out (and never evaluated), and of a multiplication only the one-step question is held out (in either order)
  while the product occurs as first step of two-step training problems.
"""

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from layalign.train.demo.templates import WORDINGS

LANGUAGES = tuple(WORDINGS)
# Steps of each kind: "groups" sets up a product, "opening" a number; gains add, losses subtract.
KINDS = (
    ("opening", "gains"),
    ("opening", "losses"),
    ("groups",),
    ("opening", "gains", "gains"),
    ("opening", "gains", "losses"),
    ("opening", "losses", "gains"),
    ("opening", "losses", "losses"),
    ("groups", "gains"),
    ("groups", "losses"),
)
SIGNS = {"groups": "*", "gains": "+", "losses": "-"}
LIMIT = 100
BY_HEART = 20


@dataclass(frozen=True)
class Problem:
    """kind: parts without the question; clauses: a template index per part and one for the question; numbers: two for
    groups, one for each other part; name, noun, container: indices into the words of every language."""

    kind: tuple[str, ...]
    clauses: tuple[int, ...]
    numbers: tuple[int, ...]
    name: int
    noun: int
    container: int

    @property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """(left, sign, right, result) of each step."""
        numbers = list(self.numbers)
        value, steps = numbers.pop(0), []
        for part in self.kind:
            if part == "opening":
                continue
            right = numbers.pop(0)
            result = {"*": value * right, "+": value + right, "-": value - right}[SIGNS[part]]
            steps.append((value, SIGNS[part], right, result))
            value = result
        return steps

    @property
    def number(self) -> int:
        """The answer."""
        return self.steps[-1][3]

    @property
    def worked_answer(self) -> str:
        """What the LLM is to write, in English for every language."""
        steps = " ".join(f"{left} {sign} {right} = {result}." for left, sign, right, result in self.steps)
        return f"{steps} The answer is {self.number}."

    def segments(self, language: str) -> list[list[tuple[str, str]]]:
        """Of each statement, then of the question: (what it is, text) pieces, as in `Wording.segments`."""
        wording = WORDINGS[language]
        numbers, sentences = list(self.numbers), []
        for part, clause in zip((*self.kind, "questions"), self.clauses, strict=True):
            taken = {"groups": 2, "questions": 0}.get(part, 1)
            pattern = getattr(wording, "openings" if part == "opening" else part)[clause]
            sentences.append(wording.segments(pattern, self.name, self.noun, self.container, tuple(numbers[:taken])))
            del numbers[:taken]
        return sentences

    def sentences(self, language: str) -> list[str]:
        """The statements, then the question."""
        return ["".join(text for _, text in sentence) for sentence in self.segments(language)]

    def text(self, language: str) -> str:
        return WORDINGS[language].space.join(self.sentences(language))


def template_held_out(kind: tuple[str, ...], clauses: tuple[int, ...]) -> bool:
    """Whether this combination of clauses is kept for evaluation."""
    return zlib.crc32(repr((kind, clauses)).encode()) % 4 == 0


def pair_held_out(left: int, sign: str, right: int) -> bool:
    """Whether this pair of numbers is kept for evaluation; a sum or product counts in either order."""
    if sign != "*" and max(left, right) <= BY_HEART:
        return False
    pair = (left, right) if sign == "-" else (min(left, right), max(left, right))
    return zlib.crc32(repr((sign, *pair)).encode()) % 6 == 0


def numbers_seen(problem: Problem) -> bool:
    """Whether training may hold the numbers of this problem: none of its pairs is held out."""
    pairs = [step[:3] for step in problem.steps]
    return not any(pair_held_out(*pair) for pair in pairs if pair[1] != "*" or len(pairs) == 1)


def numbers_held_out(problem: Problem) -> bool:
    """Whether evaluation may ask this problem: all its pairs are held out (a product only if it is the only step)."""
    pairs = [step[:3] for step in problem.steps]
    return all(pair_held_out(*pair) for pair in pairs if pair[1] != "*" or len(pairs) == 1)


def draw_numbers(kind: tuple[str, ...], choose: random.Random) -> tuple[int, ...]:
    """Numbers for a kind of problem, such that no result leaves the range from 1 to 99."""
    numbers = [choose.randint(2, 9), choose.randint(2, 9)] if kind[0] == "groups" else [choose.randint(2, LIMIT - 3)]
    value = numbers[0] * numbers[1] if kind[0] == "groups" else numbers[0]
    for part in kind[1:]:
        most = value - 1 if part == "losses" else LIMIT - 1 - value
        if most < 2:
            return draw_numbers(kind, choose)
        numbers.append(choose.randint(2, most))
        value += -numbers[-1] if part == "losses" else numbers[-1]
    return tuple(numbers)


def problems(seed: int | str, *, held_out: bool = False) -> Iterator[Problem]:
    """An endless stream of problems for training, or with `held_out` for evaluation (every kind in turn)."""
    choose = random.Random(f"{seed}/{held_out}")
    numbers_fit = numbers_held_out if held_out else numbers_seen
    english = WORDINGS["en"]
    while True:
        for kind in KINDS:
            while True:
                problem = Problem(
                    kind,
                    tuple(choose.randrange(3) for _ in (*kind, "questions")),
                    draw_numbers(kind, choose),
                    choose.randrange(len(english.names)),
                    choose.randrange(len(english.nouns)),
                    choose.randrange(len(english.containers)),
                )
                if template_held_out(problem.kind, problem.clauses) == held_out and numbers_fit(problem):
                    yield problem
                    break


def translation_records(count: int, seed: int) -> list[dict]:
    """Training records of the translation stage: a problem in any language and the same text in English."""
    stream = problems(f"translation {seed}")
    return [
        {"source": problem.text(language), "target": problem.text("en"), "lang": language}
        for problem, language in zip(stream, itertools.islice(itertools.cycle(LANGUAGES), count), strict=False)
    ]


def task_records(count: int, seed: int) -> list[dict]:
    """Training records of the task stage: a problem in any language and its worked answer in English."""
    stream = problems(f"task {seed}")
    return [
        {"source": problem.text(language), "target": problem.worked_answer, "lang": language}
        for problem, language in zip(stream, itertools.islice(itertools.cycle(LANGUAGES), count), strict=False)
    ]


def evaluation_problems(per_language: int, seed: int) -> list[dict]:
    """The same held-out problems in every language: {"lang", "question", "answer"}."""
    chosen = list(itertools.islice(problems(f"evaluation {seed}", held_out=True), per_language))
    return [
        {"lang": language, "question": problem.text(language), "answer": problem.number}
        for language in LANGUAGES
        for problem in chosen
    ]
