"""`layalign report`."""

from pathlib import Path

import typer


def write_report(run: Path, output: Path | None, samples: int) -> None:
    """Write a run's report and say where.

    Args:
        run: folder of the run, which may be under way.
        output: the file; None: report.html in the run's folder.
        samples: so many of its samples are answered first.

    Raises:
        ValueError: no run there, no trained model to answer with, or a file that cannot be written.
    """
    from layalign.train.report.data import read_run
    from layalign.train.report.page import page
    from layalign.train.report.samples import answer_samples

    if samples:
        read_run(run)
        answer_samples(run, samples)
    text = page(read_run(run))
    file = output or run / "report.html"
    if file.is_dir():
        raise ValueError(f"--output: {file} is a folder, takes a file name")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output: {file} cannot be written: {error.strerror}") from None
    typer.echo(f"report: {file}")
