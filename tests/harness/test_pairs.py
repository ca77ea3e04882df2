"""Where the harness's prompt ends and its continuation begins, in tokens."""

import re

import pytest

from layalign.harness.reading import ReadingAnswerer


@pytest.fixture
def reader():
    """One whose tokenizer joins white space to the word after it, as those of most LLMs do."""
    made = object.__new__(ReadingAnswerer)
    made.tokenizer = lambda text, add_special_tokens: {"input_ids": re.findall(r"\s?\w+|\s+|[^\w\s]", text)}
    return made


@pytest.mark.parametrize(
    ("prompt", "said", "pair"),
    [
        ("Answer:", " New York", (["Answer", ":"], [" New", " York"])),
        ("Answer: ", "New York", (["Answer", ":"], [" New", " York"])),
        (" ", "New York", ([], [" New", " York"])),
        ("Answer: ", "New", (["Answer", ":"], [" New"])),
    ],
)
def test_white_space_at_a_prompts_end_is_the_continuations(reader, prompt, said, pair):
    """As the harness' own models have it: else choices would be compared by what follows their first word."""
    assert reader._pair(prompt, said, together=True) == pair
