"""One-step word problems for the real models: the same problem in ten languages, numbers up to 20 in words or digits.

Kept from all training: about a quarter of the combinations of patterns of each kind (a hash of the combination decides),
one in six pairs of numbers (an addition in either order; a hash decides), and the last pattern of every part altogether.
`held_out` problems have such a combination and such a pair, of patterns that training has in other combinations;
`new_wording` problems have such a pair and consist of patterns that training never has.
"""

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from layalign.train.demo.problems import Problem, template_held_out
from layalign.train.real.wordings import WORDINGS

LANGUAGES = tuple(WORDINGS)
KINDS = (("opening", "gains"), ("opening", "losses"))
MOST, LEAST = 20, 2
PATTERNS = 7
NEW = PATTERNS - 1
SPLITS = ("training", "held_out", "new_wording")


@dataclass(frozen=True)
class MixedProblem(Problem):
    """A Problem of one step; digits: for each statement whether its number is written in digits."""

    digits: tuple[bool, ...] = ()

    @property
    def worked_answer(self) -> str:
        """What the LLM is to write, in every language: `7 + 5 = 12`."""
        left, sign, right, result = self.steps[0]
        return f"{left} {sign} {right} = {result}"

    def segments(self, language: str) -> list[list[tuple[str, str]]]:
        """Of each statement, then of the question: (what it is, text) pieces, as in `Wording.segments`."""
        wording, sentences = WORDINGS[language], []
        for part, clause, *number in self._parts():
            pattern = getattr(wording, "openings" if part == "opening" else part)[clause]
            numbers, digits = ((number[0],), number[1]) if number else ((), False)
            sentences.append(wording.written(digits).segments(pattern, self.name, self.noun, 0, numbers))
        return sentences

    def text(self, language: str) -> str:
        return WORDINGS[language].space.join(self.sentences(language))

    def _parts(self):
        yield from zip(self.kind, self.clauses, self.numbers, self.digits, strict=False)
        yield "questions", self.clauses[-1]


def pair_held_out(left: int, sign: str, right: int) -> bool:
    """Whether this pair of numbers is kept for evaluation; a sum counts in either order."""
    pair = (left, right) if sign == "-" else (min(left, right), max(left, right))
    return zlib.crc32(repr((sign, *pair)).encode()) % 6 == 0


def split_of(problem: MixedProblem) -> str | None:
    """ "training", "held_out" or "new_wording"; None: half of what is held out, so of no use to any."""
    pair = pair_held_out(*problem.steps[0][:3])
    if NEW in problem.clauses:
        return "new_wording" if pair and set(problem.clauses) == {NEW} else None
    template = template_held_out(problem.kind, problem.clauses)
    return {(False, False): "training", (True, True): "held_out"}.get((template, pair))


def mixed_problems(seed: int | str, split: str = "training") -> Iterator[MixedProblem]:
    """An endless stream of problems of one split, the kinds in turn; a third all digits, a third all words."""
    choose = random.Random(f"mixed {seed} {split}")
    english = WORDINGS["en"]
    for kind in itertools.cycle(KINDS):
        while True:
            clauses = (NEW,) * 3 if split == "new_wording" else tuple(choose.randrange(NEW) for _ in range(3))
            problem = MixedProblem(
                kind,
                clauses,
                _numbers(kind, choose),
                choose.randrange(len(english.names)),
                choose.randrange(len(english.nouns)),
                0,
                choose.choice(
                    ((False, False), (True, True), (False, True), (True, False), (False, False), (True, True))
                ),
            )
            if split_of(problem) == split:
                yield problem
                break


def _numbers(kind: tuple[str, ...], choose: random.Random) -> tuple[int, int]:
    first = choose.randint(LEAST + 1, MOST)
    return first, choose.randint(LEAST, first - 1 if "losses" in kind else MOST)


def task_records(count: int, seed: int | str) -> list[dict]:
    """Training records of the task stage: a problem in any language and its worked answer."""
    return [_record(problem, language, problem.worked_answer) for problem, language in _training("task", count, seed)]


def translation_records(count: int, seed: int | str) -> list[dict]:
    """Training records of the translation stage: a problem in any language and the same text in English."""
    stream = _training("translation", count, seed)
    return [_record(problem, language, problem.text("en")) for problem, language in stream]


def evaluation_problems(per_language: int, seed: int | str, split: str = "held_out") -> list[dict]:
    """The same problems of a split in every language: lang, question, answer, and in English text and worked_answer."""
    chosen = list(itertools.islice(mixed_problems(f"evaluation {seed}", split), per_language))
    return [
        {"task": split, "lang": language, "index": index, "question": problem.text(language)}
        | {"answer": problem.number, "text": problem.text("en"), "worked_answer": problem.worked_answer}
        for language in LANGUAGES
        for index, problem in enumerate(chosen)
    ]


def _training(purpose, count, seed):
    return zip(mixed_problems(f"{purpose} {seed}"), itertools.islice(_languages(seed), count), strict=False)


def _languages(seed):
    """Each language once in every ten, in any order: the kinds alternate, and in a fixed order a language would have one
    kind alone, so that its sign says nothing of the question."""
    choose = random.Random(f"languages {seed}")
    while True:
        yield from choose.sample(LANGUAGES, len(LANGUAGES))


def _record(problem, language, target):
    return {"source": problem.text(language), "target": target, "lang": language}
