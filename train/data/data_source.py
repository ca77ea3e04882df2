"""Where training records come from, as a recipe says it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from layalign.languages import NAMES, language_code, language_name
from layalign.train.prompts import check_template
from layalign.train.settings import CONFIG, Count, PathText, Settings, Switch


@dataclass(config=CONFIG, kw_only=True, slots=True)
class DataSource(Settings):
    """Where training records come from."""

    format: Literal["pairs", "jsonl", "json", "tsv", "dataset", "records"] = "records"
    """How they are stored: "pairs" (two line-aligned text files), "jsonl" (one JSON object a line), "json" (one list of
    objects), "tsv", "dataset" (a folder or hub name for the `datasets` library) or "records" (in memory)."""
    path: PathText | None = None
    """The file, folder or name; for pairs the source side. `{lang}` stands for each code of `languages`, written as there,
    `{language}` for its English name. Relative paths start at the recipe's `data_root`."""
    target_path: PathText | None = None
    """The target side of pairs."""
    records: Any = None
    """The records themselves: a list of dicts with "source", "target" and "lang", or, read lazily, a function that gives an
    iterator over them or another object that can be iterated over again and again, such as a `datasets.Dataset`."""
    source: str = "source"
    """The field that holds the text for the encoder, or a template over fields ("{question[stem]}"); the fields of pairs are
    called source and target."""
    target: str = "target"
    """The same for the text that the LLM must write."""
    lang: str | None = None
    """Language code of every record."""
    lang_field: str | None = None
    """Instead, the field that tells it (a code or an English name); by default "lang", where there is one."""
    languages: list[str] | None = None
    """Only records of these languages: codes or English names, in any case."""
    columns: list[str] | None = None
    """Names of a TSV file's columns; None: its first line names them."""
    subset: str | None = None
    """Which part of a dataset."""
    split: str = "train"
    """Which split of a dataset."""
    streaming: Switch = False
    """Read a dataset row by row, without downloading or converting all of it first."""
    limit: Count | None = None
    """At most so many records, the first ones."""
    limit_per_language: Count | None = None
    """At most so many records of each language, the first ones."""
    on_bad_line: Literal["error", "skip"] = "error"
    """What an unusable line does: "error" stops at the first unusable line and names it; "skip" leaves it out, counts and reports it."""

    def __post_init__(self) -> None:
        if (self.format == "records") != (self.records is not None):
            given = "records are given" if self.records is not None else "none are given"
            raise ValueError(f"records: go with format 'records' and no other; format is {self.format!r} and {given}")
        if self.records is not None:
            _check_records(self.records)
        if self.format != "records" and self.path is None:
            raise ValueError(f"path: required for format {self.format!r}")
        if (self.format == "pairs") != (self.target_path is not None):
            raise ValueError(f"target_path: is the second file of format 'pairs', format is {self.format!r}")
        for name, is_given in (("subset", self.subset is not None), ("split", self.split != "train")):
            if is_given and self.format != "dataset":
                raise ValueError(f"{name}: is of format 'dataset', format is {self.format!r}; files are read whole")
        if self.streaming and self.format != "dataset":
            raise ValueError(
                f"streaming: is for format 'dataset', format is {self.format!r}; files are always read as a stream"
            )
        if self.columns is not None and (self.format != "tsv" or len(set(self.columns)) < len(self.columns)):
            reason = f"format is {self.format!r}" if self.format != "tsv" else f"{self.columns} names one twice"
            raise ValueError(f"columns: are the names of a TSV file's columns, each once; {reason}")
        if self.lang is not None and self.lang_field is not None:
            raise ValueError("lang_field: give lang or lang_field, not both")
        if self.languages is not None:
            if not self.languages:
                raise ValueError("languages: empty list")
            self.languages = [_written(language) for language in self.languages]
        for name in ("source", "target"):
            check_template(getattr(self, name), name)
        if self.path is not None:
            placeholders = {
                name for path in (self.path, self.target_path or "") for name in check_template(path, "path")
            }
            if placeholders - {"lang", "language"}:
                raise ValueError(f"path: takes {{lang}} and {{language}}, got {sorted(placeholders)}")
            if placeholders and self.languages is None:
                raise ValueError("languages: required, as path has a placeholder for them")

    @property
    def in_memory(self) -> bool:
        """Whether the records are a list."""
        return isinstance(self.records, (list, tuple))

    def located(self, data_root: str | os.PathLike | None = None) -> list[DataSource]:
        """This source with its paths below `data_root`, and one source for each language where a path has a placeholder.
        Their `languages` are the codes that records are compared by."""
        if self.path is None:
            return [self if self.languages is None else replace(self, languages=_codes(self.languages))]
        if not any(check_template(path, "path") for path in (self.path, self.target_path or "")):
            return [self._at(data_root, lambda path: path)]
        located = []
        english = "{language}" in self.path + (self.target_path or "")
        for code in self.languages or ():
            names = {"lang": code, "language": language_name(language_code(code)) if english else code}
            part = self._at(data_root, lambda path, names=names: path.format(**names))
            (compared,) = languages = _codes([code])
            located.append(replace(part, lang=None if self.lang_field else compared, languages=languages))
        return located

    def files(self, data_root: str | os.PathLike | None = None) -> list[Path]:
        """The files this source reads (a dataset's hub name is none)."""
        if self.format in ("records", "dataset"):
            return []
        return [Path(path) for part in self.located(data_root) for path in (part.path, part.target_path) if path]

    def _at(self, data_root, fill):
        def place(path):
            path = Path(fill(path)).expanduser()
            below = Path(data_root or ".").expanduser() / path
            return str(path if self.format == "dataset" and not below.exists() else below)

        target_path = self.target_path and place(self.target_path)
        languages = self.languages and _codes(self.languages)
        return replace(self, path=place(self.path), target_path=target_path, languages=languages)


def _codes(languages):
    return [language_code(language) for language in languages]


def _written(language):
    """A code as it is written, since files may be called so (NLLB.yor_Latn.txt); that of an English name."""
    code = language_code(language)
    return code if language.strip().lower() == NAMES.get(code, "").lower() else language.strip()


def _check_records(records):
    if isinstance(records, (str, bytes, Mapping)) or not (callable(records) or isinstance(records, Iterable)):
        raise ValueError(
            f"records: expected a list of dicts, got {type(records).__name__}; what is to be read lazily is given as a "
            "function that gives an iterator, or as another iterable"
        )
    if isinstance(records, Iterator):
        raise ValueError(
            f"records: a {type(records).__name__} can be read only once, and a resumed run reads again; "
            "give a function that makes one, or a list"
        )
