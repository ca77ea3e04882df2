"""Rows of the `datasets` library: a folder that `save_to_disk` wrote, a folder of data files, one such file, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layalign.train.data.data_source import DataSource

# What `datasets` calls the readers of single files.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow", ".txt": "text"}
# Which it unpacks, by their names.
_PACKED = (".gz", ".bz2", ".xz")


def dataset_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of a dataset; with `streaming` nothing is downloaded or converted before it is read.

    Raises:
        ValueError: it cannot be opened, or not be read to its end.
    """
    import datasets

    where = f"dataset {source.path!r} (subset {source.subset}, split {source.split!r})"
    failures = (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = _opened(source)
    except failures as error:
        raise ValueError(f"{where}: {_said(error)}") from error
    if isinstance(rows, (dict, datasets.IterableDatasetDict)):
        raise ValueError(f"{where}: has the splits {', '.join(rows)}; split takes one of them")
    index = 0
    found = iter(rows)
    while True:
        try:
            row = next(found)
        except StopIteration:
            return
        except failures as error:
            raise ValueError(f"{where}: cannot be read on after {index} rows: {_said(error)}") from error
        yield f"{source.path} [{source.split}] row {index}", row
        index += 1


def dataset_files(source: DataSource) -> tuple[list[Path], list[str]]:
    """What a dataset is made of: files here, and names of files elsewhere with the revision they have.

    Raises:
        ValueError: it cannot be found.
    """
    import datasets

    folder = Path(source.path or "")
    if (folder / "state.json").is_file():
        return _below(folder), []
    if (folder / "dataset_dict.json").is_file():
        return _below(folder / source.split), []
    if folder.is_file():
        return [folder], []
    try:
        builder = datasets.load_dataset_builder(source.path, source.subset)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = f"dataset {source.path!r} (subset {source.subset}, split {source.split!r})"
        raise ValueError(f"{where}: {_said(error)}") from error
    names = [str(name) for files in (builder.config.data_files or {}).values() for name in files]
    here = [Path(name) for name in names if Path(name).is_file()]
    elsewhere = [name for name in names if not Path(name).is_file()]
    return here, elsewhere or ([] if here else [str(builder.hash), str(builder.cache_dir)])


def _opened(source):
    import datasets

    path = Path(source.path)
    if (path / "state.json").is_file():
        return datasets.load_from_disk(source.path)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(source.path)[source.split]
    arguments = {"path": source.path, "name": source.subset}
    if path.is_file():
        suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
        if suffix not in _READERS:
            raise ValueError(f"a file called *{suffix}; datasets reads {', '.join(_READERS)}")
        arguments = {"path": _READERS[suffix], "data_files": source.path}
    arguments |= _as_texts(arguments)
    return datasets.load_dataset(**arguments, split=source.split, streaming=source.streaming)


def _as_texts(arguments):
    """Settings that leave the cells of CSV the texts they are: 007 would be read as the number 7, and NA and None as nothing.

    {} of any other dataset, and of one whose own card says what its columns are.
    """
    import datasets
    import pandas

    config = (builder := datasets.load_dataset_builder(**arguments)).config
    if not hasattr(config, "keep_default_na") or builder.info.features is not None:
        return {}
    file = next(str(name) for names in config.data_files.values() for name in names)
    names = pandas.read_csv(file, **config.pd_read_csv_kwargs | {"nrows": 0, "chunksize": None}).columns
    return {
        "features": datasets.Features({str(name): datasets.Value("string") for name in names}),
        "keep_default_na": False,
    }


def _below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _said(error):
    """The library's words; its outermost error only says that there was one, the cause what."""
    inner = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") and error.__cause__ else error
    return str(inner) or type(inner).__name__
