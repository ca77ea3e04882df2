"""What the harness's YAML files name: problems of our tasks as its documents, and our scorers as its metrics."""

from __future__ import annotations

from typing import Any

from layalign.tasks import find_task, load_task


def documents(task: str, language: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The problems of one task in one language, as a split "test" of the harness.

    Args:
        task: a name of `layalign.tasks`.
        language: a code.
        data: where its files are, as `layalign evaluate --data` takes it; `--metadata data=...` on the harness's command line.
        _: what else the harness passes.

    Raises:
        ValueError: as `load_task`.
    """
    import datasets

    prompt = find_task(task).prompt or ""
    # Columns have one type: a number is written out, which every scorer reads.
    rows = [{**row, "answer": str(row["answer"]), "prompt": prompt} for row in load_task(task, data, [language])]
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The verdicts of a task's own scorers on one answer: 1.0 or 0.0 by the scorer's name."""
    fields = find_task(doc["task"]).scoring.fields(results[0], doc["answer"])
    return {name: float(value) for name, value in fields.items() if isinstance(value, bool)}
