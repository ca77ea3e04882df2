"""Cache of converted models: a folder with a manifest of its origin and of its files' hashes."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from layalign.train.real.fetch import sha256_of

MANIFEST = "manifest.json"


def converted_folder(folder, origin, write):
    """`folder` as a Path, written by `write(folder)` unless it is whole and of this origin.

    origin is a dict of strings and numbers (the source file's hash, the converter's version); a folder of another
    origin, or one whose files do not have the hashes of its manifest, is replaced. It is written beside and renamed.
    """
    folder = Path(folder)
    if is_whole(folder, origin):
        return folder
    if folder.exists():
        print(f"{folder} is stale or damaged; converting again", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        write(fresh)
        files = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
        (fresh / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2))
        if folder.exists():
            os.rename(folder, work / "stale")
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(work)
    return folder


def is_whole(folder, origin):
    """Whether the folder's manifest names this origin and every file in it has the manifest's hash."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text())
        files = manifest["files"]
        return manifest["origin"] == origin and all(
            sha256_of(Path(folder) / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
