"""Trains a recipe in several ways, one after the other. Run as `python together.py RECIPE.yaml JOBS`, JOBS a list in JSON.

A job is {"processes": N, "overrides": [...], "environment": {...}, "stop": STEP, "logits": COUNT}; with `stop` all its processes
end before that step, with `logits` the output layer makes so many at a time, with `call_tokens` a call of the encoder for packed questions
costs as much as so many tokens. Printed as JSON, for each job: the statuses of its
processes, what they wrote to standard error, the seconds it took, and of each process how many bytes of encoder and LLM it held
while it trained ([held, all], per stage). Processes are forks of one process, so that torch and transformers are imported once.
"""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainerCallback

from layalign import label_loss, packing
from layalign.shards import counts
from layalign.train.recipe import load_recipe
from layalign.train.stages import train


class Look(TrainerCallback):
    """Counts the bytes of the bases, and stops where it is told."""

    def __init__(self, stop):
        self.stop, self.held = stop, []

    def on_train_begin(self, args, state, control, model, **kwargs):
        model = getattr(model, "module", model)
        bases = [
            parameter for base in (model.encoder, model.llm) if base is not None for parameter in base.parameters()
        ]
        every, mine = zip(*(counts(parameter) for parameter in bases), strict=True)
        sizes = [parameter.element_size() for parameter in bases]
        self.held.append([sum(n * size for n, size in zip(part, sizes, strict=True)) for part in (mine, every)])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            os._exit(9)


def begin(recipe, rank, port, job, folder):
    child = os.fork()
    if child:
        return child
    with open(folder / f"{rank}.err", "w") as errors:
        os.dup2(errors.fileno(), 2)
    if job["processes"] > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        counted = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job["processes"]))
        os.environ.update(where | counted, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(job.get("environment", {}))
    label_loss.CPU_LOGITS = job.get("logits", label_loss.CPU_LOGITS)
    packing.CPU_CALL_TOKENS = job.get("call_tokens", packing.CPU_CALL_TOKENS)
    look, status = Look(job.get("stop")), 1
    try:
        train(load_recipe(recipe, job["overrides"]), callbacks=[look])
        status = 0
    except ValueError as error:
        print(f"layalign: {error}", file=sys.stderr)
        status = 2
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
    (folder / f"{rank}.json").write_text(json.dumps(look.held))
    sys.stderr.flush()
    os._exit(status)


def run(recipe, job, folder):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    start = time.perf_counter()
    children = [begin(recipe, rank, port, job, folder) for rank in range(job["processes"])]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    held = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    errors = [path.read_text() for path in sorted(folder.glob("*.err"))]
    return {"statuses": statuses, "errors": errors, "held": held, "seconds": time.perf_counter() - start}


def main(recipe, jobs):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    if find_spec("deepspeed"):
        import deepspeed.ops

        # It would compile collectives over shared memory, for minutes; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    done = []
    for job in json.loads(jobs):
        with tempfile.TemporaryDirectory() as folder:
            done.append(run(recipe, job, Path(folder)))
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
