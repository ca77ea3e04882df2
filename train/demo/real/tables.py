"""`python -m layalign.train.demo.real.tables`: tables of the paper for the real pair, every row trained with several seeds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from layalign.evaluation.settings import GenerationSettings
from layalign.kernels.files import write_text
from layalign.train.demo.driver import keep
from layalign.train.demo.problems import REAL
from layalign.train.demo.real.bases import encoder_folder, llm_folder
from layalign.train.demo.real.data import REAL_SHARE, prepare
from layalign.train.demo.real.experiment import RECIPE, SEEDS
from layalign.train.demo.real.fitting import fitting
from layalign.train.demo.real.plan import PLAN, check_count, check_folder, check_rate, read_plan, shared_steps
from layalign.train.demo.real.ship_tables import ship_tables
from layalign.train.recipe import read_recipe
from layalign.train.tables.asking import Asking
from layalign.train.tables.make import make_table
from layalign.train.tables.rows import merged
from layalign.train.tables.runs import Sources
from layalign.train.tables.table import load_table

TABLES = (4, 7, 11)
# The LLM reads the question too, as in the paper; "w/o LLM Input" takes that away.
PROMPT = "Question: {source}\nAnswer:"
# A Bengali question is up to 227 of the LLM's tokens, and what is cut is its end.
READ_TOKENS = 240
ANSWER_TOKENS = 32
ASKED_AT_ONCE = 25


def real_tables(
    output: str | Path = "runs/real_tables",
    tables: Sequence[int] = TABLES,
    seeds: Sequence[int] = SEEDS,
    steps: int = 1000,
    questions: int = 50,
    data: str | Path | None = None,
    cache: str | Path | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
) -> list[dict[str, Any]]:
    """Train and ask what is missing of some tables' rows, over the recipe `small_real` with the question as text for the LLM too.

    The same call goes on where an earlier one stopped; more seeds and tables may be added later, or, of other seeds, by another process
    meanwhile. Held-out problems take the place of MGSM, of which this pair solves nothing.

    Args:
        output: folder of all of them; tables/ in it gets table_NN.md, .json, .png, .svg and .csv.
        tables: numbers of those over mathematics.
        seeds: each row is trained with each.
        steps: of both stages, shared as in the experiment with the systems; a row without one of them has the other's alone.
        questions: held-out problems a language.
        data: folder with tatoeba_pairs/ and the sets that are tested on; None: generated text alone.
        cache: folder of the converted bases.
        batch_size, learning_rate: of both stages; the recipe's own as they stand.

    Returns:
        what `make_table` returns, for each table.

    Raises:
        ValueError: a wrong argument, a folder of other tables, data that cannot be read, a package that cannot be had.
    """
    output = Path(output)
    if data is not None:
        check_folder(Path(data))
    check_count("steps", steps, 2)
    check_count("questions", questions, 1)
    check_count("batch_size", batch_size, 1)
    check_rate(learning_rate)
    place = None if data is None else str(Path(data).resolve())
    arguments: dict[str, Any] = {"steps": steps, "questions": questions, "data": place}
    arguments |= {"batch_size": batch_size, "learning_rate": learning_rate}
    chosen = [load_table(number) for number in tables]
    if others := [table for table in chosen if {part.task for part in table.parts} != {"mgsm"}]:
        raise ValueError(
            f"tables: table {others[0].number} is not over MGSM alone, which held-out problems take the place of"
        )
    sources = Sources(output=output / "tables", seeds=tuple(seeds), callbacks=fitting)
    if read_plan(output, arguments) is None:
        output.mkdir(parents=True, exist_ok=True)
        keep(output / PLAN, {"arguments": arguments})
    recipe, problems = _prepared(output, arguments, (str(encoder_folder(cache)), str(llm_folder(cache))))
    names = {name: str(recipe) for table in chosen for name in table.recipes}
    asking = Asking(
        tasks={"mgsm": str(problems)},
        settings=GenerationSettings(max_new_tokens=ANSWER_TOKENS, batch_size=ASKED_AT_ONCE),
    )
    sources = replace(sources, recipes=names)
    # What another process is at is waited for when nothing of the other tables is left.
    for table in chosen[:-1]:
        with suppress(ValueError):  # a row's, which is said below, when the other tables are made
            make_table(table, sources, asking, wait=False)
    made, failed = [], []
    for table in chosen:
        try:
            made.append(make_table(table, sources, asking))
        except ValueError as error:
            failed.append(str(error))
    if failed:
        raise ValueError(failed[0])
    return made


def _prepared(output: Path, arguments: dict[str, Any], bases: tuple[str, str]) -> tuple[Path, Path]:
    """Files of the recipe that all rows are settings over, and of the problems that they are asked."""
    values = read_recipe(RECIPE, ())
    counts = shared_steps(arguments["steps"])
    data = None if arguments["data"] is None else Path(arguments["data"])
    size = {name: arguments[name] for name in ("batch_size", "learning_rate")}
    prepare(output / "data", {name: count * size["batch_size"] for name, count in counts.items()}, data, REAL_SHARE)
    stages: dict[str, dict[str, Any]] = {name: {"steps": count, **size} for name, count in counts.items()}
    stages["task"] |= {"prompt": PROMPT, "source_max_length": READ_TOKENS}
    values = merged(values, {"encoder": bases[0], "llm": bases[1], "data_root": str(output / "data")})
    values = merged(values, {"stages": stages, "llm_input": {"task": True}, "output": "unused"})
    recipe, problems = output / "small_real.yaml", output / "held_out.jsonl"
    write_text(recipe, yaml.safe_dump(values, sort_keys=False))
    asked = REAL.evaluation_problems(arguments["questions"], 0)
    rows = [{name: row[name] for name in ("question", "answer", "lang")} for row in asked]
    write_text(problems, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return recipe, problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m layalign.train.demo.real.tables", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/real_tables"), help="folder of the tables; the same one resumes")
    add("--data", type=Path, help="folder with tatoeba_pairs, tatoeba_laser, mgsm, msvamp, gsm8k")
    add("--tables", nargs="+", type=int, default=list(TABLES))
    add("--seeds", nargs="+", type=int, default=list(SEEDS))
    add("--steps", type=int, default=1000, help="optimizer steps of each row over both stages")
    add("--questions", type=int, default=50, help="held-out problems a language")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=2e-3)
    add("--cache", type=Path, help="folder of the converted models")
    add("--ship", action="store_true", help="put what --output holds into the report of the repository")
    given = vars(parser.parse_args(arguments))
    try:
        if given.pop("ship"):
            print(ship_tables(given["output"]))
        else:
            real_tables(**given)
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
