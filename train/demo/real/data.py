"""What the experiment trains on: two JSON-lines files and a report of what was left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from layalign.folders import damage
from layalign.kernels.files import write_json, write_text
from layalign.train.checkpoints import sealed_folder
from layalign.train.demo.problems import REAL
from layalign.train.demo.real.decontaminate import benchmark_texts, decontaminated
from layalign.train.demo.real.interfaces import LICENCES
from layalign.train.demo.real.tatoeba import LICENCE, training_pairs

REPORT = "report.json"
LONGEST_TARGET = 60
REAL_SHARE = 0.25


def prepare(
    folder: Path,
    counts: dict[str, int],
    data: Path | None = None,
    real_share: float = REAL_SHARE,
    seed: int = 0,
    further: Callable[[], list[dict]] = list,
) -> dict:
    """Write translation.jsonl and task.jsonl into `folder` unless they are there; return the report.

    Args:
        folder: where they go.
        counts: {"translation": records, "task": records}, each at least 1.
        data: folder with Tatoeba pairs and the sets that are tested on.
        real_share: so much of the translation records are real sentence pairs, or all those there are, with an English
            side of at most 60 characters; the rest is generated.
        seed: of the generated records and of the choice of pairs.
        further: gives real sentence pairs beside those in `data`.

    Returns:
        {"records": {stage: {"generated", "real"}}, "checked_against": {set: texts}, "removed": {stage: {set: ...}}, "real_languages":
        {lang: pairs}, "sources": {whose texts: licence}}.

    Raises:
        ValueError: a pair file of an unknown language.
    """
    if damage(folder) is None:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    tests = {} if data is None else benchmark_texts(data)
    kept, real, removed = {}, {}, {}
    languages: dict[str, int] = {}
    sources: dict[str, str] = {}
    for stage, make in (("translation", REAL.translation_records), ("task", REAL.task_records)):
        pairs: list[dict] = []
        left_out: dict = {}
        if stage == "translation":
            exported, fetched = training_pairs(data), further()
            sources = (LICENCE if exported else {}) | (LICENCES if fetched else {})
            short = [pair for pair in (*exported, *fetched) if len(pair["target"]) <= LONGEST_TARGET]
            pairs, left_out = decontaminated(short, tests)
            random.Random(seed).shuffle(pairs)
            pairs = pairs[: int(real_share * counts[stage])]
            languages = dict(sorted(Counter(pair["lang"] for pair in pairs).items()))
        # A tenth more than is needed, for what is taken out.
        needed = counts[stage] - len(pairs)
        generated, too = decontaminated(make(needed + needed // 10 + 10, seed), tests)
        if len(generated) < needed:
            raise ValueError(
                f"data: only {len(generated)} of {needed} generated {stage} records share nothing with the tests"
            )
        kept[stage], real[stage] = pairs + generated[:needed], len(pairs)
        removed[stage] = {"real": left_out, "generated": too}
    report = {
        "records": {stage: {"generated": len(kept[stage]) - real[stage], "real": real[stage]} for stage in kept},
        "checked_against": {name: len(texts) for name, texts in tests.items()},
        "removed": removed,
        "real_languages": languages,
        "sources": sources,
        "seed": seed,
    }
    write_records(folder, kept, report)
    return report


def write_records(folder: Path, kept: dict[str, list[dict]], report: dict) -> None:
    """Write STAGE.jsonl for each of {stage: records}, and the report."""
    with sealed_folder(folder) as fresh:
        for stage, records in kept.items():
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            write_text(fresh / f"{stage}.jsonl", "\n".join(lines) + "\n")
        write_json(fresh / REPORT, report)
