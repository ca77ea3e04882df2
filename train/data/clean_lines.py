"""Records without those that are evaluation texts, and the report of what was left out."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from layalign.kernels.files import write_json, write_text

if TYPE_CHECKING:
    from layalign.train.data.decontamination import EvaluationTexts
    from layalign.train.data.sources import Line

logger = logging.getLogger(__name__)

REMOVED = "removed.jsonl"
REPORT = "decontamination"
_CHUNK = 1024
_EXAMPLES = 20
_LONGEST = 300


class CleanLines:
    """The lines of a stream that have nothing in common with evaluation texts; the others are written down.

    Args:
        lines: the stream, read once.
        unwanted: the evaluation texts; None: every line passes.
        removed: where the list of what was left out goes, a JSON object a line.

    Attributes:
        read: lines so far.
    """

    def __init__(self, lines: Iterable[Line], unwanted: EvaluationTexts | None, removed: IO[str]):
        self._lines, self._unwanted, self._file, self.read = iter(lines), unwanted, removed, 0
        self._kinds, self._counts = Counter[str](), Counter[tuple[str, str]]()
        self._of: Counter[tuple[str, str]] = Counter()
        self._totals: Counter[tuple[str, str]] = Counter()
        self._examples: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[Line]:
        if self._unwanted is None:
            for line in self._lines:
                self.read += 1
                yield line
            return
        while some := list(itertools.islice(self._lines, _CHUNK)):
            self.read += len(some)
            sides = [self._unwanted.matches([line.record[side] for line in some]) for side in ("source", "target")]
            for line, of_source, of_target in zip(some, *sides, strict=True):
                self._totals[line.origin, line.record["lang"]] += 1
                if of_source is None and of_target is None:
                    yield line
                else:
                    self._remove(line, "target" if of_source is None else "source", of_source or of_target)

    def _remove(self, line, side, match):
        self._kinds[match.kind] += 1
        self._counts[line.origin, line.record["lang"]] += 1
        self._of[match.item.origin, match.item.lang] += 1
        entry = {
            "place": line.place,
            "lang": line.record["lang"],
            "side": side,
            "kind": match.kind,
            "text": line.record[side],
            "evaluation": match.item._asdict(),
            "words": match.words,
        }
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if len(self._examples) < _EXAMPLES:
            self._examples.append(entry)

    def summary(self) -> dict[str, Any] | None:
        """What was left out, as a JSON object; None if nothing was looked for."""
        if self._unwanted is None:
            return None
        searched = Counter((item.origin, item.lang) for item in self._unwanted.items)
        return {
            "ngram": self._unwanted.ngram,
            "read": self.read,
            "removed": sum(self._kinds.values()),
            "by_kind": dict(self._kinds),
            "by_source": [
                {"source": origin, "lang": lang, "read": read, "removed": self._counts[origin, lang]}
                for (origin, lang), read in sorted(self._totals.items())
            ],
            "by_evaluation": [
                {"evaluation": origin, "lang": lang, "texts": texts, "removed": self._of[origin, lang]}
                for (origin, lang), texts in searched.items()
            ],
            "examples": self._examples,
        }


def report_removed(
    run: Path, name: str, store: Path, summary: dict[str, Any], called: Callable[[str], str] = str
) -> None:
    """Say what was left out, and write it into the stage's folder: decontamination.json, .md and, in full, .jsonl.

    Args:
        run: the stage's folder.
        name: of the stage.
        store: folder of the cache that has the list.
        summary: `CleanLines.summary`.
        called: gives a place or source by the name that its file has now.
    """
    summary = summary | {
        "by_source": [row | {"source": called(row["source"])} for row in summary["by_source"]],
        "examples": [row | {"place": called(row["place"])} for row in summary["examples"]],
    }
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / f"{REPORT}.json", summary)
    write_text(run / f"{REPORT}.md", _readable(name, summary))
    shutil.copyfile(store / REMOVED, run / f"{REPORT}.jsonl")
    kinds = summary["by_kind"]
    logger.warning(
        "%s: %d of %d records left out, which are evaluation texts (%d exactly, %d by %d words in a row): %s",
        name,
        summary["removed"],
        summary["read"],
        kinds.get("exact", 0),
        kinds.get("ngram", 0),
        summary["ngram"],
        run / f"{REPORT}.md",
    )


def _readable(name, summary):
    kinds = summary["by_kind"]
    lines = [
        f"# Decontamination of {name}",
        "",
        f"{summary['removed']} of {summary['read']} records left out: {kinds.get('exact', 0)} are an evaluation text, "
        f"{kinds.get('ngram', 0)} have {summary['ngram']} words in a row in common with one.",
        "",
        *_table(("source", "lang", "read", "removed"), summary["by_source"]),
        "",
        *_table(("evaluation", "lang", "texts", "removed"), summary["by_evaluation"]),
    ]
    for row in summary["examples"]:
        item = row["evaluation"]
        where = f"{item['origin']} {item['lang']} {item['number']}".replace("  ", " ")
        lines += [
            "",
            f"- {row['place']}, {row['side']}, {row['kind']}, {where}",
            f"  - training: {_short(row['text'])}",
            f"  - evaluation: {_short(item['text'])}",
        ]
    return "\n".join(lines) + "\n"


def _table(columns, rows):
    shown = [" | ".join(str(row[column]).replace("|", "\\|") for column in columns) for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *(f"| {row} |" for row in shown)]


def _short(text):
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
