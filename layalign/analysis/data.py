"""The numbers behind each figure of an analysis, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layalign.analysis.measures import Nearness
from layalign.evaluation.report import Table

HEADERS = {
    "english": ("system", "read by", "language", "same", "other", "found"),
    "components": ("system", "language", "text", "first", "second", "first share", "second share"),
    "encoder_layers": ("encoder", "state", "other state", "cosine"),
    "encoder_english": ("encoder", "language", "state", "same", "other", "found"),
    "tokens": ("encoder", "layer", "row", "row token", "column", "column token", "cosine"),
    "ratio": ("system", "language", "layer", "ratio"),
    "aligner": ("system", "part", "layer", "state", "weight"),
    "gates": ("system", "layer", "head", "gate"),
}


def encoders(systems: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """{encoder: the first of the systems that have it}: systems over one frozen encoder have the same figures of it, shown once.

    Args:
        systems: of `run.analyze`'s results.
    """
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for name, found in systems.items():
        if "encoder_layers" not in found:
            continue
        same = [names for one, names in groups if all(one[key] == found[key] for key in ("encoder_layers", "tokens"))]
        if same:
            same[0].append(name)
        else:
            groups.append((found, [name]))
    if len(groups) == 1:
        return {"encoder": groups[0][0]}
    return {f"encoder of {', '.join(names)}": found for found, names in groups}


def figure_rows(results: Mapping[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """{figure: its rows under HEADERS}, of the figures that there are.

    Args:
        results: of `run.analyze`.
    """
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in HEADERS}
    for name, found in results["systems"].items():
        for reader, languages in found["english"].items():
            rows["english"] += [(name, reader, lang, *values.values()) for lang, values in languages.items()]
        share = found["components"]["llm"]["share"]
        for lang, points in found["components"]["llm"]["points"].items():
            rows["components"] += [(name, lang, text, *point, *share) for text, point in enumerate(points)]
        layers = found.get("fused_layers", ())
        for lang, ratios in found.get("ratio", {}).items():
            rows["ratio"] += [(name, lang, *pair) for pair in zip(layers, ratios, strict=True)]
        for part, mix in found.get("mix", {}).items():
            for layer, weights in zip(layers, mix, strict=True):
                pairs = zip(found["mixed_states"], weights, strict=True)
                rows["aligner"] += [(name, part, layer, *pair) for pair in pairs]
        if found.get("gates"):
            for layer, heads in zip(layers, found["gates"], strict=True):
                rows["gates"] += [(name, layer, head, gate) for head, gate in enumerate(heads)]
    for name, found in encoders(results["systems"]).items():
        for state, cosines in enumerate(found["encoder_layers"]["similarity"]):
            rows["encoder_layers"] += [(name, state, other, cosine) for other, cosine in enumerate(cosines)]
        for lang, kinds in found["encoder_layers"]["english"].items():
            states = enumerate(zip(*kinds.values(), strict=True))
            rows["encoder_english"] += [(name, lang, state, *values) for state, values in states]
        rows["tokens"] += [(name, *row) for row in _token_rows(found["tokens"])]
    return {name: found for name, found in rows.items() if found}


def _token_rows(found: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for layer, cosines in zip(found["layers"], found["cosine"], strict=True):
        for row, (token, line) in enumerate(zip(found["tokens"][0], cosines, strict=True), 1):
            for column, (other, cosine) in enumerate(zip(found["tokens"][1], line, strict=True), 1):
                yield layer, row, token, column, other, cosine


def english_tables(readers: Mapping[str, Mapping[str, Nearness]]) -> dict[str, Table]:
    """{title: table} for `evaluation.report` from {reader: what `measures.against_english` gives}."""
    kinds = {
        "Cosine with English of the same meaning (x 100)": ("same", 100),
        "Cosine with English of other meanings (x 100)": ("other", 100),
        "English of the same meaning is the nearest (%)": ("found", 1),
    }
    return {
        title: {
            reader: {lang: scale * values[kind] for lang, values in found.items()} for reader, found in readers.items()
        }
        for title, (kind, scale) in kinds.items()
    }
