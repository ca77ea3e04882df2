"""What a stage trains on: records read as a stream, tokenised once, kept in the cache, some of them held out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from layalign.kernels.files import cache_folder, write_json
from layalign.train.data.clean_lines import REMOVED, CleanLines, report_removed
from layalign.train.data.collate import EncodedRecords, StageData
from layalign.train.data.dataset_rows import dataset_files
from layalign.train.data.decontamination import EvaluationTexts, evaluation_texts
from layalign.train.data.encoding import RecordEncoder, bar, encode_records
from layalign.train.data.mixing import mixture
from layalign.train.data.rows import is_packed
from layalign.train.data.sources import report_skipped, stream_sources
from layalign.train.data.token_store import FORMAT, StoreWriter, stored
from layalign.train.parts import has_soft_prompts
from layalign.train.processes import processes
from layalign.train.run_folder import check_data

if TYPE_CHECKING:
    from layalign.processor import LayAlignProcessor
    from layalign.train.data.data_source import DataSource
    from layalign.train.recipe import Recipe

logger = logging.getLogger(__name__)

SKIPPED = "skipped.txt"
_SHOWN = 10
_BLOCK = 1 << 20
_BAR_FROM = 1 << 30
# What of a source does not change its records: where its files are, and how they are come by.
_PLACES = ("path", "target_path", "records", "streaming")
# Of files that this process has looked through, by path, size and time of change: a table's rows share them.
_hashes: dict[tuple[str, int, int], tuple[str, int]] = {}


class Prepared(NamedTuple):
    """Tokenised records, and how many bad lines were left out."""

    records: EncodedRecords
    skipped: int


def token_cache(recipe: Recipe) -> Path:
    """Folder of the tokenised records that runs share."""
    return cache_folder(recipe.cache) / "tokens"


def read_stage_data(name: str, recipe: Recipe, processor: LayAlignProcessor) -> StageData:
    """A stage's tokenised records, from the cache where they are there.

    Raises:
        ValueError: data that cannot be read or has changed, or more held out than there is; languages to mix that are not there.
    """
    stage = recipe.stages[name]
    encoder = RecordEncoder(processor, stage, recipe.llm_input[name])
    folder = Path(recipe.output) / name
    unwanted = None if recipe.decontaminate is None else evaluation_texts(recipe.decontaminate, recipe.data_root)
    records, skipped = _prepared(stage.data, recipe, encoder, name, unwanted)
    records.soft = has_soft_prompts(recipe)
    held_out = None
    if stage.eval_data:
        held_out = _prepared(stage.eval_data, recipe, encoder, f"{name} evaluation", None).records
        held_out.soft = records.soft
    elif stage.hold_out:
        if stage.hold_out >= len(records):
            raise ValueError(
                f"stages.{name}.hold_out: {stage.hold_out} of {len(records)} records leave none to train on"
            )
        order = np.random.default_rng(recipe.seed).permutation(len(records))
        held_out = records.subset(order[: stage.hold_out])
        records = records.subset(np.sort(order[stage.hold_out :]))
    if stage.mixing is not None:
        records.mixture = mixture(stage.mixing, records.languages, records.language_names, name)
    if processes(recipe).is_main_process:
        check_data(folder, name, records, skipped, held_out if stage.eval_data else None)
    if records.mixture is not None and processes(recipe).is_main_process:
        write_json(folder / "mixing.json", records.mixture.told(records.language_names))
    return StageData(records, held_out)


def _prepared(sources, recipe, encoder, name, unwanted) -> Prepared:
    encoder.cut.clear()
    parts = [part for source in sources for part in source.located(recipe.data_root)]
    make = _Making(sources, recipe, encoder, name, unwanted)
    if all(part.in_memory for part in parts) and unwanted is None:
        skipped: list[str] = []
        total = sum(len(part.records) for part in parts)
        lines = stream_sources(sources, recipe.data_root, skipped.append)
        records = encode_records(lines, encoder, recipe.progress, name, total)
        report_skipped(len(skipped), skipped[:_SHOWN])
        return Prepared(records, len(skipped))
    key, make.total = _key(parts, encoder, unwanted, recipe.progress, name)
    records, info, folder = stored(token_cache(recipe), key, name, make)
    # Files that were moved since are called as they are now.
    moved = dict(zip(info["paths"], _paths(parts), strict=True))
    report_skipped(info["skipped"], [_called(line, moved) for line in info["first_skipped"]])
    encoder.report_cut(name, len(records), info["cut"])
    if unwanted is not None and processes(recipe).is_main_process:
        report_removed(Path(recipe.output) / name, name, folder, info["removed"], lambda text: _called(text, moved))
    return Prepared(records, info["skipped"])


class _Making:
    """Reads, tokenises and writes the records of some sources into a folder of the cache."""

    def __init__(self, sources: Sequence[DataSource], recipe: Recipe, encoder: RecordEncoder, name: str, unwanted: Any):
        self.sources, self.recipe, self.encoder, self.name = sources, recipe, encoder, name
        self.unwanted: EvaluationTexts | None = unwanted
        self.total: int | None = None

    def __call__(self, folder: Path) -> dict[str, Any]:
        first: list[str] = []
        skipped = 0
        with (
            open(folder / SKIPPED, "w", encoding="utf-8") as skips,
            open(folder / REMOVED, "w", encoding="utf-8") as removed,
            bar(self.name, self.total, self.recipe.progress) as shown,
            StoreWriter(folder) as writer,
        ):

            def skip(line: str) -> None:
                nonlocal skipped
                skipped += 1
                skips.write(line.replace("\n", " ") + "\n")
                if len(first) < _SHOWN:
                    first.append(line)

            lines = stream_sources(self.sources, self.recipe.data_root, skip, lambda: shown.update())
            clean = CleanLines(lines, self.unwanted, removed)
            for chunk in self.encoder.encode_all(clean):
                writer.add(chunk)
            if not writer.count:
                raise ValueError(f"stages: {self.name}: no records are left of {clean.read} (decontaminate took all)")
            names, count = writer.language_names(), writer.count
        parts = [part for source in self.sources for part in source.located(self.recipe.data_root)]
        return {
            "name": self.name,
            "paths": _paths(parts),
            "records": count,
            "languages": names,
            "skipped": skipped,
            "first_skipped": first,
            "cut": dict(self.encoder.cut),
            "removed": clean.summary(),
        }


def _paths(parts: Sequence[DataSource]) -> list[str]:
    return [path for part in parts for path in (part.path or "records", part.target_path or "") if path]


def _called(text: str, moved: dict[str, str]) -> str:
    """`text`, which begins with a path, with the path that the file has now."""
    for before, now in moved.items():
        if text.startswith(before):
            return now + text[len(before) :]
    return text


def _key(parts, encoder, unwanted, progress, name) -> tuple[str, int | None]:
    """Hash of all that tokenised records depend on, file by file, and how many rows there are where that is known."""
    described: list[Any] = []
    total: int | None = 0
    for part in parts:
        content, rows = _content(part, progress, name)
        described.append(_described(part, content))
        total = None if total is None or rows is None else total + min(rows, part.limit or rows)
    whole = {
        "format": FORMAT,
        "sources": described,
        **encoder.identity(),
        "decontaminate": None if unwanted is None else unwanted.identity(),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32], total


def data_identity(sources: Sequence[DataSource], data_root: str | None) -> list[dict[str, Any]]:
    """What tells the records of sources from others: how they are read and what is in their files; of what is not here, its name."""
    found = []
    for part in (part for source in sources for part in source.located(data_root)):
        try:
            is_here = part.format == "records" or all(Path(path).exists() for path in _paths([part]))
            content = _content(part, False, "")[0] if is_here else _paths([part])
        except ValueError:  # which training says
            content = _paths([part])
        found.append(_described(part, content))
    return found


def _described(part: DataSource, content: list[str]) -> dict[str, Any]:
    """How a source is read, and what it reads."""
    values = {key: getattr(part, key) for key in part.__dataclass_fields__ if key not in _PLACES}
    return values | {"content": content}


def _content(part: DataSource, progress: bool, name: str) -> tuple[list[str], int | None]:
    """Hashes of what a source reads, and its rows where counting them costs nothing."""
    if part.format == "records":
        digest, rows = hashlib.sha256(), 0
        records = part.records() if callable(part.records) else part.records
        for row in records:
            rows += 1
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return [digest.hexdigest()], rows
    if part.format == "dataset":
        files, elsewhere = dataset_files(part)
        return [_hash(file, progress, name)[0] for file in files] + elsewhere, None
    hashes, counts = zip(*(_hash(Path(path), progress, name) for path in _paths([part])), strict=True)
    counted = part.format != "json" and not is_packed(part.path or "")
    return list(hashes), counts[0] if counted else None


def _hash(path: Path, progress: bool, name: str) -> tuple[str, int]:
    """SHA-256 of a file and how many line feeds it has."""
    digest, lines = hashlib.sha256(), 0
    try:
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        if (known := _hashes.get((str(path), size, changed))) is not None:
            return known
        shown = tqdm(
            desc=f"{name}: look at {path.name}",
            total=size,
            disable=not progress or size < _BAR_FROM,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
        )
        with open(path, "rb") as file, shown:
            while block := file.read(_BLOCK):
                digest.update(block)
                lines += block.count(b"\n")
                shown.update(len(block))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    _hashes[str(path), size, changed] = digest.hexdigest(), lines
    return digest.hexdigest(), lines
