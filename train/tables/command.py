"""`layalign table`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from layalign.commands.options import listed, refuse, require
from layalign.spelling import long_dtype


def table(
    number: Annotated[int | None, typer.Argument(help="Of a table of the paper, 1 to 16.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for the recipes, such as stages.task.steps=100.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only name the tables.")] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="The recipe that the rows are settings over; NAME=RECIPE where a table is over several (--list). The paper's by default.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Of all tables, which share rows.")] = Path(
        "runs/tables"
    ),
    row: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Comma-separated: train each row with each, and print means and spread.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only tell what would be trained, memory and time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="--plan: one JSON object.")] = False,
    recipes_only: Annotated[
        bool, typer.Option("--write-recipes", help="Only write the recipes of what is to be trained, for torchrun.")
    ] = False,
    base: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: where an encoder, LLM or translator is that a row names.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="NAME=FILE: a file of problems in place of a task.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the tasks' files; else datasets names.")] = None,
    languages: Annotated[str | None, typer.Option(help="Comma-separated codes; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per language.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str | None, typer.Option(help="Of evaluations: bf16, fp16 or fp32; as stored by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Of evaluations: cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """A table of the paper: train what is missing, evaluate, and print measured beside published; run it again and it goes on."""
    require("accelerate", "pydantic")
    from layalign.train.tables.table import load_table, table_numbers
    from layalign.train.tables.text import listed_tables, plan_lines

    if listing:
        typer.echo(listed_tables(load_table(one) for one in table_numbers()))
        return
    if number is None:
        raise ValueError("table: got no number; `layalign table --list` names them")
    refuse({"--json": as_json and not plan}, "--plan")
    require("matplotlib", "rich")
    from layalign.evaluation.settings import GenerationSettings
    from layalign.train.tables.asking import Asking
    from layalign.train.tables.make import make_table
    from layalign.train.tables.plan import plan_table, write_recipes
    from layalign.train.tables.runs import Sources

    refuse({"--write-recipes": plan and recipes_only}, "training, not with --plan")
    chosen = load_table(number)
    named = _pairs(base or [], "--base")
    if unknown := [name for name in named if name not in chosen.bases]:
        names = f"its rows name {', '.join(chosen.bases)}" if chosen.bases else "its rows name none"
        raise ValueError(f"--base: got {unknown[0]!r} for table {number}; {names}")
    sources = Sources(
        output=output,
        recipes=_recipes(recipe or [], chosen.recipes),
        overrides=tuple(overrides or ()),
        bases=named,
        seeds=_numbers(seeds, "--seeds"),
    )
    rows = row or None
    if plan:
        import logging

        logging.getLogger("transformers").setLevel(logging.ERROR)
        found = plan_table(chosen, sources, rows)
        typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(plan_lines(found)))
        return
    if recipes_only:
        for file in write_recipes(chosen, sources, rows):
            typer.echo(f"torchrun --nproc-per-node 8 -m layalign train {file}")
        return
    settings = GenerationSettings(
        batch_size=batch_size, max_new_tokens=max_new_tokens, dtype=long_dtype(dtype), device=device
    )
    files, own = _pairs(task or [], "--task"), dict.fromkeys(part.task for part in chosen.parts)
    if unknown := [name for name in files if name not in own]:
        raise ValueError(f"--task: got {unknown[0]!r}; rows of table {number} are asked {', '.join(own)}")
    asking = Asking(
        data=None if data is None else str(data),
        tasks=files,
        languages=listed(languages, "--languages"),
        limit=limit,
        settings=settings,
    )
    make_table(chosen, sources, asking, rows)


def _recipes(given: list[str], names: list[str]) -> dict[str, str]:
    """{shipped recipe's name: what takes its place} of words RECIPE and NAME=RECIPE."""
    found: dict[str, str] = {}
    for word in given:
        name, sign, path = word.partition("=")
        if not sign and len(names) > 1:
            raise ValueError(
                f"--recipe: got {word!r}, but rows of this table are over {' and '.join(names)}; takes {names[0]}={word} and the like"
            )
        if sign and name not in names:
            raise ValueError(f"--recipe: got {word!r}; rows of this table are over {', '.join(names)}")
        place = name if sign else names[0]
        if place in found:
            raise ValueError(f"--recipe: got {found[place]!r} and {path or word!r} for {place}, takes one of them")
        found[place] = path if sign else word
    return found


def _pairs(given: list[str], option: str) -> dict[str, str]:
    """{NAME: VALUE} of words NAME=VALUE."""
    found = {}
    for word in given:
        name, sign, value = word.partition("=")
        if not (name and sign and value):
            raise ValueError(f"{option}: got {word!r}, takes NAME=VALUE")
        found[name] = value
    return found


def _numbers(words: str | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in listed(words, option) or ())
    except ValueError:
        raise ValueError(f"{option}: got {words!r}, takes whole numbers, such as 0,1,2") from None
