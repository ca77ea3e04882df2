"""The folder that a command writes its results into."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def check_output(folder: Path, kind: str, marker: str, unmarked: Collection[str] = ()) -> None:
    """Refuse a folder of someone else's, so that no file there is ever replaced.

    Args:
        folder: where results shall go; may not exist yet.
        kind: what is written there, for the message.
        marker: the file that says so.
        unmarked: files that a killed command may have left before its marker, beside what `whole_file` leaves.

    Raises:
        ValueError: it is a file, or holds something and no marker.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file, takes a folder")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    left = {name for name in names if name in unmarked or (name.startswith(".") and name.endswith(".partial"))}
    if marker not in names and names - left:
        raise ValueError(f"output: {folder} exists and holds no {kind}; choose another folder")
