"""Commands for those who work on the kernels: what the compiler makes of them, and how fast they are."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from layalign.spelling import long_dtype


def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80 sm_90 ...; the present GPU's, else sm_80 sm_89 sm_90 sm_100.")
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Widths of a head; 64 128 by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 (by default) float16 float32.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Feature combinations; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line instead of a table.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilations at a time; one per core by default.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Compile again what was compiled before.")] = False,
    model: Annotated[
        str | None, typer.Option(help="h100 h200 a100: add loops, occupancy and predicted times there.")
    ] = None,
) -> None:
    """Compile every kernel ahead of time, no GPU needed, into Triton's cache: registers, spills, shared memory, tensor cores."""
    import json
    import os

    from tqdm import tqdm

    from layalign.kernels.ahead_of_time.calls import described_calls
    from layalign.kernels.ahead_of_time.report import (
        compile_report,
        default_architectures,
        describe,
        modelled_gpu,
        table,
    )

    gpu = modelled_gpu(model, arch)
    architectures = arch or ([gpu.architecture] if gpu else default_architectures())
    calls = described_calls(
        architectures,
        head_dim or (64, 128),
        [long_dtype(name) or name for name in dtype or ("bfloat16",)],
        variant or (),
    )
    lines = []
    for compiled in tqdm(
        compile_report(calls, jobs or os.cpu_count() or 1, refresh, gpu), "compiling", len(calls), unit="call"
    ):
        lines += compiled
        if as_json:
            for line in compiled:
                typer.echo(json.dumps(line))
    if not as_json:
        typer.echo(table(lines))
    failing = [line for line in lines if line["failures"]]
    for line in failing:
        typer.echo(f"fails: {describe(line)}: {'; '.join(line['failures'])}", err=True)
    if failing:
        raise typer.Exit(1)


def bench(context: typer.Context) -> None:
    """Results of the repository's `pytest bench/`: tables, plots, comparison."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        where = "bench: the benchmarks are in the repository: `pytest bench/` there, then `python -m bench report`"
        if "--help" not in context.args:
            raise ValueError(where)
        typer.echo(where)
        return
    sys.path.insert(0, str(root))
    from bench.__main__ import app as benchmarks

    benchmarks(context.args, prog_name="layalign bench")
