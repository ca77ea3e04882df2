"""What is generated is what it was when the bases and the shipped part were trained: hashes taken then."""

import hashlib
import itertools
import json
from dataclasses import replace

import pytest

from layalign.train.demo import problems, wording
from layalign.train.demo.problems import HELD_OUT, NEW_WORDING, REAL, TINY
from layalign.train.demo.tiny.corpus import english, multilingual
from layalign.train.demo.tiny.glosses import part_of

FIRST = 500


def digest(value):
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def asked(count, seed):
    """What is asked of the tiny pair, without what helps to read the answers."""
    rows = TINY.evaluation_problems(count, seed)
    return [{key: row[key] for key in ("lang", "question", "answer")} for row in rows]


def shots():
    chosen = list(itertools.islice(REAL.problems("shots 0"), 4))
    return [[problem.text(code) + REAL.worked_answer(problem) for code in REAL.languages] for problem in chosen]


def encoder_texts():
    return [[part_of(*part), list(part[1]), part[2]] for part in itertools.islice(multilingual(0), FIRST)]


def segments():
    return [
        [problem.segments(code) for code in TINY.languages]
        for problem in itertools.islice(TINY.problems("segments"), 300)
    ]


GENERATED = {
    "tiny, asked, 0": (lambda: asked(100, 0), "1495326cc0ecee1fdb2d2e5574b62c65b55bb4475a5dd2e0d855a6cdbe4de5ad"),
    "tiny, asked, 11": (lambda: asked(63, 11), "d7d8f6eabd45a5dd1b7338d84be885a896fdcd8a5d4cf0bd41986af4b4584a70"),
    "tiny, task, 0": (
        lambda: TINY.task_records(2000, 0),
        "66e29f2cb48f5e0a0429618883d30a589b8d3ade963d15f1c0f6395b7c009a2e",
    ),
    "tiny, task, 1": (
        lambda: TINY.task_records(2000, 1),
        "b0ab66827406d106dabfe47a2f0ae748d8ed1cecc3fba5bfca2519fafd51461e",
    ),
    "tiny, translation, 0": (
        lambda: TINY.translation_records(2000, 0),
        "2ca6973783b2ea50416d39d592bdc35468a086d35198486742a2cfcbfb44f9ec",
    ),
    "tiny, pieces": (segments, "71727c13673e594c864900b331aa9c5527c74d350277fc8bd3a3cbb3d9f5b074"),
    "tiny encoder reads": (encoder_texts, "75fbc345f5c90d8d16638ed877ca62fda7314dbb2d518d402d5fafec8f9429de"),
    "tiny LLM reads": (
        lambda: list(itertools.islice(english(0), FIRST)),
        "cd538af25182740dcf46e78be54655862c0acc08b2939a35cf8dbd688f9b3225",
    ),
    "real, held_out, 0": (
        lambda: REAL.evaluation_problems(50, 0, HELD_OUT),
        "0d70eb2b4947be03fe2ed7c5763c6fb7188dfe8d0eb53d8661e63a398d7fe25b",
    ),
    "real, new_wording, 0": (
        lambda: REAL.evaluation_problems(50, 0, NEW_WORDING),
        "8838f9b0d6ea15910d2523d4f531e9a232aecfb47e4169fc5c2270a0396340c9",
    ),
    "real, held_out, shown": (
        lambda: REAL.evaluation_problems(50, "shown", HELD_OUT),
        "b26473aeda1b4dd8cae66c4758a40ed2ec7569975b87dbedb64a612cf30fb0a8",
    ),
    "real, new_wording, shown": (
        lambda: REAL.evaluation_problems(50, "shown", NEW_WORDING),
        "36f750b515f5742a4e061aac915b0ac06ce556698b655b6e05360cb11eb36721",
    ),
    "real, task, 0": (
        lambda: REAL.task_records(2000, 0),
        "e01495efe0b443938aa80127997162c0be04f3be075f1a27ba710637121a046d",
    ),
    "real, translation, 0": (
        lambda: REAL.translation_records(2000, 0),
        "82ac2569f34e66e66a507241cd982a728bba8d527294a647bbeb2aaf63f9faf7",
    ),
    "real, task, 1": (
        lambda: REAL.task_records(2000, 1),
        "83b272cc806de2a09d57bfff227cd5452cc0a371f5613338148480de1499d197",
    ),
    "real, translation, 1": (
        lambda: REAL.translation_records(2000, 1),
        "d7c91db024c29e53b5f7b912731e3fef7ecbbe26f5821ff09b73871d8d8468b6",
    ),
    "real, task, 2": (
        lambda: REAL.task_records(2000, 2),
        "5bdbc2b9782274cf9d755bf351a6b99cdb1a1eb5c5d5612f0c6d00c1ed31c51b",
    ),
    "real, translation, 2": (
        lambda: REAL.translation_records(2000, 2),
        "303256c719945c2cdfa86b583eefdeaf83bfffe3e732b438d2e3cb647b1fa36c",
    ),
    "real, timing": (
        lambda: REAL.task_records(128, "timing"),
        "6b314c9508c5124417007db2c347907228cceed1927a7116115e523cacceab1b",
    ),
    "real, shots": (shots, "bc0b94105a182ad115a3fc2873d83dd7488f9637deedb8565c8e4a140fab403c"),
}


@pytest.mark.parametrize(("make", "expected"), GENERATED.values(), ids=GENERATED)
def test_generated_text_is_what_it_was(make, expected):
    assert digest(make()) == expected


@pytest.mark.parametrize("part", ["names", "nouns", "openings", "gains", "losses", "questions"])
def test_a_changed_sentence_is_noticed(part, monkeypatch):
    """One word or sentence of one language, in one place."""
    swahili = wording.wording("sw")
    first, *rest = getattr(swahili, part)
    first = {**first, part[:-1]: "x"} if isinstance(first, dict) else first.replace("{name}", "{name} ", 1)
    changed = replace(swahili, **{part: (first, *rest)})
    known = wording.wording
    monkeypatch.setattr(problems, "wording", lambda code: changed if code == "sw" else known(code))
    assert digest(asked(100, 0)) != GENERATED["tiny, asked, 0"][1]
    assert digest(REAL.task_records(2000, 0)) != GENERATED["real, task, 0"][1]
