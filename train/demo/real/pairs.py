"""Everything the second proof's translation stage reads: people's sentences, and no generated one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from layalign.train.demo.real.decontaminate import decontaminated
from layalign.train.demo.real.interfaces import FEWEST_WORDS, interface_pairs
from layalign.train.demo.real.tatoeba import training_pairs

# Of the English side: a ninth of LASER's sentences are longer, and a batch is as long as its longest.
LONGEST = 80
ALL = 1_000_000
ENGLISH = 6000
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def sentence_pairs(data: Path, tests: dict[str, list[str]], cache: str | Path | None = None) -> tuple[list[dict], dict]:
    """Records {"source", "target" (English), "lang"} of Tatoeba's exports, of programs' interfaces, and of English sentences that stand for
    themselves, from the training questions of GSM8K: people ask so, and the encoder has the same meaning near in other languages.

    Args:
        data: folder with tatoeba_pairs/ and gsm8k/.
        tests: {set: texts}, which share no sentence and no run of words with what is given back.
        cache: of the wheels with the interfaces.

    Returns:
        the records, each once, in the order of their sources, and how many each test set took out.

    Raises:
        ValueError: a folder without GSM8K's training questions, a pair file of an unknown language, a wheel that cannot be had.
    """
    known = [*training_pairs(data, ALL), *interface_pairs(cache), *_english(data)]
    distinct: dict[tuple[str, str, str], dict] = {}
    for row in known:
        if len(row["target"]) <= LONGEST:
            distinct.setdefault((row["lang"], row["source"], row["target"]), row)
    return decontaminated(list(distinct.values()), tests)


def training_questions(data: Path) -> Iterator[dict]:
    """{"question", "answer"} of GSM8K's training split in the folder `data`.

    Raises:
        ValueError: it is not there.
    """
    file = data / "gsm8k" / "train.jsonl"
    if not file.is_file():
        raise ValueError(f"data: {data} holds no gsm8k/train.jsonl, of which the training questions are taken")
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _english(data: Path) -> list[dict]:
    asked = [" ".join(row["question"].split()) for row in training_questions(data)]
    found = dict.fromkeys(sentence for text in asked for sentence in SENTENCE_END.split(text))
    chosen = [text for text in found if len(text) <= LONGEST and len(text.split()) >= FEWEST_WORDS]
    return [{"source": text, "target": text, "lang": "en"} for text in chosen[:: -(-len(chosen) // ENGLISH)]]
