"""Where a task's rows are, by language: files in a folder, one file of all languages, or a dataset."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

from layalign.languages import MATHEMATICS, NAMES, language_code
from layalign.tasks import hub
from layalign.tasks.hub import Opener
from layalign.tasks.reading import Row, chosen, field, file_rows, numbered, text
from layalign.tasks.task import Problem

# sw, swh, swh_Latn, zh-CN, zho_simpl; and Swahili, Haitian Creole.
_CODE = r"(?P<code>[a-z]{2,3}(?:[_-](?:[A-Z][a-z]{3}|[A-Z]{2}|simpl|trad))?)"
_NAME = r"(?P<name>[A-Z][A-Za-z]*(?: [A-Z][A-Za-z]*)*)"
_NO_LANGUAGE = ("all",)


@dataclass(frozen=True, kw_only=True)
class LanguageFiles:
    """The rows of a task by language, in a folder or as a dataset. Any language that is found there is one of the task.

    Attributes:
        task: its name.
        hub: the usual dataset's name.
        problem: function(place, row) -> {"question", "answer", ...}; ValueError with the place for a bad row.
        places: folders below the given one that are looked into, in order; "" is the given one.
        patterns: paths of a language's file there, with {code} or {name} (English) for the language.
        shared: names of one file of all languages, whose rows have a field language or lang.
        order: codes that come first, in this order.
        rows: function(path) -> (place, row) of each row of a file.
        configuration: what a dataset calls a language's part, with {code} or {name}.
        split: the dataset's split.
        hub_files: codes whose files, by the last pattern, a dataset has where it has no configurations.
        target: a language that is no question's: its row of the same number joins each row as its field `target`.
    """

    task: str
    hub: str
    problem: Callable[[str, Row], dict[str, Any]]
    places: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    order: tuple[str, ...] = MATHEMATICS
    rows: Callable[[Path], Iterator[tuple[str, Row]]] = file_rows
    configuration: str = "{code}"
    split: str = "test"
    hub_files: tuple[str, ...] = ()
    target: str | None = None

    def load(self, data: str | PathLike | None, languages: Sequence[str] | None, limit: int | None) -> list[Problem]:
        """The problems.

        Args:
            data: a folder that holds the files (itself or in one of `places`), a folder that datasets' `save_to_disk`
                wrote, or a name that `datasets.load_dataset` takes, with "datasets:" before it if a folder of that name
                exists; the path of a shared file; None: `hub`.
            languages: codes, None for all.
            limit: problems taken per language, from the start, None for all.

        Raises:
            ValueError: a missing folder, file or language, and a bad row among those taken.
        """
        source = self.hub if data is None else str(data)
        name = source.removeprefix("datasets:")
        folder = Path(name)
        if name == source and (folder.exists() or _looks_like_a_path(source)):
            return self._problems(self._files(folder, languages, limit), folder, languages, limit)
        if hub.is_saved(folder):
            return self._problems(self._saved(folder, languages, limit), folder, languages, limit)
        try:
            return self._problems(self._dataset(name, languages, limit), name, languages, limit)
        except (OSError, RuntimeError) as error:
            raise hub.unreadable(self.task, name, error, (self.patterns or self.shared)[0]) from error

    def _problems(
        self, sources: Mapping[str, Opener], where: Any, languages: Sequence[str] | None, limit: int | None
    ) -> list[Problem]:
        sources = dict(sources)
        target = sources.pop(self.target, None) if self.target else None
        if self.target and target is None:
            raise ValueError(f"data: {where} has no {self.target}, which every question of {self.task} is answered in")
        taken = {}
        for code, rows in chosen(sources, languages, where, self.order).items():
            found = islice(_joined(rows(), target()) if target else rows(), limit)
            taken[code] = [self.problem(place, row) for place, row in found]
        if not any(taken.values()):
            raise ValueError(f"data: {where} has no row for {self.task}")
        return numbered(self.task, taken)

    def _files(self, folder: Path, languages: Sequence[str] | None, limit: int | None) -> Mapping[str, Opener]:
        if folder.is_file() and self.shared:
            return self._by_field(self.rows(folder), languages, limit)
        if not folder.is_dir():
            takes = "a folder, one of its files" if self.shared else "a folder"
            raise ValueError(f"data: {folder} is not a folder; {self.task} takes {takes} or a datasets name")
        for place in (folder / below for below in self.places):
            found = self._named_files(place)
            if found:
                return {code: partial(self.rows, path) for code, path in found.items()}
            for name in self.shared:
                if (place / name).is_file():
                    return self._by_field(self.rows(place / name), languages, limit)
            if hub.is_saved(place):
                return self._saved(place, languages, limit)
        named = " or ".join((*self.patterns, *self.shared))
        raise ValueError(f"data: {folder} holds no file named like {named} for {self.task}")

    def _named_files(self, place: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for pattern in self.patterns:
            of_pattern: dict[str, Path] = {}
            for path in sorted(place.glob(pattern.format(code="*", name="*"))):
                code = _language(pattern, path.relative_to(place).as_posix())
                if code and path.is_file():
                    if code in of_pattern:
                        raise ValueError(f"data: {of_pattern[code]} and {path} are both {code}, takes one file of each")
                    of_pattern[code] = path
            if self.target in of_pattern:  # rows are joined by number: all of one kind of file
                return of_pattern
            found = of_pattern | found
        return found

    def _saved(self, folder: Path, languages: Sequence[str] | None, limit: int | None) -> Mapping[str, Opener]:
        """The parts of a saved folder that languages are called by, or the rows of its split by their language field."""
        parts = hub.saved_parts(folder)
        found = {}
        for name, rows in parts.items():
            label, _, split = name.partition("/")
            code = _language(self.configuration, label) or _language("{name}", label)
            if code and split in ("", self.split):
                found[code] = rows
        if found:
            return found
        for split in (self.split, ""):
            if split in parts:
                return self._by_field(parts[split](), languages, limit)
        raise ValueError(
            f"data: {folder} has the parts {', '.join(parts)}; {self.task} takes languages called like "
            f"{self.configuration}, or the split {self.split}"
        )

    def _dataset(self, name: str, languages: Sequence[str] | None, limit: int | None) -> Mapping[str, Opener]:
        """A dataset with a configuration, or a file, for each language, or with a field for it."""
        labels, arguments = hub.configurations(name)
        found = {}
        for label in labels:
            code = _language(self.configuration, label) or _language("{name}", label)
            if code:
                found[code] = partial(hub.stream, name, label, self.split, name=label, **arguments)
        if found:
            return found
        for code in self.hub_files:
            file = self.patterns[-1].format(code=code, name=NAMES.get(code, code))
            found[code] = partial(hub.stream, name, code, "test", data_files={"test": file}, **arguments)
        return found or self._by_field(hub.stream(name, self.split, self.split, **arguments), languages, limit)

    def _by_field(
        self, rows: Iterable[tuple[str, Row]], languages: Sequence[str] | None, limit: int | None
    ) -> Mapping[str, Opener]:
        wanted = None if languages is None else [*languages, *([self.target] if self.target else [])]
        return {code: partial(iter, kept) for code, kept in hub.by_language(rows, _of_row, wanted, limit).items()}


def _of_row(place: str, row: Row) -> str:
    return language_code(text(place, "language", field(place, row, ("language", "lang"))))


def _language(pattern: str, label: str) -> str | None:
    """The language that `label` names by `pattern`, None where it names none. One that is not known stays as it is."""
    expression = re.escape(pattern)
    for mark, group in (("code", _CODE), ("name", _NAME)):
        expression = expression.replace(re.escape(f"{{{mark}}}"), group, 1).replace(
            re.escape(f"{{{mark}}}"), f"(?P={mark})"
        )
    match = re.fullmatch(expression, label)
    if not match:
        return None
    written = next(value for value in match.groupdict().values() if value)
    code = language_code(written)
    if written in _NO_LANGUAGE:
        return None
    return written if code == written.lower() and "code" in match.groupdict() else code


def _joined(rows: Iterator[tuple[str, Row]], targets: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Each row with the target's row of the same number."""
    for (place, row), (target_place, target) in zip_longest(rows, targets, fillvalue=("", {})):
        if not place or not target_place:
            raise ValueError(f"{place or target_place}: has no row of the same number in the other language")
        if row.get("id") != target.get("id"):
            raise ValueError(f"{place}: id: got {row.get('id')!r}, takes {target.get('id')!r} as in {target_place}")
        yield place, {**row, "target": target, "target_place": target_place}


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
