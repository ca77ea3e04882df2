"""How one language words the generated problems: the words it needs and one sentence pattern per clause."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from num2words2 import num2words


def spell(number: int, language: str) -> str:
    """The numeral as words, as num2words2 writes it."""
    return num2words(number, lang=language)


# What a form stands for, the same in every language; other forms (classifiers, agreeing verbs) are literal text.
MEANT_BY = {"name": "name", "genitive": "name", "noun": "noun"} | dict.fromkeys(
    ("boxes_noun", "box", "each_box", "in_each", "into_each", "in_box"), "container"
)
MARKED = re.compile("\x02(\\w+)\x03(.*?)\x04")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The words and sentence patterns of one language.

    Clause i of each tuple means the same in every language, as do name, noun and container i. Patterns are filled by
    `str.format` with the forms below; `count`, `boxes` and `how_many` are phrases made from `count_pattern`,
    `boxes_pattern` and `how_many_pattern`.
    """

    code: str
    names: tuple[dict[str, str], ...]
    nouns: tuple[dict[str, str], ...]
    containers: tuple[dict[str, str], ...]
    count_pattern: str
    boxes_pattern: str
    how_many_pattern: str
    openings: tuple[str, ...]
    groups: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    questions: tuple[str, ...]
    space: str = " "
    agree: Callable[[str, int, dict[str, str]], str] = lambda words, number, forms: words

    def clause(self, pattern: str, name: int, noun: int, container: int, numbers: tuple[int, ...]) -> str:
        """Fills a pattern. numbers: (count,), (boxes, count) or () as the pattern needs them."""
        return "".join(text for _, text in self.segments(pattern, name, noun, container, numbers))

    def segments(
        self, pattern: str, name: int, noun: int, container: int, numbers: tuple[int, ...]
    ) -> list[tuple[str, str]]:
        """The filled pattern in pieces: (what it is, text), such as ("number", "seven") or ("literal", " has ")."""
        forms = {
            key: _marked(MEANT_BY.get(key), text)
            for key, text in (self.names[name] | self.nouns[noun] | self.containers[container]).items()
        }
        forms["how_many"] = self.how_many_pattern.format(**forms)
        if numbers:
            words = self._agreeing(numbers[-1], self.nouns[noun])
            forms["count"] = self.count_pattern.format(number=_marked("number", words), **forms)
        if len(numbers) == 2:
            words = self._agreeing(numbers[0], self.containers[container])
            forms["boxes"] = self.boxes_pattern.format(number=_marked("boxes", words), **forms)
        pieces = MARKED.split(pattern.format(**forms))
        # re.split alternates literal text and (what, text).
        found = [("literal", pieces[0])]
        for place in range(1, len(pieces), 3):
            found += [(pieces[place], pieces[place + 1]), ("literal", pieces[place + 2])]
        found = [(what, text) for what, text in found if text]
        what, first = found[0]
        return [(what, first[0].upper() + first[1:]), *found[1:]]

    def _agreeing(self, number: int, forms: dict[str, str]) -> str:
        return self.agree(spell(number, self.code), number, forms)


def _marked(what: str | None, text: str) -> str:
    return text if what is None else f"\x02{what}\x03{text}\x04"


def forms(keys: str, rows: str) -> tuple[dict[str, str], ...]:
    """One dict of word forms a line; the forms stand between commas in the order of `keys`.

    >>> forms("noun, unit", "pen, piece")
    ({'noun': 'pen', 'unit': 'piece'},)
    """
    names = [key.strip() for key in keys.split(",")]
    return tuple(
        dict(zip(names, (value.strip() for value in row.split(",")), strict=True)) for row in rows.strip().splitlines()
    )
