"""Trains a recipe to its end in spite of kills. Run as `python killed_runs.py RECIPE.yaml OUTPUT KILL ...`.

Each KILL is where one attempt is killed with SIGKILL: `sync:N`, at its N-th fsync (every state of the files that a
crash can leave), `save:N`, in the middle of its N-th torch.save, `batch:N`, in its N-th forward call, or `time:S`, after
S seconds. The last attempt runs to its end. Printed as JSON: the kills that took place, the seconds and the history of
the last attempt. Attempts are forks of one process, so that torch and transformers are imported once.
"""

import json
import os
import signal
import sys
import threading
import time

import torch

from layalign import LayAlignForConditionalGeneration
from layalign.train.recipe import load_recipe
from layalign.train.stages import train


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill):
    kind, _, number = kill.partition(":")
    if kind == "time":
        threading.Timer(float(number), die).start()
    elif kind == "sync":
        os.fsync = dying_at(int(number), os.fsync)
    elif kind == "save":
        torch.save = dying_at(int(number), torch.save, after=half)
    else:
        for name in ("encode", "encode_packed"):
            function = getattr(LayAlignForConditionalGeneration, name)
            setattr(LayAlignForConditionalGeneration, name, dying_at(int(number), function))


def half(_, path):
    """Cut a written file in two, as one is that is being written."""
    os.truncate(path, os.path.getsize(path) // 2)


def dying_at(count, function, after=None):
    """The function, which at its `count`-th call kills the process: before it does anything, or after it and `after`."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            if after is not None:
                function(*args, **kwargs)
                after(*args)
            die()
        return function(*args, **kwargs)

    return counting


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
    killed = [kill for kill in kills if attempt(recipe, kill)]
    start = time.perf_counter()
    history = train(recipe)[2]
    print(json.dumps({"killed": killed, "seconds": time.perf_counter() - start, "history": history}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
