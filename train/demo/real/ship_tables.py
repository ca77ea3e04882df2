"""The report of the real pair's tables that the repository has, made of what one machine after another measured."""

from __future__ import annotations

from pathlib import Path

from layalign.folders import damage
from layalign.kernels.files import read_json, write_json, write_text
from layalign.train.checkpoints import sealed_folder
from layalign.train.demo.driver import kept
from layalign.train.demo.real.plan import PLAN
from layalign.train.demo.real.shipped import SHIPPED
from layalign.train.tables.make import write_table
from layalign.train.tables.seeds import joined
from layalign.train.tables.text import table_text

REPORT = SHIPPED.with_name("tables_report")
ARGUMENTS = "arguments.json"


def ship_tables(output: str | Path, target: str | Path = REPORT) -> Path:
    """Write the tables of a folder into the report. Seeds and rows that are there already, of other machines with the same steps and
    questions, stay; a report with others is replaced.

    Args:
        output: a folder of `real_tables`.
        target: gets table_NN.json, .md, .png, .svg and .csv of each, arguments.json, and README.md with all of them.

    Returns:
        `target`.

    Raises:
        ValueError: nothing measured in the folder `output`, or a table of the report that cannot be read.
    """
    output, target = Path(output), Path(target)
    try:
        arguments = dict(kept(output / PLAN)["arguments"])
        arguments["data"] = arguments["data"] and "data"  # where it lies is nobody's, whether it is there everybody's
    except (FileNotFoundError, KeyError, TypeError):
        raise ValueError(f"{output} holds no {PLAN} of the real pair's tables") from None
    found = {file.name: read_json(file) for file in sorted((output / "tables").glob("table_*.json"))}
    if not found:
        raise ValueError(f"{output} holds no table that was measured")
    there = (target / ARGUMENTS).exists()
    if there and (reason := damage(target, looked_at=lambda name: name.endswith(".json"))):
        raise ValueError(
            f"{target}: {reason}; seeds of other machines are there alone: restore it, or remove it to begin anew"
        )
    same = there and read_json(target / ARGUMENTS) == arguments
    before = {file.name: read_json(file) for file in sorted(target.glob("table_*.json"))} if same else {}
    tables = before | {name: joined(table, before.get(name)) for name, table in found.items()}
    with sealed_folder(target) as fresh:
        write_json(fresh / ARGUMENTS, arguments)
        shown = []
        for name in sorted(tables):
            write_table(tables[name], fresh)
            shown.append(f"#{table_text(tables[name])}")
            if (picture := (fresh / name).with_suffix(".png")).exists():
                shown.append(f"![Accuracy against trained parameters]({picture.name})\n")
        write_text(fresh / "README.md", _index(shown, arguments))
    return target


def _index(shown: list[str], arguments: dict) -> str:
    """All tables on one page."""
    given = {name: value for name, value in arguments.items() if value is not None}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return f"""# Tables of the paper, over the real pair

multilingual-e5-small and SmolLM2-135M-Instruct in place of the paper's models, held-out problems in place of MGSM;
{arguments["steps"]} steps of batch {arguments["batch_size"]} a row over both stages, {arguments["questions"]} problems a language. Made by

```bash
python -m layalign.train.demo.real.tables {options}
```

{chr(10).join(shown)}"""
