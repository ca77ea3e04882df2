"""Rows of a task from the `datasets` library: a name on the hub, a folder of data files, or one that `save_to_disk` wrote.

Names are streamed and saved folders mapped into memory, so that only those rows are read that are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from layalign.spelling import first_line
from layalign.tasks.reading import Row

# Where the hub keeps the rows of a dataset that is still a script, which `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"
_SAVED = ("dataset_dict.json", "state.json")


class Opener(Protocol):
    """Opens rows from their start."""

    def __call__(self) -> Iterator[tuple[str, Row]]:
        """(place, row) of each."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder, or every folder in it that is a language's."""
    return any((place / name).is_file() for place in (folder, *_folders(folder)) for name in _SAVED)


def saved_parts(folder: Path) -> dict[str, Opener]:
    """{split, or language, or ""}: rows of a folder that `save_to_disk` wrote, or of the folders in it (a language each)."""
    import datasets

    if not any((folder / name).is_file() for name in _SAVED):
        parts: dict[str, Opener] = {}
        for place in _folders(folder):
            if any((place / name).is_file() for name in _SAVED):
                inner = saved_parts(place)
                parts |= {place.name if len(inner) == 1 else f"{place.name}/{part}": inner[part] for part in inner}
        return parts
    found = datasets.load_from_disk(str(folder))
    splits = found if isinstance(found, Mapping) else {"": found}
    return {name: partial(_rows, f"{folder}{name and f' ({name})'}", rows) for name, rows in splits.items()}


def configurations(name: str) -> tuple[list[str], dict[str, Any]]:
    """Names of a dataset's configurations, and what `load_dataset` must be told besides to find them."""
    import datasets

    try:
        return datasets.get_dataset_config_names(name), {}
    except RuntimeError:
        return datasets.get_dataset_config_names(name, revision=CONVERTED), {"revision": CONVERTED}


def stream(path: str, label: str, split: str, **arguments: Any) -> Iterator[tuple[str, Row]]:
    """(place, row) of a dataset's split, read as they are taken; `arguments` are those of `load_dataset`."""
    import datasets

    try:
        rows = datasets.load_dataset(path, split=split, streaming=True, **arguments)
    except ValueError as error:
        raise ValueError(f"data: {path} ({label}): {first_line(error)}") from None
    return _rows(f"{path} ({label})", rows)


def unreadable(task: str, name: str, error: Exception, example: str) -> ValueError:
    """What is told when `datasets` cannot get a name."""
    return ValueError(
        f"data: {task} could not be loaded as the dataset {name!r} ({first_line(error)}); "
        f"give data= a folder with files named like {example}"
    )


def by_language(
    rows: Iterable[tuple[str, Row]],
    language: Any,
    wanted: Sequence[str] | None,
    limit: int | None,
) -> dict[str, list[tuple[str, Row]]]:
    """{code: its first rows} of rows of many languages; read on no further than the wanted languages' last row.

    Args:
        rows: (place, row) of each.
        language: function(place, row) -> code.
        wanted: codes that are needed, None if all are.
        limit: rows of a language, None for all.
    """
    found: dict[str, list[tuple[str, Row]]] = {}
    for place, row in rows:
        kept = found.setdefault(language(place, row), [])
        if limit is None or len(kept) < limit:
            kept.append((place, row))
            if limit and wanted is not None and all(len(found.get(code, ())) == limit for code in wanted):
                break
    return found


def _rows(where: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{where}, row {index}", row) for index, row in enumerate(rows))


def _folders(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
