"""`python -m bench report`: results.md and plots a machine, and the README's section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.report.plots import draw_all
from bench.report.results import read_results
from bench.report.tables import full_report, readme_section, replace_section
from layalign.kernels.files import write_text

RECORDED = Path("bench/results")


def report(files: Sequence[Path] | None = None, output: Path | None = None, readme: Path | None = None) -> list[Path]:
    """Write tables and plots; everything is read before anything is written.

    Args:
        files: bench/results/*/benchmarks.json by default.
        output: folder that gets one a kind of machine; beside each file by default.
        readme: file with both bench marks, whose section between them is written too.

    Returns:
        the paths written.

    Raises:
        ValueError: a file that holds no results, or two of one kind of machine for one place.
    """
    files = files or sorted(RECORDED.glob("*/benchmarks.json"))
    if not files:
        raise ValueError(f"{RECORDED}/*/benchmarks.json: there is none; `make bench` writes one")
    all_results = [read_results(path) for path in files]
    for results in all_results:
        if not results.rows:
            raise ValueError(f"{results.path} has no row")
    kinds = [results.kind for results in all_results]
    if (output or readme) and len(set(kinds)) < len(kinds):
        raise ValueError(f"one file a kind of machine is needed, got {', '.join(kinds)}")
    if readme:
        text = replace_section(readme.read_text(encoding="utf-8"), readme_section(all_results))
    written = []
    for results in all_results:
        folder = output / results.kind if output else results.path.parent
        drawn = draw_all(results, folder)
        write_text(folder / "results.md", full_report(results, [path.name for path in drawn]))
        written += [folder / "results.md", *drawn]
    if readme:
        write_text(readme, text)
        written.append(readme)
    return written
