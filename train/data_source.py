"""Where training records come from, as a recipe says it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from layalign.languages import language_code, language_name
from layalign.train.prompts import check_template
from layalign.train.settings import check_range, convert_fields


@dataclass(kw_only=True, slots=True)
class DataSource:
    """Where training records come from.

    Attributes:
        format: "pairs" (two line-aligned text files), "jsonl" (one JSON object a line), "json" (one list of objects),
            "tsv", "dataset" (a folder or hub name for the `datasets` library) or "records" (in memory).
        path: the file, folder or name; for pairs the source side. `{lang}` stands for each code of `languages`,
            `{language}` for its English name. Relative paths start at the recipe's `data_root`.
        target_path: the target side of pairs.
        records: the records themselves: dicts with "source", "target" and "lang".
        source, target: the field that holds the text, or a template over fields ("{question[stem]}"); the fields of
            pairs are called source and target.
        lang: language code of every record.
        lang_field: instead, the field that tells it (a code or an English name); by default "lang", where there is one.
        languages: only records of these languages (codes).
        columns: names of a TSV file's columns; None: its first line names them.
        subset, split: which part of a dataset.
        limit, limit_per_language: at most so many records, the first ones.
        on_bad_line: "error" stops at the first unusable line and names it; "skip" leaves it out, counts and reports it.
    """

    format: Literal["pairs", "jsonl", "json", "tsv", "dataset", "records"] = "records"
    path: str | None = None
    target_path: str | None = None
    records: Any = None
    source: str = "source"
    target: str = "target"
    lang: str | None = None
    lang_field: str | None = None
    languages: list[str] | None = None
    columns: list[str] | None = None
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    limit_per_language: int | None = None
    on_bad_line: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        convert_fields(self)
        check_range(self, limit=(1, None), limit_per_language=(1, None))
        if (self.format == "records") != (self.records is not None):
            given = "records are given" if self.records is not None else "none are given"
            raise ValueError(f"records: go with format 'records' and no other; format is {self.format!r} and {given}")
        if self.records is not None and not isinstance(self.records, (list, tuple)):
            raise ValueError(f"records: expected a list of dicts, got {type(self.records).__name__}")
        if self.format != "records" and self.path is None:
            raise ValueError(f"path: required for format {self.format!r}")
        if (self.format == "pairs") != (self.target_path is not None):
            raise ValueError(f"target_path: is the second file of format 'pairs', format is {self.format!r}")
        if self.lang is not None and self.lang_field is not None:
            raise ValueError("lang_field: give lang or lang_field, not both")
        if self.languages is not None:
            if not self.languages:
                raise ValueError("languages: empty list")
            self.languages = [language_code(language) for language in self.languages]
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

    def located(self, data_root: str | os.PathLike | None = None) -> list[DataSource]:
        """This source with its paths below `data_root`, and one source for each language where the path has a placeholder."""
        if self.path is None:
            return [self]
        if not any(check_template(path, "path") for path in (self.path, self.target_path or "")):
            return [self._at(data_root, lambda path: path)]
        located = []
        for code in self.languages or ():
            names = {"lang": code, "language": language_name(code) if "{language}" in self.path else code}
            part = self._at(data_root, lambda path, names=names: path.format(**names))
            located.append(replace(part, lang=None if self.lang_field else code, languages=[code]))
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

        return replace(self, path=place(self.path), target_path=self.target_path and place(self.target_path))
