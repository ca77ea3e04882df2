"""Reading a task's rows from files and from `datasets`; what is wrong with one is told with its place.

A row is a JSON object or its like; its place is `file:line`, or the dataset and the row's number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from layalign.languages import MATHEMATICS, NAMES, in_order
from layalign.tasks.task import Problem

Row = Mapping[str, Any]
Value = TypeVar("Value")

# Where the hub keeps the rows of a dataset that is still a script, which `datasets` no longer runs.
CONVERTED = "refs/convert/parquet"


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each line of a UTF-8 file; empty lines at its end are not lines."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    if content == [b""]:
        raise ValueError(f"{path}: the file is empty")
    for number, line in enumerate(content, 1):
        try:
            yield f"{path}:{number}", line.rstrip(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of each line of a file of JSON lines."""
    for place, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: got a {type(row).__name__}, takes a JSON object per line")
        yield place, row


def field(place: str, row: Row, names: Sequence[str]) -> Any:
    """The first of the named fields that is there and not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{place}: no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")


def text(place: str, name: str, value: Any) -> str:
    """`value` without white space around it; ValueError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name}: got {value!r}, takes a text that is not empty")
    return value.strip()


def chosen(available: Mapping[str, Value], languages: Sequence[str] | None, where: Any) -> dict[str, Value]:
    """Those of {language: value} that are asked for (None: all), in the paper's order, others after it by code."""
    if languages is not None:
        if not languages:
            raise ValueError("languages: got an empty list, takes codes such as 'sw', or None for all")
        missing = [code for code in languages if code not in available]
        if missing:
            raise ValueError(f"languages: {', '.join(missing)} not in {where}, which has {', '.join(available)}")
    order = in_order(available, MATHEMATICS)
    return {code: available[code] for code in order if languages is None or code in languages}


def numbered(task: str, by_language: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Problem]:
    """Problems of {language: what a row gives, at least question and answer}."""
    return [
        {"task": task, "lang": code, "index": index, **found}
        for code, rows in by_language.items()
        for index, found in enumerate(rows)
    ]


@dataclass(frozen=True, kw_only=True)
class LanguageFiles:
    """The rows of a task with a file a language, in a folder or as a dataset on the hub.

    Attributes:
        task: its name.
        hub: the usual dataset's name.
        patterns: names of files, with {code} or {name} (English) for the language; a folder has one of them.
        languages: codes that are looked for.
        hub_languages: those whose files a dataset has where it does not list them; None for all.
        problem: function(place, row) -> {"question", "answer", ...}; ValueError with the place for a bad row.
        rows: function(path) -> (place, row) of each row of a file.
    """

    task: str
    hub: str
    patterns: tuple[str, ...]
    languages: tuple[str, ...]
    problem: Callable[[str, Row], dict[str, Any]]
    hub_languages: tuple[str, ...] | None = None
    rows: Callable[[Path], Iterator[tuple[str, Row]]] = json_rows

    def load(self, data: str | PathLike | None, languages: Sequence[str] | None, limit: int | None) -> list[Problem]:
        """The problems.

        Args:
            data: a folder that holds the files (itself or in a folder named after the task), or a name that
                `datasets.load_dataset` takes, with "datasets:" before it if a folder of that name exists; None: `hub`.
            languages: codes, None for all.
            limit: problems taken per language, from the start, None for all.

        Raises:
            ValueError: a missing folder, file or language, and a bad row among those taken.
        """
        source = self.hub if data is None else str(data)
        folder = Path(source)
        if source.startswith("datasets:") or not (folder.exists() or _looks_like_a_path(source)):
            return numbered(self.task, self._from_datasets(source.removeprefix("datasets:"), languages, limit))
        files = chosen(self._files(folder), languages, folder)
        return numbered(self.task, {code: self._read(self.rows(path), limit) for code, path in files.items()})

    def _read(self, rows: Iterable[tuple[str, Row]], limit: int | None) -> Iterator[dict[str, Any]]:
        return (self.problem(place, row) for place, row in islice(rows, limit))

    def _named(self, pattern: str, code: str) -> str:
        return pattern.format(code=code, name=NAMES.get(code, code))

    def _files(self, folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise ValueError(f"data: {folder} is not a folder; {self.task} takes a folder or a datasets name")
        for place in (folder / self.task, folder):
            found: dict[str, Path] = {}
            for code in self.languages:
                for pattern in self.patterns:
                    path = place / self._named(pattern, code)
                    if path.is_file():
                        found.setdefault(code, path)
            if found:
                return found
        raise ValueError(f"data: {folder} holds no file named like {' or '.join(self.patterns)} for {self.task}")

    def _from_datasets(
        self, name: str, languages: Sequence[str] | None, limit: int | None
    ) -> dict[str, Iterator[dict[str, Any]]]:
        """The test split of a dataset with one configuration per language, or with one file per language."""
        import datasets

        try:
            return {
                code: self._read(_dataset_rows(f"{name} ({code})", datasets.load_dataset(**arguments)), limit)
                for code, arguments in chosen(self._configurations(name), languages, name).items()
            }
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"data: {self.task} could not be loaded as the dataset {name!r} ({str(error).splitlines()[0]}); "
                f"give data= a folder with files named like {self.patterns[0]}"
            ) from error

    def _configurations(self, name: str) -> dict[str, dict[str, Any]]:
        """{language: arguments of load_dataset}."""
        import datasets

        place: dict[str, Any] = {"path": name, "split": "test"}
        try:
            configurations = datasets.get_dataset_config_names(name)
        except RuntimeError:
            place["revision"] = CONVERTED
            configurations = datasets.get_dataset_config_names(name, revision=CONVERTED)
        found = {
            code: {**place, "name": label}
            for code in self.languages
            for label in (code, NAMES.get(code, code))
            if label in configurations
        }
        if found:
            return found
        files = {code: self._named(self.patterns[-1], code) for code in self.hub_languages or self.languages}
        return {code: {**place, "data_files": {"test": file}} for code, file in files.items()}


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _dataset_rows(where: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{where}, row {index}", row) for index, row in enumerate(rows))
