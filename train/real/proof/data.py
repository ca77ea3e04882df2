"""What the proof trains on: two JSON-lines files and a report of what was left out."""

import json
import random

from layalign.kernels.files import write_json
from layalign.train.checkpoints import damage, sealed_folder
from layalign.train.real.decontaminate import benchmark_texts, decontaminated
from layalign.train.real.problems import task_records, translation_records
from layalign.train.real.tatoeba import training_pairs

REPORT = "report.json"
LONGEST_TARGET = 60
REAL_SHARE = 0.25


def prepare(folder, counts, data=None, real_share=REAL_SHARE, seed=0):
    """Write translation.jsonl and task.jsonl into `folder` unless they are there; return the report.

    counts: {"translation": records, "task": records}, each at least 1. data: folder with Tatoeba pairs and the sets that
    are tested on, pathlib.Path or None. real_share: so much of the translation records are real sentence pairs, or all
    those there are, with an English side of at most 60 characters; the rest is generated.

    Returns {"records": {stage: {"generated", "real"}}, "checked_against": {set: texts}, "removed": {stage: {set: ...}}}.

    Raises ValueError for a pair file of an unknown language.
    """
    if damage(folder) is None:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    tests = {} if data is None else benchmark_texts(data)
    kept, real, removed = {}, {}, {}
    for stage, make in (("translation", translation_records), ("task", task_records)):
        pairs, left_out = [], {}
        if stage == "translation":
            short = [pair for pair in training_pairs(data) if len(pair["target"]) <= LONGEST_TARGET]
            pairs, left_out = decontaminated(short, tests)
            random.Random(seed).shuffle(pairs)
            pairs = pairs[: int(real_share * counts[stage])]
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
        "seed": seed,
    }
    with sealed_folder(folder) as fresh:
        for stage, records in kept.items():
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            (fresh / f"{stage}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(fresh / REPORT, report)
    return report
