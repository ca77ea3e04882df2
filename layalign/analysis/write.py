"""The folder of an analysis: results, tables, figures with their data, and a page of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from layalign.analysis import plots
from layalign.analysis.data import HEADERS, encoders, english_tables, figure_rows
from layalign.analysis.measures import Nearness
from layalign.analysis.page import analysis_page
from layalign.evaluation import report
from layalign.figures import Files, write_csv
from layalign.fonts import legible
from layalign.kernels.files import write_json, write_text

RESULTS = "analysis.json"
PAGE = "report.html"
_KINDS = ("png", "svg", "csv")


def write_analysis(results: Mapping[str, Any], output: Path, show: bool = False) -> None:
    """Write the folder. Figures that an earlier analysis left there, and this one has not, are removed.

    Args:
        results: of `run.analyze`.
        output: the folder.
        show: print the tables, too.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS, results)  # first: it marks the folder as one that may be written again
    rows, draw = figure_rows(results), _drawings(results)
    for name in HEADERS:
        files = [output / f"{name}.{kind}" for kind in _KINDS]
        if name in rows:
            draw[name](files[:2])
            write_csv(files[2], HEADERS[name], rows[name])
        else:
            for file in files:
                file.unlink(missing_ok=True)
    tables = english_tables(_readers(results))
    write_text(output / "table.md", "\n".join(report.markdown_table(table, title) for title, table in tables.items()))
    drawings = {name: (output / f"{name}.svg").read_bytes() for name in rows}
    write_text(output / PAGE, analysis_page(results, tables, drawings))
    if show:
        for title, table in tables.items():
            report.print_table(table, title)
        for name, found in results["systems"].items():
            for why in dict.fromkeys(found["without"].values() if "encoder" in found else ()):
                figures = ", ".join(figure for figure, reason in found["without"].items() if reason == why)
                print(f"{name}: {why}, so not in {figures}")
        print(f"figures in {output}, all of them in {output / PAGE}")


def _drawings(results: Mapping[str, Any]) -> dict[str, Callable[[Files], None]]:
    """{figure: what draws it}."""
    systems, of_encoders = results["systems"], encoders(results["systems"])
    llms = {label: found["english"]["llm"] for label, found in systems.items()}
    components = {label: found["components"]["llm"] for label, found in systems.items()}
    similarity = {label: found["encoder_layers"]["similarity"] for label, found in of_encoders.items()}
    english = {label: found["encoder_layers"]["english"] for label, found in of_encoders.items()}
    tokens = {label: found["tokens"] for label, found in of_encoders.items()}
    joined = {label: found for label, found in systems.items() if "mix" in found}
    layers = {label: found["fused_layers"] for label, found in joined.items()}
    gates = {label: found["gates"] for label, found in joined.items() if found["gates"] is not None}
    ratios = {label: (layers[label], found["ratio"]) for label, found in joined.items()}
    of_whom = f", {legible(next(iter(gates)))}" if len(gates) == 1 else ""
    return {
        "english": partial(plots.plot_english, llms),
        "components": partial(plots.plot_components, components),
        "encoder_layers": partial(plots.plot_encoder_layers, similarity),
        "encoder_english": partial(plots.plot_encoder_english, english),
        "tokens": partial(plots.plot_tokens, tokens, results["pair"]["languages"]),
        "ratio": partial(plots.plot_ratio, ratios),
        "aligner": partial(plots.plot_mix, joined),
        "gates": partial(report.plot_gates, gates, title=f"Gates by layer{of_whom}", layers=layers),
    }


def _readers(results: Mapping[str, Any]) -> dict[str, Mapping[str, Nearness]]:
    of_encoders = encoders(results["systems"])
    found = {f"{label}, last state": found["english"]["encoder"] for label, found in of_encoders.items()}
    return found | {label: one["english"]["llm"] for label, one in results["systems"].items()}
