"""`layalign train --plan`."""

import json
from pathlib import Path

import typer


def print_plan(recipe: Path, overrides: list[str], as_json: bool, processes: int | None, gpu: str | None) -> None:
    """Print what a recipe would do.

    Args:
        recipe, overrides: as `load_recipe` takes them; the data files need not be there.
        as_json: one JSON object instead of lines.
        processes: that are to train together; None: as started.
        gpu: a GPU by its name instead of the present machine.

    Raises:
        ValueError: a recipe that is wrong, bases without a config.json, or a GPU that is not known.
    """
    import logging

    from layalign.train.plan.machine import named_machine
    from layalign.train.plan.plan import make_plan
    from layalign.train.plan.text import plan_text
    from layalign.train.recipe import load_recipe

    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded = load_recipe(recipe, overrides, check_files=False)
    plan = make_plan(loaded, processes, None if gpu is None else named_machine(gpu))
    typer.echo(json.dumps(plan, indent=2) if as_json else plan_text(plan))
