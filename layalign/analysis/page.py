"""An analysis as one HTML page: its figures, their numbers, and what they were made of."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from layalign.analysis.data import encoders
from layalign.evaluation.report import Table
from layalign.pages import definitions, table, whole_page

# {figure: (title, of the paper, what it shows)}
FIGURES = {
    "english": (
        "Languages near English",
        "Figure 4",
        "Cosine of the mean-pooled states of the LLM's last layer with those of the same text in English. The black line is the mean "
        "cosine with English of other meanings: only what is above it tells of the meaning. An LLM alone reads the text in the prompt "
        "of the model that it is of, where that has one: a prompt's words bring all texts nearer to each other.",
    ),
    "components": (
        "Languages in two principal components",
        "Figure 5",
        "The same states along the two directions in which those of all languages together differ most.",
    ),
    "encoder_layers": (
        "The encoder's layers",
        "Figure 6",
        "Mean cosine of the mean-pooled states of two layers for the same text; state 0 is the embeddings' output.",
    ),
    "encoder_english": (
        "Languages near English in the encoder",
        "",
        "By state of the encoder, the mean-pooled states of a translation and of its English.",
    ),
    "tokens": (
        "Tokens of two texts in single layers of the encoder",
        "Figure 7",
        "Cosine of each token of one text with each of the other; special tokens are left out.",
    ),
    "ratio": (
        "Weight of the cross-attention",
        "Figure 8",
        "Norm of the gated cross-attention over that of the self-attention, the mean over tokens and texts; the band is the range of "
        "languages.",
    ),
    "aligner": (
        "Weights of the layer-wise aligner",
        "Figure 9",
        "How much each state of the encoder counts in the keys and the values of each LLM layer.",
    ),
    "gates": ("Gates", "", "The gate of the cross-attention in each LLM layer; with one a head, their mean and range."),
}
_ROLES = {"lora": "LoRA", "llm": "LLM"}
# px an inch of a figure: as it is drawn, and the least at which its letters can be read; below that it scrolls by itself.
_WIDE, _NARROW = 88, 58
_STYLE = """
.plot{margin:0 0 14px;padding:10px}.plot img{display:block;height:auto;background:#fff;border-radius:4px}
"""


def analysis_page(results: Mapping[str, Any], tables: Mapping[str, Table], drawings: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        results: of `run.analyze`.
        tables: of the cosines with English, by title.
        drawings: {figure: its SVG file}.
    """
    systems = results["systems"]
    models = [name for name, found in systems.items() if found["kind"] != "LLM alone"]
    title = f"Analysis of {', '.join(models or systems)}"
    return whole_page(
        title,
        (*_head(results, title), *_figures(results, tables, drawings), *_settings(results)),
        _STYLE,
    )


def _head(results: Mapping[str, Any], title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    data = results["data"]
    source = data.get("texts") or data["task"] + (f" in {data['data']}" if data["data"] else "")
    languages = ", ".join(results["languages"])
    about = f"{results['texts']} texts of one meaning in each of {languages}, from {source}"
    yield f'<p class="soft">{escape(about)}</p>'
    rows = []
    for name, found in results["systems"].items():
        trained = {_ROLES.get(part, part): count for part, count in found.get("trained", {}).items()}
        rows.append(
            [
                name,
                found["kind"],
                _text(found.get("encoder")),
                _text(found["llm"]),
                f"{sum(trained.values()):,} parameters" + (f": {', '.join(trained)}" if trained else ""),
            ]
        )
    yield from table(("system", "kind", "encoder", "LLM", "trained"), rows)
    yield '<p class="soft">An LLM alone reads the texts without an encoder: it is in the first two figures.</p>'


def _figures(results: Mapping[str, Any], tables: Mapping[str, Table], drawings: Mapping[str, bytes]) -> Iterator[str]:
    for name, (title, number, about) in FIGURES.items():
        yield f"<h2>{escape(title)}</h2>"
        if name in drawings:
            paper = f" The paper's {number}." if number else ""
            yield f'<figure class="plot"><figcaption><span>{escape(about + paper)}</span></figcaption>'
            yield f'<div class="wide">{_image(drawings[name], f"{title}. {_summary(name, results)}")}</div></figure>'
        reasons: dict[str, list[str]] = {}
        for system, found in results["systems"].items():
            if name in found["without"] and found["kind"] != "LLM alone":
                reasons.setdefault(found["without"][name], []).append(system)
        for why, without in reasons.items():
            yield f'<p class="soft">Not in this figure: {escape(", ".join(without))} ({escape(why)}).</p>'
        if name == "english":
            for place, (heading, rows) in enumerate(tables.items()):
                yield from _english(heading, rows, shown=place == 0)
        if name == "tokens" and name in drawings:
            yield from _texts(results)
        if name == "ratio" and name in drawings:
            yield from _ratios(results)
        if name in drawings:
            yield f'<p class="soft">The numbers of the figure: {name}.csv</p>'


def _image(drawing: bytes, said: str) -> str:
    """An SVG file inside the page, with what it says for who cannot see it."""
    found = re.search(rb'<svg[^>]* width="([\d.]+)pt"', drawing)
    inches = float(found[1]) / 72 if found else 7.0
    address = f"data:image/svg+xml;base64,{b64encode(drawing).decode()}"
    size = f"width:100%;min-width:{inches * _NARROW:.0f}px;max-width:{inches * _WIDE:.0f}px"
    return f'<img alt="{escape(said, quote=True)}" style="{size}" src="{address}">'


def _summary(name: str, results: Mapping[str, Any]) -> str:
    """A figure's main numbers in words."""
    parts = []
    for system, found in results["systems"].items():
        if name == "english":
            values = [values["same"] for values in found["english"]["llm"].values()]
            parts.append(f"{system}: {_range(values)}")
        elif name == "components":
            shares = " and ".join(f"{share:.0%}" for share in found["components"]["llm"]["share"])
            parts.append(f"{system}: {shares} of the variance")
        elif name == "ratio" and name in found:
            parts.append(f"{system}: {_range([x for row in found['ratio'].values() for x in row])}")
        elif name == "aligner" and "mix" in found:
            parts.append(f"{system}: {_range([x for rows in found['mix'].values() for row in rows for x in row])}")
        elif name == "gates" and found.get("gates"):
            parts.append(f"{system}: {_range([x for row in found['gates'] for x in row])}")
    for encoder, found in encoders(results["systems"]).items():
        if name == "encoder_layers":
            similarity = found["encoder_layers"]["similarity"]
            parts.append(f"{encoder}: the embeddings with the last state {similarity[0][-1]:.2f}")
        elif name == "encoder_english":
            last = [kinds["same"][-1] for kinds in found["encoder_layers"]["english"].values()]
            parts.append(f"{encoder}: in the last state {_range(last)}")
        elif name == "tokens":
            pairs = zip(found["tokens"]["layers"], found["tokens"]["cosine"], strict=True)
            parts += [f"{encoder}, layer {layer}: {_range([x for row in rows for x in row])}" for layer, rows in pairs]
    return "; ".join(parts)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _english(heading: str, rows: Table, shown: bool) -> Iterator[str]:
    languages = list(next(iter(rows.values())))
    yield f"<details{' open' if shown else ''}><summary>{escape(heading)}</summary>"
    cells = [[reader, *(f"{values[lang]:.1f}" for lang in languages)] for reader, values in rows.items()]
    yield from table(("", *languages), cells, first_number=1)
    yield "</details>"


def _ratios(results: Mapping[str, Any]) -> Iterator[str]:
    joined = {name: found for name, found in results["systems"].items() if "ratio" in found}
    layers = sorted({layer for found in joined.values() for layer in found["fused_layers"]})
    rows = []
    for name, found in joined.items():
        columns = zip(*found["ratio"].values(), strict=True)
        means = dict(zip(found["fused_layers"], (sum(column) / len(column) for column in columns), strict=True))
        rows.append([name, *(f"{means[layer]:.3f}" if layer in means else "" for layer in layers)])
    yield "<details><summary>By layer, the mean over languages</summary>"
    yield from table(("LLM layer", *map(str, layers)), rows, first_number=1)
    yield "</details>"


def _texts(results: Mapping[str, Any]) -> Iterator[str]:
    pair = results["pair"]
    names = [language or text for language, text in zip(pair["languages"], ("first text", "second text"), strict=True)]
    yield from definitions(dict(zip((f"{names[0]}, rows", f"{names[1]}, columns"), pair["texts"], strict=True)))
    for encoder, found in encoders(results["systems"]).items():
        yield f"<details><summary>Tokens by number ({escape(encoder)})</summary>"
        for name, tokens, count in zip(names, found["tokens"]["tokens"], found["tokens"]["counts"], strict=True):
            cut = "" if count == len(tokens) else f", the first {len(tokens)} of {count}"
            words = ", ".join(f"{number} {token}" for number, token in enumerate(tokens, 1))
            yield f"<p><b>{escape(name + cut)}:</b> {escape(words)}</p>"
        yield "</details>"


def _settings(results: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Settings and versions</h2>"
    for name, found in results["systems"].items():
        yield f"<details><summary>{escape(name)}</summary>"
        shown = {"place": found["place"], **found.get("settings", {}), **found["run"]}
        yield from definitions({key: _text(value) for key, value in shown.items()})
        yield "</details>"
    yield from definitions(results["versions"])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
