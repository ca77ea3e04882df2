"""XCOPA: which of two sentences is the cause or the effect of a premise, in eleven languages; a file of JSON lines each.

No experiment of the paper: a test whether a model trained on X-CSQA carries commonsense over to questions, and to
languages (Estonian, Haitian Creole, Quechua, ...), that it has not seen. It is asked as an X-CSQA question with two
options; what is asked for stands in English behind the premise, as the files say it (cause or effect).
"""

from __future__ import annotations

from typing import Any

from layalign.languages import XCOPA_GROUPS
from layalign.tasks import prompts
from layalign.tasks.choices import Choices
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.reading import Row, field, text
from layalign.tasks.task import Task


def problem(place: str, row: Row) -> dict[str, Any]:
    """The premise and what is asked of it with two lettered choices, and the letter that is right; ValueError with its
    place.
    """
    premise = text(place, "premise", field(place, row, ("premise",)))
    asked = field(place, row, ("question",))
    if not isinstance(asked, str) or asked not in prompts.COPA:
        raise ValueError(f"{place}: question: got {asked!r}, takes cause or effect")
    choices = [text(place, name, field(place, row, (name,))) for name in ("choice1", "choice2")]
    label = field(place, row, ("label",))
    if isinstance(label, bool) or label not in (0, 1):
        raise ValueError(f"{place}: label: got {label!r}, takes 0 or 1")
    letters = ["A", "B"]
    question = prompts.xcsqa(f"{premise} {prompts.COPA[asked]}", choices)
    return {"question": question, "answer": letters[int(label)], "choices": letters}


FILES = LanguageFiles(
    task="xcopa",
    hub="cambridgeltl/xcopa",
    problem=problem,
    places=("data", "xcopa", "xcopa/data", "", "evaluation/xcopa"),
    patterns=("{code}/test.{code}.jsonl",),
    order=XCOPA_GROUPS["avg"],
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=Choices(), prompt=prompts.SAME_TEXT, groups=XCOPA_GROUPS)
