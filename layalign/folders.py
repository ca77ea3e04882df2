"""Local folders of models: whether they are as they were written, and what is wrong with a file, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layalign.kernels.files import MANIFEST, read_json, regular, sha256_of

# Of saved models: prose, which anyone may edit.
_PROSE = ".md"
# Ends of the names of files that transformers takes an object from; others may hold a list (modules.json of sentence-transformers).
_OBJECTS = ("config.json", "tokenizer.json", "index.json", "map.json", "tokens.json")


@contextmanager
def read_from(path: str | os.PathLike, name: str) -> Iterator[None]:
    """Where the block cannot read a local folder because a JSON file there is broken, say which; transformers often does not.

    Args:
        path: a folder; of a hub name nothing is looked at.
        name: the setting that messages begin with.

    Raises:
        ValueError: such a file, or before the block one that is a pipe or a link to nothing; other errors go on.
    """
    folder = Path(path)
    if not folder.is_dir():
        yield
        return
    for file in folder.iterdir():
        if not file.is_dir():
            regular(file, name)
    try:
        yield
    except Exception as error:
        for file in sorted(folder.rglob("*.json")):
            try:
                read_json(file, kind=dict if file.name.endswith(_OBJECTS) else object)
            except ValueError as broken:
                raise ValueError(f"{name}: {broken}") from error
        raise


def check_sealed(folder: str | os.PathLike, weights: bool) -> None:
    """Compare a saved model's folder with the manifest that a training run wrote into it, where one is there.

    Args:
        folder: local or not.
        weights: whether the trained part is compared too; of a trained LLM's weights, which a hash would take long for, the size
            alone is.

    Raises:
        ValueError: a file that is missing, or has been changed.
    """
    manifest = Path(folder) / MANIFEST
    if not manifest.exists():
        return

    def hashed(name: str) -> bool:
        return (weights or not name.endswith(".safetensors")) and not name.startswith("llm/")

    if reason := damage(folder, hashed):
        raise ValueError(f"{folder}: {reason}; restore it, or remove {MANIFEST} there to load the folder as it is now")


def damage(
    folder: str | os.PathLike,
    hashed: Callable[[str], bool] = lambda name: True,
    looked_at: Callable[[str], bool] = lambda name: not name.endswith(_PROSE),
) -> str | None:
    """Why a folder is not as its manifest says; None if it is.

    Args:
        folder: one that `layalign.train.checkpoints.seal` wrote a manifest into.
        hashed: of a file's name, whether its content is compared, beside its size.
        looked_at: of a file's name, whether it is looked at; all but prose, which anyone may edit.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not folder.is_dir():
        return "not there"
    if manifest.exists() and not manifest.is_file():  # a pipe would be waited for without end
        return f"{MANIFEST} is not a file"
    name = MANIFEST
    try:
        files = read_json(manifest)["files"]
        if not files:
            return f"{MANIFEST} names no files"
        for name, expected in files.items():
            path = folder / name
            if folder.resolve() not in Path(os.path.normpath(folder.resolve() / name)).parents:
                return f"{MANIFEST} names a file outside its folder: {name}"
            if not looked_at(name):
                continue
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if hashed(name) and sha256_of(path) != expected["sha256"]:
                return f"{name} is damaged (its hash is not the manifest's)"
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written to the end"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable: {error}"
    return None
