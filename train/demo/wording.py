"""How one language words the generated problems: the words it needs and one sentence pattern per clause."""

from collections.abc import Callable
from dataclasses import dataclass

from num2words2 import num2words


def spell(number: int, language: str) -> str:
    """The numeral as words, as num2words2 writes it."""
    return num2words(number, lang=language)


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
        forms = self.names[name] | self.nouns[noun] | self.containers[container]
        forms["how_many"] = self.how_many_pattern.format(**forms)
        if numbers:
            forms["count"] = self._phrase(self.count_pattern, numbers[-1], self.nouns[noun])
        if len(numbers) == 2:
            forms["boxes"] = self._phrase(self.boxes_pattern, numbers[0], self.containers[container])
        text = pattern.format(**forms)
        return text[0].upper() + text[1:] if text[0] not in "¿" else text

    def _phrase(self, pattern: str, number: int, forms: dict[str, str]) -> str:
        return pattern.format(number=self.agree(spell(number, self.code), number, forms), **forms)


def forms(keys: str, rows: str) -> tuple[dict[str, str], ...]:
    """One dict of word forms a line; the forms stand between commas in the order of `keys`.

    >>> forms("noun, unit", "pen, piece")
    ({'noun': 'pen', 'unit': 'piece'},)
    """
    names = [key.strip() for key in keys.split(",")]
    return tuple(
        dict(zip(names, (value.strip() for value in row.split(",")), strict=True)) for row in rows.strip().splitlines()
    )
