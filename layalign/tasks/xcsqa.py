"""X-CSQA: commonsense questions with five choices in sixteen languages, a file of JSON lines each; answered by a letter.

As published `x-csqa/{code}/dev.jsonl`, in its own release `X-CSR_datasets/X-CSQA/{code}/dev.jsonl` (where Japanese is
jap). Only the dev files have answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layalign.languages import XCSQA_GROUPS
from layalign.tasks import prompts
from layalign.tasks.choices import Choices
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.reading import Row, field, text
from layalign.tasks.task import Task


def problem(place: str, row: Row) -> dict[str, Any]:
    """The question with its lettered choices, and the letter that is right; ValueError with its place."""
    question = field(place, row, ("question",))
    if not isinstance(question, Mapping):
        raise ValueError(f"{place}: question: got {question!r}, takes an object with stem and choices")
    stem = text(place, "question.stem", _alone(field(f"{place}: question", question, ("stem",)), str))
    choices = _choices(place, field(f"{place}: question", question, ("choices",)))
    letters = [prompts.letter(number) for number in range(len(choices))]
    answer = field(place, row, ("answerKey",))
    if answer not in letters:
        raise ValueError(f"{place}: answerKey: got {answer!r}, takes one of {', '.join(letters)}")
    return {"question": prompts.xcsqa(stem, choices), "answer": answer, "choices": letters}


def _choices(place: str, found: Any) -> list[str]:
    """Texts of [{"label", "text"}, ...] or, as `datasets` keeps them, {"label": [...], "text": [...]}."""
    alone = _alone(found, Mapping)
    if isinstance(alone, Mapping) and isinstance(alone.get("text"), list):
        found = alone
    if isinstance(found, Mapping):
        columns = [field(f"{place}: question.choices", found, (name,)) for name in ("label", "text")]
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise ValueError(f"{place}: question.choices: label and text take two lists of the same length")
        found = [dict(zip(("label", "text"), pair, strict=True)) for pair in zip(*columns, strict=True)]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(choice, Mapping) for choice in found):
        raise ValueError(f"{place}: question.choices: got {found!r}, takes a list of at least two, each label and text")
    texts = []
    for number, choice in enumerate(found):
        where, letter = f"{place}: question.choices[{number}]", prompts.letter(number)
        if choice.get("label", letter) != letter:
            raise ValueError(f"{where}: label: got {choice['label']!r}, takes {letter!r}, as the letters are in order")
        texts.append(text(where, "text", field(where, choice, ("text",))))
    return texts


def _alone(value: Any, kind: type) -> Any:
    """What a list of one such thing holds: older versions of the dataset keep a question so."""
    one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], kind)
    return value[0] if one else value


FILES = LanguageFiles(
    task="xcsqa",
    hub="INK-USC/xcsr",
    problem=problem,
    places=("x-csqa", "xcsqa", "X-CSQA", "X-CSR_datasets/X-CSQA", "", "evaluation/x-csqa"),
    patterns=("{code}/dev.jsonl",),
    order=XCSQA_GROUPS["avg"],
    configuration="X-CSQA-{code}",
    split="validation",
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=Choices(), prompt=prompts.SAME_TEXT, groups=XCSQA_GROUPS)
