"""XNLI: does one sentence follow from another, in fifteen languages in one file; answered by the label's name.

As published `xnli/test.json` (a JSON list), in its own release `XNLI-1.0/xnli.test.jsonl` and `xnli.test.tsv`.
"""

from __future__ import annotations

from typing import Any

from layalign.languages import XNLI_GROUPS
from layalign.tasks import prompts
from layalign.tasks.choices import Choices
from layalign.tasks.language_files import LanguageFiles
from layalign.tasks.reading import Row, field, text
from layalign.tasks.task import Task

# In the order of the dataset's numbers.
LABELS = ("entailment", "neutral", "contradiction")


def problem(place: str, row: Row) -> dict[str, Any]:
    """The pair as the published prompt has it, and its label; ValueError with its place."""
    premise = text(place, "sentence1", field(place, row, ("sentence1", "premise")))
    hypothesis = text(place, "sentence2", field(place, row, ("sentence2", "hypothesis")))
    label = field(place, row, ("gold_label", "label"))
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(LABELS):
        label = LABELS[label]
    if label not in LABELS:
        raise ValueError(f"{place}: label: got {label!r}, takes {', '.join(LABELS)}, or 0 to 2 for them")
    return {"question": prompts.xnli(premise, hypothesis), "answer": label, "choices": list(LABELS)}


FILES = LanguageFiles(
    task="xnli",
    hub="facebook/xnli",
    problem=problem,
    places=("xnli", "XNLI-1.0", "xnli/XNLI-1.0", "", "evaluation/xnli"),
    shared=("test.json", "xnli.test.jsonl", "xnli.test.tsv"),
    order=XNLI_GROUPS["avg"],
)
TASK = Task(name=FILES.task, load=FILES.load, scoring=Choices(), prompt=prompts.SAME_TEXT, groups=XNLI_GROUPS)
