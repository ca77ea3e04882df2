"""The LLM's heads in two processes: the tokens of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import NEW, save_model

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

ROOT = Path(__file__).parents[2]
# In a process of its own: engines in this one have begun vLLM's groups of one.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, questions, new, result = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_num_seqs=64, max_model_len=256, tensor_parallel_size=2)
    greedy = SamplingParams(temperature=0, max_tokens=new, min_tokens=new)
    outs = llm.generate(questions, greedy, use_tqdm=False)
    json.dump([list(out.outputs[0].token_ids) for out in outs], open(result, "w"))
"""


def test_two_processes_write_the_tokens_of_one(tmp_path, questions):
    """A gate each head, so that each process has gates of its own."""
    from tests.serving.conftest import generated

    folder = save_model(tmp_path / "model", gate="head")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        tmp_path / "script.py",
        folder,
        json.dumps(questions),
        str(NEW),
        tmp_path / "tokens.json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "tokens.json").read_text()) == generated(folder, questions, least=NEW)
