"""`layalign cache`: the tokenised data that training runs share, listed and removed."""

import time
from pathlib import Path
from typing import Annotated

import typer


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it all; a run that needs it tokenises again.")] = False,
    unused: Annotated[
        float | None, typer.Option("--unused", min=0, help="--clear: only what no run has used for so many days.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="A recipe's `cache`; by default $LAYALIGN_CACHE, else ~/.cache/layalign.")
    ] = None,
) -> None:
    """List the tokenised training data that runs share, with its size and last use, or remove it."""
    from layalign.kernels.files import cache_folder
    from layalign.train.data import token_store

    if unused is not None and not clear:
        raise ValueError("--unused goes with --clear")
    tokens = cache_folder(folder) / "tokens"
    entries = token_store.entries(tokens)
    if clear:
        before = time.time() - (unused or 0) * 86400
        freed = token_store.clear(tokens, [entry for entry in entries if unused is None or entry.used <= before])
        typer.echo(f"{tokens}: {freed / 1e6:.1f} MB removed")
        return
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        typer.echo(f"{entry.size / 1e6:10.1f} MB  last used {used}  {entry.folder.name}  {entry.what}")
    total = sum(entry.size for entry in entries) / 1e6
    typer.echo(f"{tokens}: {total:.1f} MB in {len(entries)} entries; `layalign cache --clear` removes them")
