"""Trains on more data than it holds. Run as `python constant_memory.py LINES FOLDER [key=value ...]`.

Writes LINES line-aligned pairs (and nothing else of use) below FOLDER, tokenises and trains on them with the tiny bases, twice:
the second time from the cache. Printed as JSON: seconds, and by how many MB the process has grown at most since the models were
loaded, of its own memory (`anonymous`) and with the mapped files' pages that happen to be in memory (`resident`).
"""

import json
import random
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

from layalign.train import stages
from layalign.train.recipe import Recipe
from layalign.train.settings import build, override

SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnpstvwz" for vowel in "aeiou"]


def write_pairs(folder, lines):
    """Sentences of 4 to 18 words in two made-up languages, made again and again from a stock of 5,000."""
    generator = random.Random(0)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(5000)]
    for name in ("a.sw", "a.en"):
        with open(folder / name, "w", encoding="utf-8") as file:
            for _ in range(lines):
                file.write(" ".join(generator.choices(words, k=generator.randint(4, 18))) + "\n")


class Growth(threading.Thread):
    """Watches this process's memory, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.begin, self.most, self.ended = self.now(), {}, threading.Event()

    def now(self):
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        size = {key: int(status[name].split()[0]) / 1024 for key, name in NAMES.items()}
        return size

    def run(self):
        while not self.ended.wait(0.02):
            for key, size in self.now().items():
                self.most[key] = max(self.most.get(key, 0), size - self.begin[key])

    def stop(self):
        self.ended.set()
        self.join()
        return {key: round(size) for key, size in self.most.items()}


NAMES = {"anonymous": "RssAnon", "resident": "VmRSS"}


def run(values):
    recipe = build(Recipe, values)
    model, processor = stages.build(recipe)
    growth = Growth()
    growth.start()
    start = time.perf_counter()
    data = stages.read_stage_data("translation", recipe, processor)
    read = time.perf_counter() - start
    stages.run_stage("translation", recipe, model, processor)
    seconds = {"data": round(read, 1), "all": round(time.perf_counter() - start, 1)}
    return {"records": len(data.train), "seconds": seconds, "grown_mb": growth.stop()}


def main(lines, folder, *overrides):
    torch.set_num_threads(1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    write_pairs(folder, int(lines))
    written = time.perf_counter() - start
    source = {"format": "pairs", "path": "a.sw", "target_path": "a.en", "lang": "sw"}
    stage = {"data": [source], "hold_out": 64, "steps": 20, "batch_size": 8, "eval_steps": 10, "length_grouped": True}
    values = {
        "encoder": "layalign:tiny_encoder",
        "llm": "layalign:tiny_llm",
        "output": str(folder / "run"),
        "data_root": str(folder),
        "cache": str(folder / "cache"),
        "device": "cpu",
        "progress": False,
        "stages": {"translation": stage},
    }
    for assignment in overrides:
        override(values, assignment)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    found = {"lines": int(lines), "written": round(written, 1)}
    for name in ("first", "cached"):
        shutil.rmtree(folder / "run", ignore_errors=True)
        found[name] = run(values)
    found["cache_mb"] = round(
        sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e6
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
