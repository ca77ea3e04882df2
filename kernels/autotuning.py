"""Opt-in autotuning: the fastest of a few launch configurations, measured once per GPU and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing

from .files import cache_folder, read_json, write_json
from .launch import LaunchConfig, noting

try:
    import fcntl
except ImportError:  # Windows has none: of two processes that tune at once, the last one's choice stays
    fcntl = None  # type: ignore[assignment]

# (path, entry) -> what this process has looked up: a launch cannot wait for a file.
_known: dict[tuple[Path, str], LaunchConfig] = {}


def enabled() -> bool:
    """Whether LAYALIGN_AUTOTUNE=1 asks for tuning instead of the shipped launch table."""
    return os.environ.get("LAYALIGN_AUTOTUNE") == "1"


def tuned(
    kernel_name: str, key: dict[str, Any], candidates: Sequence[LaunchConfig], run: Callable[[LaunchConfig], None]
) -> LaunchConfig:
    """The LaunchConfig among `candidates` with the least median time of run(config), measured when first asked for.

    key: dict of what the choice depends on; the first choice stored for it stays. Candidates that this GPU lacks
    resources for are skipped; where that is all of them, Triton's OutOfResources is raised.
    Raises ValueError, naming the file, where the store cannot be read.
    """
    path = store_path()
    entry = f"{kernel_name} {json.dumps(key, sort_keys=True)}"
    if (path, entry) not in _known:
        config = _stored(path).get(entry)
        if config not in candidates:  # none yet, or of an older launch table
            with noting(None):
                fastest = _fastest(candidates, run)
            config = _store(path, entry, fastest, candidates)
        _known[path, entry] = config
    return _known[path, entry]


def store_path() -> Path:
    """One file per GPU model and Triton version: a choice says nothing about another compiler."""
    device = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return cache_folder() / "autotuning" / f"{device}-triton-{triton.__version__}.json"


def _fastest(candidates, run):
    times, refused = {}, None
    for config in candidates:
        try:
            times[config] = triton.testing.do_bench(lambda config=config: run(config), return_mode="median")
        except triton.OutOfResources as error:
            refused = error
    if not times:
        raise refused
    return min(times, key=times.get)


def _store(path, entry, fastest, candidates):
    """Add the choice to what others have stored meanwhile -> the choice that holds: theirs if they were first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:  # beside the store, which is replaced and so cannot be locked
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        choices = _stored(path)
        if choices.get(entry) not in candidates:
            choices[entry] = fastest
            write_json(path, {name: asdict(config) for name, config in choices.items()})
    return choices[entry]


def _stored(path):
    if not path.exists():
        return {}
    try:
        return {entry: LaunchConfig(**config) for entry, config in read_json(path).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a store of autotuned launches ({error}); delete it to tune again") from error
