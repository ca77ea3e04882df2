"""Parallel texts: the same meanings in several languages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from layalign.tasks import load_task
from layalign.tasks.registry import find_task
from layalign.tasks.task import Problem
from layalign.tasks.translations import Translations


def parallel_texts(
    task: str = "mgsm",
    data: str | PathLike | None = None,
    texts: str | PathLike | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
) -> dict[str, list[str]]:
    """{lang: list of N texts}, row i of one meaning in all of them, English first. Arguments as in `run.analyze`.

    Raises:
        ValueError: anything missing or malformed, no English, one language or fewer than two texts.
    """
    if texts is None:
        english = isinstance(find_task(task).scoring, Translations)
        asked = [code for code in languages or () if code != "en"] if english else languages
        return parallel_questions(load_task(task, data, asked or languages, limit), english)
    return _parallel(_from_files(texts, languages), limit)


def parallel_questions(problems: Iterable[Problem], english_answers: bool = False) -> dict[str, list[str]]:
    """The same of the questions of problems, as `tasks.load_task` gives them: those of one index have one meaning.

    Args:
        problems: the problems.
        english_answers: whether their answers are the same in English, as where they ask for a translation.
    """
    found: dict[str, dict[int, str]] = {}
    for problem in problems:
        found.setdefault(problem["lang"], {})[problem["index"]] = problem["question"]
        if english_answers:
            found.setdefault("en", {})[problem["index"]] = problem["answer"]
    return _parallel(found)


def _parallel(found: dict[str, dict[int, str]], limit: int | None = None) -> dict[str, list[str]]:
    """found: {lang: {index: text}}."""
    if "en" not in found or len(found) < 2:
        raise ValueError(f"languages: got {', '.join(found)}; takes English (en) and at least one other")
    shared = sorted(set.intersection(*(set(rows) for rows in found.values())))[:limit]
    if len(shared) < 2:
        raise ValueError(f"got {len(shared)} texts that all of {', '.join(found)} have, takes at least 2")
    others = [lang for lang in found if lang != "en"]
    return {lang: [found[lang][place] for place in shared] for lang in ("en", *others)}


def _from_files(folder: str | PathLike, languages: Sequence[str] | None) -> dict[str, dict[int, str]]:
    files = {path.stem: path for path in sorted(Path(folder).glob("*.txt"))}
    if missing := [lang for lang in languages or ["en"] if lang not in files]:
        raise ValueError(f"texts: {folder} has no {', '.join(f'{lang}.txt' for lang in missing)}")
    found = {}
    for lang in languages or files:
        try:
            lines = files[lang].read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"texts: {files[lang]} is not UTF-8 ({error.reason} at byte {error.start})") from None
        found[lang] = dict(enumerate(lines[:-1] if lines[-1] == "" else lines))
    counts = {lang: len(rows) for lang, rows in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"texts: the files of {folder} have different numbers of lines: {counts}")
    return found
