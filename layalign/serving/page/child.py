"""What runs in a server's process below the page: `python -m layalign.serving.page.child layalign|llm MODEL [OPTIONS]`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

# Seconds between looks at whether the page's process is there.
LOOK = 1.0


def end_with(parent: int) -> None:
    """Have this process told to end when its parent is gone, which an end by SIGKILL does not tell it.

    Args:
        parent: its process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(kind: str, model: str, *options: str) -> None:
    """Serve until told to end.

    Args:
        kind: "layalign", or "llm" for a model that is not LayAlign's.
        model: folder or hub name.
        options: of `vllm serve`.
    """
    from layalign.serving.server import run_vllm, serve

    if kind == "layalign":
        serve(model, options)
    else:
        run_vllm(model, options)


if __name__ == "__main__":
    end_with(os.getppid())
    main(*sys.argv[1:])
