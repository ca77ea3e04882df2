"""How one language words the generated problems: words and sentence patterns, read from sentences/CODE.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SENTENCES = Path(__file__).with_name("sentences")
# What a form stands for, the same in every language; other forms (classifiers, agreeing verbs) are literal text.
MEANT_BY = {"name": "name", "genitive": "name", "noun": "noun", "few": "noun"} | dict.fromkeys(
    ("boxes_noun", "box", "each_box", "in_each", "into_each", "in_box"), "container"
)
MARKED = re.compile("\x02(\\w+)\x03(.*?)\x04")
# Counts that end so take the form "few", where a language has one; those from 12 to 14 do not.
FEW = (2, 3, 4)

Forms = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The words and sentence patterns of one language.

    Pattern i of each part means the same in every language, as do name, noun and container i. Patterns are filled by
    `str.format` with the words' forms; `count`, `boxes` and `how_many` are phrases made from the patterns of these names.

    Attributes:
        code: of the language, as num2words2 knows it.
        names, nouns, containers: the forms of each word; "class" is the one that numerals agree with.
        count_pattern, few_pattern: a number of nouns; few_pattern for those that end in `FEW`, where the language has one.
        boxes_pattern, how_many_pattern: a number of containers; the question for a number of nouns.
        openings, groups, gains, losses, questions: sentence patterns.
        comparisons: {"more", "fewer", "together": a question about two persons}; the second one's forms begin with "other_".
        numerals: {class of the word: {regular expression: what it becomes}}, of which the first that is found counts; words
            without a class are of class "any". Numbers in digits have no form to agree.
        space: what stands between two sentences.
        note: for readers of the file.
    """

    code: str
    names: tuple[Forms, ...]
    nouns: tuple[Forms, ...]
    count_pattern: str
    how_many_pattern: str
    openings: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    questions: tuple[str, ...]
    groups: tuple[str, ...] = ()
    containers: tuple[Forms, ...] = ()
    few_pattern: str | None = None
    boxes_pattern: str = "{number}"
    numerals: dict[str, dict[str, str]] = field(default_factory=dict)
    comparisons: dict[str, str] = field(default_factory=dict)
    space: str = " "
    note: str = ""

    def comparison(self, asked: str, name: int, other: int, noun: int) -> str:
        """The question how many more or fewer things there are, or how many together, with indices of names and noun."""
        forms = self.names[name] | self.nouns[noun]
        forms |= {f"other_{key}": text for key, text in self.names[other].items()}
        text = self.comparisons[asked].format(how_many=self.how_many_pattern.format(**forms), **forms)
        return text[0].upper() + text[1:]

    def clause(self, pattern: str, words: tuple[int, int, int], numbers: tuple[int, ...], digits: bool = False) -> str:
        """The filled pattern; arguments as of `segments`."""
        return "".join(text for _, text in self.segments(pattern, words, numbers, digits))

    def segments(
        self, pattern: str, words: tuple[int, int, int], numbers: tuple[int, ...], digits: bool = False
    ) -> list[tuple[str, str]]:
        """The filled pattern in pieces: (what it is, text), such as ("number", "seven") or ("literal", " has ").

        Args:
            pattern: one of this wording's sentence patterns.
            words: indices of name, noun and container.
            numbers: (count,), (boxes, count) or () as the pattern needs them.
            digits: whether numbers are written in digits.
        """
        name, noun = self.names[words[0]], self.nouns[words[1]]
        container = self.containers[words[2]] if self.containers else {}
        forms = {key: _marked(MEANT_BY.get(key), text) for key, text in (name | noun | container).items()}
        forms["how_many"] = self.how_many_pattern.format(**forms)
        if numbers:
            few = self.few_pattern if numbers[-1] % 10 in FEW and numbers[-1] not in range(12, 15) else None
            number = _marked("number", self._written(numbers[-1], noun, digits))
            forms["count"] = (few or self.count_pattern).format(number=number, **forms)
        if len(numbers) == 2:
            number = _marked("boxes", self._written(numbers[0], container, digits))
            forms["boxes"] = self.boxes_pattern.format(number=number, **forms)
        pieces = MARKED.split(pattern.format(**forms))
        # re.split alternates literal text and (what, text).
        found = [("literal", pieces[0])]
        for place in range(1, len(pieces), 3):
            found += [(pieces[place], pieces[place + 1]), ("literal", pieces[place + 2])]
        found = [(what, text) for what, text in found if text]
        what, first = found[0]
        return [(what, first[0].upper() + first[1:]), *found[1:]]

    def _written(self, number: int, word: Forms, digits: bool) -> str:
        """The number in digits, or in words that agree with the word it counts."""
        if digits:
            return str(number)
        words = spell(number, self.code)
        for ending, becomes in self.numerals.get(word.get("class", "any"), {}).items():
            words, found = re.subn(ending, becomes, words)
            if found:
                break
        return words


@cache
def wording(code: str) -> Wording:
    """The wording of a language, from its file."""
    read: dict[str, Any] = json.loads((SENTENCES / f"{code}.json").read_text(encoding="utf-8"))
    lists: dict[str, Any] = {key: tuple(value) for key, value in read.items() if isinstance(value, list)}
    return Wording(code=code, **read | lists)


def spell(number: int, language: str) -> str:
    """The numeral as words, as num2words2 writes it."""
    from num2words2 import num2words

    return num2words(number, lang=language)


def _marked(what: str | None, text: str) -> str:
    return text if what is None else f"\x02{what}\x03{text}\x04"
