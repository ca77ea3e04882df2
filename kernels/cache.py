"""Where what is measured, compiled or fetched once is kept."""

import os
from pathlib import Path


def cache_folder(given=None):
    """`given`, else $LAYALIGN_CACHE, else layalign under $XDG_CACHE_HOME or ~/.cache."""
    folder = given or os.environ.get("LAYALIGN_CACHE")
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "layalign").expanduser()


def write_whole(path, text):
    """Write beside and rename, so that readers see the old content or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
