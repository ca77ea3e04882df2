"""Which training texts are evaluation texts: whole ones, and runs of 13 words.

Texts are compared without case, punctuation, characters that are not seen (joiners, soft hyphens) and Unicode's several ways to
write the same (NFKC). In scripts that put no spaces between words, spaces beside them count for nothing, and characters stand for
words: two of Chinese and Japanese for one, four of Thai, Lao, Khmer, Burmese and Tibetan.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from layalign.tasks import prompts
from layalign.tasks.registry import find_task, load_task
from layalign.train.settings import CONFIG, PathText, Settings, one_or_several

# Of a prompt's parts, those of fewer words are options that any text may be ("desk drawer").
_FEWEST_WORDS = 3
# Parts of a word that a character stands for, of _WORD.
_WORD = 4
_WEIGHTS = {
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff": 1,
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff": 2,
}
_UNSPACED = re.compile("|".join(f"[{characters}]" for characters in _WEIGHTS))
_SPACE_BESIDE = re.compile(" (?=[{0}])|(?<=[{0}]) ".format("".join(_WEIGHTS)))
_LIGHT = re.compile(f"[{next(iter(_WEIGHTS))}]")


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Decontamination(Settings):
    """Evaluation sets whose texts no stage may train on."""

    tasks: Annotated[list[str], one_or_several(str, of=str)] | None = None
    """Names of tasks ("mgsm", "msvamp", ...): their questions (of xcsqa, xnli and xcopa stem, premise, hypothesis and longer options
    by themselves, too), and the reference translations of flores."""
    data: PathText | None = None
    """Folder or name that the tasks' files are read from, as for `layalign evaluate --data`; below `data_root`, if it is
    there."""
    files: Annotated[list[str], one_or_several(str, of=str)] | None = None
    """Further texts: .txt, one a line, or .jsonl, the field question of each line."""
    ngram: Annotated[int, Field(strict=True, ge=3, le=100)] = 13
    """Records that have so many words in a row in common with an evaluation text are left out, beside those that are one as a
    whole."""

    def __post_init__(self) -> None:
        for name in ("tasks", "files"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: empty list")
        if not self.tasks and not self.files:
            raise ValueError("tasks: give tasks, files, or both; there is nothing to look for")
        if self.data is not None and not self.tasks:
            raise ValueError("data: is where the files of tasks are, and no tasks are given")
        for task in self.tasks or ():
            try:
                find_task(task)
            except ValueError as error:
                raise ValueError(f"tasks: {str(error).removeprefix('task: ')}") from None
        for file in self.files or ():
            if Path(file).suffix not in (".txt", ".jsonl"):
                raise ValueError(f"files: takes .txt (a text a line) and .jsonl (its field question), got {file}")

    def located(self, data_root: str | os.PathLike | None = None) -> list[Path]:
        """The files, relative ones below `data_root`."""
        return [Path(data_root or ".").expanduser() / Path(file).expanduser() for file in self.files or ()]


class Item(NamedTuple):
    """One evaluation text: the task or file it is of, its language, its place there, and itself."""

    origin: str
    lang: str
    number: int
    text: str


class Match(NamedTuple):
    """What a training text has in common with an evaluation text: "exact" or "ngram", which item, and the words."""

    kind: str
    item: Item
    words: str


class EvaluationTexts:
    """An index of evaluation texts.

    Args:
        items: the texts.
        ngram: words in a row.

    Attributes:
        items: those of them with any word.
    """

    def __init__(self, items: Sequence[Item], ngram: int):
        self.ngram, self._plain = ngram, _Plain()
        normalised = [(item, self._plain(item.text)) for item in items]
        self.items = [item for item, text in normalised if text]
        self._whole: dict[str, int] = {}
        hashes, places = [], []
        for place, text in enumerate(text for _, text in normalised if text):
            self._whole.setdefault(_SPACE_BESIDE.sub("", text), place)
            found = [hash(window) for window in _windows(text, ngram)]
            hashes += found
            places += [place] * len(found)
        order = np.argsort(np.array(hashes, np.int64), kind="stable")
        self._hashes, self._places = np.array(hashes, np.int64)[order], np.array(places, np.int32)[order]

    def matches(self, texts: Sequence[str]) -> list[Match | None]:
        """For each text what it has in common with an evaluation text; None: nothing."""
        plain = [self._plain(text) for text in texts]
        found: list[Match | None] = []
        windows, owners = [], []
        for owner, text in enumerate(plain):
            whole = self._whole.get(_SPACE_BESIDE.sub("", text))
            found.append(None if whole is None else Match("exact", self.items[whole], text))
            if whole is None:
                own = list(_windows(text, self.ngram))
                windows += own
                owners += [owner] * len(own)
        if windows and len(self._hashes):
            # Python's own hash: only ever compared within this process.
            hashes = np.fromiter(map(hash, windows), np.int64, len(windows))
            at = np.searchsorted(self._hashes, hashes)
            at[at == len(self._hashes)] = 0
            for number in np.flatnonzero(self._hashes[at] == hashes).tolist():
                owner, item = owners[number], self.items[self._places[at[number]]]
                # Two texts may have one hash.
                if found[owner] is None and windows[number] in _windows(self._plain(item.text), self.ngram):
                    found[owner] = Match("ngram", item, windows[number])
        return found

    def identity(self) -> str:
        """Hash of the texts and of how they are compared."""
        return hashlib.sha256(json.dumps([3, self.ngram, self.items]).encode()).hexdigest()


def evaluation_texts(settings: Decontamination, data_root: str | os.PathLike | None = None) -> EvaluationTexts:
    """Read the evaluation sets that a recipe names.

    Args:
        settings: which.
        data_root: folder that relative paths start at.

    Raises:
        ValueError: one that is not there or cannot be read.
    """
    items = []
    plain = _Plain()
    data = settings.data
    if data is not None:
        below = Path(data_root or ".").expanduser() / Path(data).expanduser()
        data = str(below) if below.exists() else data
    for task in settings.tasks or ():
        try:
            problems = load_task(task, data)
        except ValueError as error:
            raise ValueError(f"decontaminate.tasks: {task}: {error}") from None
        for problem in problems:
            texts = [problem["question"], *_parts(problem["question"], plain)]
            items += [Item(task, problem["lang"], problem["index"], text) for text in texts]
            if task == "flores":
                items.append(Item(task, "", problem["index"], str(problem["answer"])))
    for file in settings.located(data_root):
        items += [Item(file.name, lang, index, text) for index, (lang, text) in enumerate(_file_texts(file))]
    return EvaluationTexts(items, settings.ngram)


def _parts(question: str, plain: _Plain) -> list[str]:
    """What stands in a task's prompt of a person's own: a copy of it alone is no copy of the whole, and may be short of a run of words."""
    written = prompts.parts(question)[1::2]
    if written == [question]:
        return []
    return [part for part in written if _words(plain(part)) >= _FEWEST_WORDS]


def _file_texts(file: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"decontaminate.files: {file} cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"decontaminate.files: {file} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            yield "", line
            continue
        row: Any = None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"decontaminate.files: {file}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError(f"decontaminate.files: {file}:{number}: takes an object with a text as question")
        yield str(row.get("lang", "")), row["question"]


class _Plain(dict):
    """Text -> its words, one space between them. The mapping itself is from characters to what becomes of them."""

    def __call__(self, text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(self).split())

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        # Format characters stand within words: of MGSM's Telugu questions 163 of 250 have a joiner, copies may have none.
        self[code] = None if category == "Cf" else code if category[0] in "LMN" else 32
        return self[code]


def _units(text: str) -> tuple[list[str], list[int]]:
    """The words of a text of `_Plain`, and characters of scripts without spaces, and what each counts, of _WORD."""
    units = _UNSPACED.sub(lambda found: f" {found[0]} ", text).split()
    return units, [_WORD if not _UNSPACED.match(unit) else 1 if _LIGHT.match(unit) else 2 for unit in units]


def _words(text: str) -> float:
    """How many words a text of `_Plain` has."""
    return sum(_units(text)[1]) / _WORD


def _windows(text: str, ngram: int) -> Iterator[str]:
    """Runs of `ngram` words of a text of `_Plain`, one from each word on, or each character of a script without spaces."""
    if not _UNSPACED.search(text):
        words = text.split(" ")
        for start in range(len(words) - ngram + 1):
            yield " ".join(words[start : start + ngram])
        return
    units, weights = _units(text)
    ends = np.cumsum(weights)
    begins = ends - weights
    last = np.searchsorted(ends, begins + ngram * _WORD)
    for start, end in enumerate(last.tolist()):
        if end == len(units):
            return
        yield " ".join(units[start : end + 1])
