"""`python -m bench`: what is made of results. Each command imports what it needs when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

plain = {"add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(help="Results of `pytest bench/`: tables, plots, comparison.", no_args_is_help=True, **plain)


@app.command()
def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON files of results; bench/results/*/benchmarks.json by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a folder a machine; beside each file by default.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File whose section between the bench marks is written."),
    ] = None,
) -> None:
    """Tables (results.md) and plots from result files."""
    from bench.report.report import report

    for path in report(files, output, readme):
        typer.echo(path)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON of `pytest bench/ --benchmark-json=FILE`.")],
    against: Annotated[Path, typer.Option(help="Folder with the recorded results of each kind of machine.")],
    tolerance: Annotated[float, typer.Option(min=0.0, help="0.10 passes what is at most a tenth slower.")] = 0.10,
    failing: Annotated[
        Path | None, typer.Option(help="Write the tests of slower rows there: `pytest @FILE` measures them again.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="FILE has only some of the rows: name none it lacks.")
    ] = False,
) -> None:
    """Compare our times over the yardstick with recorded ones; exit status 1 where one is slower past the tolerance."""
    from bench.report.check import compare, recorded_for, table
    from bench.report.results import read_results

    now = read_results(file)
    compared = compare(now, recorded_for(now.kind, against))
    typer.echo(table(compared.both, tolerance))
    only_recorded = [] if partial else compared.only_recorded
    for side, names in (
        ("recorded, not measured now", only_recorded),
        ("measured now, not recorded", compared.only_now),
    ):
        for name in names:
            typer.echo(f"{side}: {name}")
    slower = [one for one in compared.both if one.is_slower(tolerance)]
    if failing is not None:
        failing.write_text("".join(f"{one.fullname}\n" for one in slower), encoding="utf-8")
    if slower:
        typer.echo(f"{len(slower)} of {len(compared.both)} rows are over {tolerance:.0%} slower", err=True)
        raise typer.Exit(1)


@app.command()
def predicted(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; bench/results by default.")] = None,
    before: Annotated[bool, typer.Option("--before", help="Write what later runs are compared with.")] = False,
) -> None:
    """Goals of speed as the static model predicts them, no GPU needed: predicted.md and predicted.json."""
    from bench.predicted import RESULTS, write

    typer.echo(write(output or RESULTS, before))


@app.command()
def calibration(
    attention: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="tritonbench's triton_fused_attention.py.")
    ] = None,
    product: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="tritonbench's persistent_matmul.py.")
    ] = None,
) -> None:
    """Public figures of an H100 beside what the static model predicts; with both files, the kept loops are compiled anew."""
    from bench.calibration import table, write

    if (attention is None) != (product is None):
        raise ValueError("calibration: takes --attention and --product together")
    if attention is not None and product is not None:
        typer.echo(write(attention, product))
    typer.echo(table())


@app.command()
def serving(
    model: Annotated[Path, typer.Argument(help="Folder of a LayAlign model.")],
    questions: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A text file, a question a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results.")] = Path("bench/results"),
    new_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="In which each server is started anew.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of weights.")] = "float32",
) -> None:
    """A model's server under load beside its LLM's alone and `model.generate`. Needs vLLM and pandas (`make vllm-load`)."""
    from bench.serving import measure, record

    texts = [line for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    typer.echo(record(measure(model, texts, new_tokens=new_tokens, rounds=rounds, dtype=dtype), output))


def main() -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2; anything else keeps its traceback."""
    try:
        app(prog_name="python -m bench")
    except ValueError as error:
        typer.echo(f"bench: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
