"""Keeps what a model is tested on out of what it is trained on.

A training text is contaminated where it equals a test text after normalisation (NFKC, lower case, letters and digits
only), or shares with one a run of `WORDS` words, or of `CHARACTERS` characters where the run holds a script that is
written without spaces. A record goes if its source or its target is contaminated.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

WORDS, CHARACTERS = 8, 16
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def benchmark_texts(data: str | Path) -> dict[str, list[str]]:
    """{set: texts} of MGSM, MSVAMP, GSM8K's test split and LASER's Tatoeba in the folder `data`, those that are there."""
    data = Path(data)
    readers = {
        "mgsm": ("mgsm/mgsm_*.tsv", lambda line: [line.rsplit("\t", 1)[0]]),
        "msvamp": ("msvamp/test_*.json", lambda line: _fields(line, ("m_query", "query"))),
        "gsm8k": ("gsm8k/test.jsonl", lambda line: _fields(line, ("question",))),
        "tatoeba_laser": ("tatoeba_laser/tatoeba.*", lambda line: [line]),
    }
    found = {}
    for name, (pattern, texts_of) in readers.items():
        files = sorted(data.glob(pattern))
        lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        if lines:
            found[name] = [text for line in lines for text in texts_of(line)]
    return found


def decontaminated(records: list[dict], tests: dict[str, list[str]]) -> tuple[list[dict], dict[str, dict[str, int]]]:
    """Records without a contaminated source or target, and how many each test set removed.

    Args:
        records: dicts with source and target.
        tests: {set: texts}.

    Returns:
        The records that are left, and {set: {"exact": count, "overlap": count}}; a record that two sets contaminate counts
        for the first.
    """
    exact: dict[str, str] = {}
    runs: dict[str, str] = {}
    for name, texts in tests.items():
        for text in texts:
            plain = normalised(text)
            exact.setdefault(plain, name)
            for run in _runs(plain):
                runs.setdefault(run, name)
    kept, removed = [], {name: Counter(exact=0, overlap=0) for name in tests}
    for record in records:
        sides = [normalised(record[side]) for side in ("source", "target")]
        equal = next((exact[text] for text in sides if text in exact), None)
        shared = next((runs[run] for text in sides for run in _runs(text) if run in runs), None)
        if equal is not None:
            removed[equal]["exact"] += 1
        elif shared is not None:
            removed[shared]["overlap"] += 1
        else:
            kept.append(record)
    return kept, {name: dict(counts) for name, counts in removed.items()}


def normalised(text: str) -> str:
    """Letters, marks and digits in lower case, one space between words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text).split())


def _runs(plain: str) -> Iterator[str]:
    if _UNSPACED.search(plain):
        joined = plain.replace(" ", "")
        for start in range(len(joined) - CHARACTERS + 1):
            yield joined[start : start + CHARACTERS]
        return
    words = plain.split()
    for start in range(len(words) - WORDS + 1):
        yield " ".join(words[start : start + WORDS])


def _fields(line: str, names: tuple[str, ...]) -> list[str]:
    row = json.loads(line)
    return [row[name] for name in names if row.get(name)]
