"""`layalign bench report`: results.md and plots a machine, and the README's section."""

from pathlib import Path

from layalign.kernels.files import write_text

from .plots import draw_all
from .results import read_results
from .tables import full_report, readme_section, replace_section

RECORDED = Path("bench/results")


def report(files=None, output=None, readme=None):
    """-> paths written. files: bench/results/*/benchmarks.json by default; output: folder that gets one a kind of machine,
    beside each file by default; readme: file with both bench marks. Everything is read before anything is written."""
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
