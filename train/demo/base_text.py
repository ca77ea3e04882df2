"""What the two tiny bases read while they are trained; nothing of it is held out for evaluation."""

import itertools
import random
from collections.abc import Iterator

from layalign.train.demo.base_tokenizers import ANSWER, COPY
from layalign.train.demo.problems import LANGUAGES, LIMIT, pair_held_out, problems

# Words that a hasty note leaves out without losing its meaning.
DISPENSABLE = frozenset("has had a the of there are in then later and does to with this each".split())


def translations(seed: int | str) -> Iterator[tuple[str, str]]:
    """(text in any language, the same text in English), for the encoder."""
    choose = random.Random(f"translations {seed}")
    for problem in problems(f"encoder {seed}"):
        sentences = range(len(problem.clauses))
        # Half of the texts are parts of a problem, in any order, so that a sentence means the same anywhere.
        chosen = choose.sample(sentences, choose.randint(1, len(sentences))) if choose.random() < 0.5 else sentences
        language = choose.choice(LANGUAGES)
        yield tuple(_join([problem.sentences(code)[i] for i in chosen], code) for code in (language, "en"))


def english(seed: int | str) -> Iterator[tuple[str, str]]:
    """(what the LLM reads, what it is to write), all in English.

    Two fifths ask for the worked answer, a quarter for a copy, the rest mixes both, hides a question among unknown
    words, or drills sums. Half of the passages are written as hasty notes: words in a free order, small ones missing.
    """
    choose = random.Random(f"english {seed}")
    for problem in problems(f"llm {seed}"):
        clean = problem.text("en")
        passage = clean if choose.random() < 0.5 else hasty(problem.sentences("en"), choose)
        kind = choose.random()
        if kind < 0.4:
            yield f"{passage} {ANSWER}", problem.worked_answer
        elif kind < 0.65:
            yield f"{passage} {COPY}", clean
        elif kind < 0.75:
            yield f"{passage} {COPY}", f"{clean} {ANSWER} {problem.worked_answer}"
        elif kind < 0.9:
            unknown = unreadable(clean, choose)
            middle = choose.choice(("", f"{COPY} "))
            yield f"{passage} {middle}{unknown} {ANSWER}", problem.worked_answer
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
    lines = []
    while len(lines) < count:
        sign = choose.choice("+-*")
        left = choose.randint(2, 9 if sign == "*" else LIMIT - 3)
        right = choose.randint(2, {"*": 9, "+": LIMIT - 1 - left, "-": max(left - 1, 2)}[sign])
        result = {"*": left * right, "+": left + right, "-": left - right}[sign]
        if result > 0 and (sign == "*" or not pair_held_out(left, sign, right)):
            lines.append(f"{left} {sign} {right} = {result}.")
    return lines


def sample_texts(count: int, seed: int) -> list[str]:
    """English texts for the LLM's vocabulary."""
    return [f"{read} {write}" for read, write in itertools.islice(english(seed), count)]


def _join(sentences: list[str], language: str) -> str:
    return ("" if language == "zh" else " ").join(sentences)
