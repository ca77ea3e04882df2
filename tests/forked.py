"""Python processes that begin with torch, transformers and the trainer imported: forks of one process that the tests of a session share.

The imports take a process seconds, what it does then often less. A fork has its own arguments, files, folder and environment, and ends
as any process does; only what the imports read of the environment is that of the session. Run as a program this is the process that
forks: it is told the number of the socket through which it is asked.
"""

import atexit
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 1 << 20  # bytes of a request
OWN = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # of the environment


class Fork:
    """One of these processes; what of `stdin`, `stdout` and `stderr` is a pipe is a text file here, as of subprocess.Popen."""

    def __init__(self, link, request, files):
        ends = {name: os.pipe() if file == subprocess.PIPE else None for name, file in files.items()}
        with open(os.devnull, "r+b", buffering=0) as nowhere:
            theirs = []
            for name, file in files.items():
                if ends[name]:
                    theirs.append(ends[name][name != "stdin"])
                else:
                    theirs.append(nowhere.fileno() if file == subprocess.DEVNULL else file.fileno())
            socket.send_fds(link, [json.dumps(request).encode()], theirs)
        for name, pipe in ends.items():
            if pipe:
                os.close(pipe[name != "stdin"])
                setattr(self, name, open(pipe[name == "stdin"], "w" if name == "stdin" else "r", encoding="utf-8"))  # noqa: SIM115
        self._link, self.pid, self.returncode = link, int(link.recv(MOST)), None

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self):
        """Its exit status; minus the number of the signal that ended it."""
        if self.returncode is None:
            self._link.send(json.dumps({"wait": self.pid}).encode())
            self.returncode = int(self._link.recv(MOST))
        return self.returncode

    def communicate(self, text=""):
        """All that it still writes to standard output and standard error, both pipes, after it has read the text."""
        if hasattr(self, "stdin"):
            with self.stdin:
                self.stdin.write(text)
        with self.stdout, self.stderr, ThreadPoolExecutor(1) as beside:
            errors = beside.submit(self.stderr.read)
            printed = self.stdout.read()
            self.wait()
            return printed, errors.result()


class Forks:
    """Starts them; the process that forks begins with the first."""

    def __init__(self):
        self._link, self._server = None, None

    def start(self, arguments, *, stdin=subprocess.DEVNULL, stdout, stderr, cwd=None, env=None):
        """A Fork that does what `python ARGUMENTS` does: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.

        Args:
            arguments: strings or paths.
            stdin, stdout, stderr: subprocess.PIPE, subprocess.DEVNULL or an open file.
            cwd: the folder it works in; None: this process's.
            env: of the environment, what is not as in this process.
        """
        if self._server is None:
            self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, __file__, str(theirs.fileno())]
                self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | OWN)
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd or os.getcwd()),
            "env": os.environ | OWN | (env or {}),
        }
        return Fork(self._link, request, {"stdin": stdin, "stdout": stdout, "stderr": stderr})

    def run(self, arguments, *, stdin=subprocess.DEVNULL, cwd=None):
        """A subprocess.CompletedProcess of text, when it has ended."""
        pipe = subprocess.PIPE
        fork = self.start(arguments, stdin=stdin, stdout=pipe, stderr=pipe, cwd=cwd)
        printed, errors = fork.communicate()
        return subprocess.CompletedProcess(arguments, fork.returncode, printed, errors)

    def close(self):
        if self._server is not None:
            self._link.close()
            self._server.wait()


def serve(link):
    """What is asked, in the fork that is to do it; never returns in the process that forks."""
    while message := (received := socket.recv_fds(link, MOST, 3))[0]:
        request, files = json.loads(message), received[1]
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                link.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
            for file in files:
                os.close(file)
            if answer == 0:
                return request
        link.send(str(answer).encode())
    sys.exit()


def become(request):
    """Do what `python` does with these arguments, and end without taking the imported modules apart, which takes as long as many a test."""
    try:
        _run(request)
        status = 0
    except SystemExit as leaving:
        status = leaving.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def _run(request):
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    first, *rest = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import matplotlib.pyplot  # noqa: F401
    import torch

    import layalign.cli
    import layalign.evaluation.run
    import layalign.generation.jobs
    import layalign.train.stages  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a fork's collections would copy all that it shares
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
