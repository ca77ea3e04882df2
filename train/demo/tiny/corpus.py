"""What the two tiny bases read while they are trained; nothing of it is held out for evaluation."""

import itertools
import random
from collections.abc import Iterator, Sequence

from layalign.train.demo.problems import TINY, Problem
from layalign.train.demo.tiny.vocabulary import ANSWER, COPY

# Words that a hasty note leaves out without losing its meaning.
DISPENSABLE = frozenset(
    ("has", "had", "a", "the", "of", "there", "are", "in", "then", "later", "and", "does", "to", "with", "this", "each")
)


def multilingual(seed: int | str) -> Iterator[tuple[Problem, Sequence[int], str]]:
    """(problem, which of its sentences in which order, language), for the encoder: whole problems and parts of them."""
    choose = random.Random(f"multilingual {seed}")
    for problem in TINY.problems(f"encoder {seed}"):
        order: Sequence[int] = range(len(problem.clauses))
        if choose.random() < 0.5:
            # In any order and company, so that a sentence comes to mean the same anywhere.
            order = choose.sample(order, choose.randint(1, len(order)))
        yield problem, order, choose.choice(TINY.languages)


def english(seed: int | str) -> Iterator[tuple[str, str]]:
    """(what the LLM reads, what it is to write), all in English.

    Two fifths ask for the worked answer, a quarter for a copy; the rest asks for both, hides the question among unknown
    words, or drills sums. Half of the passages are written as hasty notes: words in a free order, small ones missing.
    """
    choose = random.Random(f"english {seed}")
    for problem in TINY.problems(f"llm {seed}"):
        clean, worked = problem.text("en"), TINY.worked_answer(problem)
        passage = clean if choose.random() < 0.5 else hasty(problem.sentences("en"), choose)
        kind = choose.random()
        if kind < 0.4:
            yield f"{passage} {ANSWER}", worked
        elif kind < 0.65:
            yield f"{passage} {COPY}", clean
        elif kind < 0.75:
            yield f"{passage} {COPY}", f"{clean} {ANSWER} {worked}"
        elif kind < 0.9:
            middle = choose.choice(("", f"{COPY} "))
            yield f"{passage} {middle}{unreadable(clean, choose)} {ANSWER}", worked
        else:
            yield "", " ".join(sums(choose, 5))


def hasty(sentences: list[str], choose: random.Random) -> str:
    """Words moved by up to two places within their sentence, small ones sometimes missing."""
    lines = []
    for sentence in sentences:
        words = [word for word in sentence[:-1].split() if word.lower() not in DISPENSABLE or choose.random() < 0.7]
        places = sorted(range(len(words)), key=lambda i: i + choose.uniform(0, 2.5))
        lines.append(" ".join(words[i] for i in places) + sentence[-1])
    return " ".join(lines)


def unreadable(text: str, choose: random.Random) -> str:
    """The text with most of its words replaced by one that no English reader knows, as a foreign text looks."""
    return " ".join("¤" * choose.randint(1, 2) if choose.random() < 0.85 else word for word in text.split())


def sums(choose: random.Random, count: int) -> list[str]:
    """Sums that evaluation does not ask for."""
    lines: list[str] = []
    while len(lines) < count:
        sign = choose.choice("+-*")
        left = choose.randint(3, TINY.limit - 3) if sign != "*" else choose.randint(2, 9)
        right = choose.randint(2, {"*": 9, "+": TINY.limit - 1 - left, "-": left - 1}[sign])
        result = {"*": left * right, "+": left + right, "-": left - right}[sign]
        if sign == "*" or not TINY.pair_held_out(left, sign, right):
            lines.append(f"{left} {sign} {right} = {result}.")
    return lines


def sample_texts(count: int, seed: int) -> list[str]:
    """English texts for the LLM's vocabulary."""
    return [f"{read} {write}" for read, write in itertools.islice(english(seed), count)]
