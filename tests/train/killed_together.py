"""Trains a recipe in two processes in spite of kills of one of them. Run as `python killed_together.py RECIPE.yaml OUTPUT KILL@RANK ...`.

KILL is as in killed_runs.py, RANK the process that is killed. The other one is then ended as torchrun does it: SIGTERM, later
SIGKILL. The last attempt runs to its end. Printed as JSON: the kills that took place.
"""

import json
import os
import signal
import socket
import sys
import time

import torch
from killed_runs import arm

from layalign.train.recipe import load_recipe
from layalign.train.stages import train

GRACE = 5.0


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def begin(recipe, rank, port, kill):
    child = os.fork()
    if child:
        return child
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    if kill:
        arm(kill)
    train(recipe)
    os._exit(0)


def attempt(recipe, kill=None, victim=None):
    """True if the victim was killed, False if the run came to its end before."""
    port = free_port()
    running = {begin(recipe, rank, port, kill if rank == victim else None): rank for rank in range(2)}
    first, status = os.wait()
    rank = running.pop(first)
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"process {rank} failed by itself, killed was {kill}@{victim}")
    (other,) = running
    if killed:
        assert rank == victim
        os.kill(other, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and os.waitpid(other, os.WNOHANG)[0] == 0:
            time.sleep(0.05)
        else:
            if time.monotonic() >= until:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
    elif os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) != 0:
        sys.exit(f"the process beside {rank} failed by itself")
    return killed


def main(file, output, kills):
    torch.set_num_threads(1)
    recipe = load_recipe(file, [f"output={output}"])
    killed = []
    for what in kills:
        kill, _, rank = what.partition("@")
        if attempt(recipe, kill, int(rank)):
            killed.append(what)
    attempt(recipe)
    print(json.dumps({"killed": killed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
