"""Cache of converted models: sealed folders that know what they were made of."""

import json
from pathlib import Path

from layalign.kernels.files import write_json
from layalign.train.checkpoints import damage, sealed_folder

ORIGIN = "origin.json"


def converted_folder(folder, origin, write):
    """`folder` as a Path, written by `write(folder)` unless it is whole and of this origin.

    origin: dict of strings and numbers (the source file's hash, the converter's version). A folder of another origin or
    one that is damaged is replaced once its successor is complete.
    """
    folder = Path(folder)
    if damage(folder) is None and _origin(folder) == origin:
        return folder
    if folder.exists():
        print(f"{folder} is stale or damaged; converting again", flush=True)
    with sealed_folder(folder) as fresh:
        write(fresh)
        write_json(fresh / ORIGIN, origin)
    return folder


def _origin(folder):
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
