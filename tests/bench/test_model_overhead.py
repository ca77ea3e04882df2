"""bench/model_overhead.py runs at a small size; its own check that LayAlign and the published scheme agree runs with it."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "model_overhead.py"


def test_small_run(tmp_path):
    output = tmp_path / "overhead.json"
    sizes = {"layers": 2, "encoder-layers": 2, "batch": 2, "encoder-tokens": 24, "prompt-tokens": 24, "tokens": 3}
    command = [
        sys.executable,
        str(SCRIPT),
        "--rounds",
        "2",
        "--threads",
        "1",
        "--output",
        str(output),
        "--ragged",
        "--cpu-time",
    ]
    command += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report == json.loads(done.stdout.splitlines()[0])
    for work in ("train_step", "generate"):
        assert list(report[work]) == ["bare", "layalign", "published"]
        assert all(row["median_seconds"] > 0 and len(row["seconds"]) == 2 for row in report[work].values())
