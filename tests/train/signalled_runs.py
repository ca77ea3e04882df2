"""Trains a recipe to its end in spite of signals. Run as `python signalled_runs.py RECIPE.yaml OUTPUT SIGNAL@WHERE ...`.

SIGNAL is TERM or INT. WHERE is `batch:N`, in the attempt's N-th forward call (an evaluation's among them), `step:N`, between
the N-th optimizer step and what follows it, or `time:S`, after S seconds. The last attempt runs to its end. Printed as JSON:
the exit status of each attempt, the last line that it wrote to standard error, the history, and the seconds of the last
attempt. Attempts are forks of one process, so that torch and transformers are imported once.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time

import torch
from torch.optim.lr_scheduler import LambdaLR

from layalign import LayAlignForConditionalGeneration
from layalign.train.recipe import load_recipe
from layalign.train.stages import train

NUMBERS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT}


def arm(what):
    name, where = what.split("@")
    kind, _, number = where.partition(":")

    def send():
        os.kill(os.getpid(), NUMBERS[name])

    if kind == "time":
        threading.Timer(float(number), send).start()
        return
    owner, method = (LayAlignForConditionalGeneration, "encode") if kind == "batch" else (LambdaLR, "step")
    function, calls = getattr(owner, method), []
    # A scheduler steps once when it is made.
    count = int(number) + (kind == "step")

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            send()
        return function(*args, **kwargs)

    setattr(owner, method, counting)


def attempt(recipe, what):
    """The exit status of an attempt, and the last line on its standard error."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            arm(what)
            status = 0
            try:
                train(recipe)
            except SystemExit as leaving:
                status = leaving.code
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        lines = errors.read().splitlines()
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else ""


def main(file, output, signals):
    torch.set_num_threads(1)
    recipe = load_recipe(file, [f"output={output}"])
    ended = [attempt(recipe, what) for what in signals]
    began = time.monotonic()
    history = train(recipe)[2]
    print(json.dumps({"ended": ended, "history": history, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
