"""Interlinear glosses: which English words stand for each piece of a text, in its own word order."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from layalign.train.demo.problems import Problem
from layalign.train.demo.wording import wording

# Thirty-seven is "thirty" and "-seven": a numeral's tens and ones, each a word of its own.
WORD = re.compile(r"-?[^\W\d_]+|[^\w\s]")


def part_of(problem: Problem, order: Sequence[int], language: str) -> str:
    """The sentences of a problem with these indices."""
    sentences = problem.sentences(language)
    return wording(language).space.join(sentences[i] for i in order)


def glosses(
    problem: Problem, order: Sequence[int], language: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[list[str]]]:
    """Token ids of `part_of(problem, order, language)` and the English words each token stands for, often one or none.

    A name, numeral, noun or container hands its English words to its tokens in order, the last token taking what is left;
    so does everything else of a sentence taken together.
    """
    source, english = problem.segments(language), problem.segments("en")
    text = part_of(problem, order, language)
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    words: list[list[str]] = [[] for _ in spans]
    position = 0
    for i in order:
        literal, taken = [], set()
        seen: dict[str, int] = {}
        for what, piece in source[i]:
            inside = _tokens(spans, text, position, position + len(piece))
            position += len(piece)
            if what == "literal":
                literal += inside
                continue
            same = [found for kind, found in english[i] if kind == what]
            # German says "jede Kiste" where English has a second "box": the n-th stands for the n-th.
            if same:
                _hand_out(WORD.findall(same[min(seen.get(what, 0), len(same) - 1)].lower()), inside, words)
                taken.update(inside)
            seen[what] = seen.get(what, 0) + 1
        # A piece that a numeral or name shares with other text stands for the numeral or name alone.
        free = [token for token in dict.fromkeys(literal) if token not in taken]
        _hand_out(WORD.findall(" ".join(found for kind, found in english[i] if kind == "literal").lower()), free, words)
        position += len(wording(language).space)
    return encoded["input_ids"], words


def _tokens(spans: Sequence[tuple[int, int]], text: str, start: int, end: int) -> list[int]:
    """Tokens with a letter or sign between start and end."""
    return [token for token, (first, last) in enumerate(spans) if text[max(first, start) : min(last, end)].strip()]


def _hand_out(english: list[str], tokens: list[int], words: list[list[str]]) -> None:
    for place, word in enumerate(english):
        if tokens:
            words[tokens[min(place, len(tokens) - 1)]].append(word)
