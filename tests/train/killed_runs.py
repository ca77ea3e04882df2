"""Trains a recipe to its end in spite of kills. Run as `python killed_runs.py RECIPE.yaml OUTPUT KILL ...`.

Each KILL is where one attempt is killed with SIGKILL: `sync:N`, at its N-th fsync (every state of the files that a
crash can leave), or a number of seconds. The last attempt runs to its end; the history of the run is printed as JSON.
Attempts are forks of one process, so that torch and transformers are imported once.
"""

import json
import os
import signal
import sys
import threading
import time

import torch

from layalign.train import checkpoints
from layalign.train.recipe import load_recipe
from layalign.train.stages import train


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill):
    kind, _, number = kill.rpartition(":")
    if kind != "sync":
        threading.Timer(float(number), die).start()
        return
    left = [int(number)]
    fsync = checkpoints._fsync

    def counting(path):
        left[0] -= 1
        if left[0] <= 0:
            die()
        fsync(path)

    checkpoints._fsync = counting


def attempt(recipe, kill):
    """True if the attempt was killed, False if it came to its end before."""
    child = os.fork()
    if child == 0:
        arm(kill)
        train(recipe)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"the attempt to be killed at {kill} failed by itself")
    return os.WIFSIGNALED(status)


def main(file, output, kills):
    torch.set_num_threads(1)
    recipe = load_recipe(file, [f"output={output}"])
    killed = sum(attempt(recipe, kill) for kill in kills)
    start = time.perf_counter()
    history = train(recipe)[2]
    print(json.dumps({"killed": killed, "seconds": time.perf_counter() - start, "history": history}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
