"""`layalign models`: the families that the tests have joined, and what is proven with each. Loads neither torch nor transformers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TABLE = Path(__file__).with_name("families.json")
GAP = "  "


def models(
    encoders: Annotated[bool, typer.Option("--encoders", help="Encoders instead of LLMs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Both tables as one JSON object.")] = False,
) -> None:
    """List the LLM and encoder families that the tests cover, and what is proven with each; others are tried when they are loaded."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    typer.echo(json.dumps(table) if as_json else "\n".join(shown(table, "encoders" if encoders else "llms")))


def shown(table: dict[str, Any], kind: str) -> list[str]:
    """Lines of the table.

    Args:
        table: as families.json has it.
        kind: "llms" or "encoders".
    """
    cells, families = table["cells"][kind], table[kind]
    joined = {name: row for name, row in families.items() if "refused" not in row}
    refused = {name: row["refused"] for name, row in families.items() if "refused" in row}
    # A reason has no place in a column.
    reasons = {
        (name, cell): row[cell] for name, row in joined.items() for cell in cells if row[cell].startswith("no: ")
    }
    lines = [[kind, *cells]]
    lines += [
        [name, *("no" if (name, cell) in reasons else row[cell] for cell in cells)] for name, row in joined.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    found = [GAP.join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    found += ["", "yes: proven by a test on a tiny random model; -: the family has none"]
    found += [f"{cell}: {what}" for cell, what in cells.items()]
    found += [f"{name}, {cell}: {why}" for (name, cell), why in reasons.items()]
    if refused:
        found += ["", "Refused:", *(f"{name}: {why}" for name, why in refused.items())]
    return found


def written(page: str, table: dict[str, Any]) -> str:
    """A page of the documentation with both tables put in its two blocks of text anew.

    Args:
        page: with a block ```text for each table.
        table: as families.json has it.
    """
    parts = page.split("```text\n")
    for index, kind in ((1, "llms"), (2, "encoders")):
        _, rest = parts[index].split("```\n", 1)
        parts[index] = "\n".join(shown(table, kind)) + "\n```\n" + rest
    return "```text\n".join(parts)
