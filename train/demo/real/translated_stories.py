"""Stories in ten languages whose questions need two of their numbers, read from stories/CODE.json; of each the same in every language."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from layalign.train.demo.problems import REAL
from layalign.train.demo.real.stories import answered, story_numbers
from layalign.train.demo.wording import wording

STORIES = Path(__file__).with_name("stories")


@cache
def stories_in(language: str) -> list[dict]:
    """[{"told": the story, "asked": {"x - y": the question that this answers}}], numbers as {w}, {x}, {y}, {z}."""
    return json.loads((STORIES / f"{language}.json").read_text(encoding="utf-8"))


def translated_stories(count: int, seed: int) -> Iterator[dict]:
    """So many training records, the stories in turn, each in any language; numbers as those of `story_problems`, in digits. In Russian all
    take the genitive plural, in which what they count is written."""
    choose = random.Random(f"translated {seed}")
    for place in range(count):
        language = choose.choice(REAL.languages)
        stories = stories_in(language)
        story = stories[place % len(stories)]
        asked, question = choose.choice(list(story["asked"].items()))
        numbers = story_numbers(asked, choose)
        while language == "ru" and not all(_genitive_plural(number) for number in numbers.values()):
            numbers = story_numbers(asked, choose)
        source = wording(language).space.join((story["told"], question)).format(**numbers)
        yield {"source": source, "target": answered(asked, numbers), "lang": language}


def _genitive_plural(number: int) -> bool:
    return number % 100 in range(11, 20) or number % 10 in (0, *range(5, 10))
