"""Folders damaged by rule: the answer is bit-identical, or one line names the file and nothing has changed.

`make attack` tries every file with every rule and prints the table; here a sample that a seed draws is tried.
"""

import random
import shutil
from collections import Counter

import pytest

from tests.attacks.conftest import KINDS
from tests.attacks.damages import RULES, copied, dangling_link, deep, delete, folder, long_number, not_utf8, null, pipe
from tests.attacks.trying import GOOD, outcome

# What once ended otherwise is always tried.
FOUND = {
    "training": [("run/task/log.jsonl", pipe), ("run/task/data.json", long_number)],
    "evaluation": [],
    "answers": [("a.jsonl", dangling_link)],
    "saved_model": [("model/config.json", deep), ("llm/config.json", null), ("model/processor_config.json", delete)],
    "published": [
        ("encoder/tokenizer.json", deep),
        ("pytorch_model.bin", not_utf8),
        ("encoder/tokenizer_config.json", delete),
    ],
    "proof": [
        ("out/mindmerger-0/model/model.safetensors", long_number),
        ("out/mindmerger-0/evaluation/first.json", pipe),
        ("out/mindmerger-0/evaluation/first.json", null),
        ("out/layalign-0/log.jsonl", folder),
        ("out/layalign-0/log.jsonl", dangling_link),
        ("out/layalign-0/log.jsonl", pipe),
        ("out/layalign-0/samples.json", folder),
    ],
    "caches": [("e5.bin", folder), ("e5.bin", pipe)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders_end_alike_or_in_one_line(kind, targets, tmp_path, request):
    target, wanted = targets[kind], request.config.getoption("--attacks")
    whole = copied(target.pristine, tmp_path / "whole")
    # Nothing is expected of it yet, so a run of the whole folder is called unnoticed.
    assert outcome(target, whole, "", b"").word == "unnoticed"
    expected = target.result(whole)
    tried = [(file, rule) for file in target.files() for rule in RULES]
    if wanted != "all":
        tried = [*FOUND[kind], *random.Random(0).sample(tried, min(int(wanted), len(tried)))]
    counts, bad = Counter(), []
    for number, (file, rule) in enumerate(tried):
        place = copied(target.pristine, tmp_path / str(number))
        rule(place / file, number)
        word, said = outcome(target, place, file, expected)
        counts[word] += 1
        if word not in GOOD:
            bad.append(f"{file}, {rule.__name__}: {word}: {said}")
        shutil.rmtree(place)
    print("\n".join(table({target.name: counts})))
    assert not bad, "\n".join([f"{len(bad)} of {len(tried)}", *bad])


def table(counts):
    """Rows of Markdown: what was tried, by kind of folder."""
    words = sorted(
        {*GOOD, *(word for found in counts.values() for word in found)}, key=lambda word: (word not in GOOD, word)
    )
    yield f"| folder | tried | {' | '.join(words)} |"
    yield f"| --- |{' ---: |' * (len(words) + 1)}"
    for name, found in counts.items():
        yield f"| {name} | {found.total()} | {' | '.join(str(found[word]) for word in words)} |"
