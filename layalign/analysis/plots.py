"""The figures of an analysis; their data is described in `run.analyze`. Each is written into one file, or several of different kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from layalign.analysis.measures import Nearness
from layalign.figures import (
    GRID,
    MANY_COLOURS,
    MARKERS,
    Files,
    draw_bar_grid,
    draw_bars,
    in_lines,
    legend_below,
    new_figure,
    save_figure,
)
from layalign.fonts import lacking, legible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATE = "encoder state (0: embeddings)"
_MOST_POINTS = 5000  # above, points are one picture inside a vector file


def plot_english(readers: Mapping[str, Mapping[str, Nearness]], path: Files) -> None:
    """Bars by language: cosine with English of the same meaning, a line across each at that of other meanings."""
    languages = list(next(iter(readers.values())))
    figure, axes = new_figure(min(16.0, max(6.0, 2 + 0.3 * len(languages) * len(readers))), 4.4)
    for place, (reader, found) in enumerate(readers.items()):
        same = [found[lang]["same"] for lang in languages]
        middles, width = draw_bars(axes, range(len(languages)), same, place, len(readers), in_lines(reader))
        axes.hlines(
            [found[lang]["other"] for lang in languages],
            [middle - width / 2 for middle in middles],
            [middle + width / 2 for middle in middles],
            color="black",
            label="other meanings" if place == 0 else None,
        )
    axes.set_xticks(range(len(languages)), list(map(legible, languages)))
    axes.set_ylabel("cosine with English")
    axes.set_title("Mean-pooled states: the same meaning in English")
    draw_bar_grid(axes)
    legend_below(figure, axes)
    save_figure(figure, path)


def plot_components(readers: Mapping[str, Mapping[str, Any]], path: Files) -> None:
    """A panel a reader: the texts of every language along the first two principal components."""
    columns = 2 if len(readers) in (2, 4) else min(3, len(readers))
    rows = -(-len(readers) // columns)
    figure, panels = new_figure(4.8 * columns, 4.2 * rows + 0.6, len(readers), columns)
    for axes, (reader, found) in zip(panels, readers.items(), strict=True):
        count = sum(map(len, found["points"].values()))
        for place, (lang, points) in enumerate(found["points"].items()):
            axes.scatter(
                *zip(*points, strict=True),
                s=18,
                alpha=0.7,
                label=legible(lang),
                linewidths=0,
                rasterized=count > _MOST_POINTS,
                **_mark(place),
            )
        first, second = found["share"]
        axes.set_xlabel(f"first component ({first:.0%} of the variance)")
        axes.set_ylabel(f"second component ({second:.0%})")
        axes.set_title(in_lines(reader, 44))
    legend_below(figure, panels[0])
    save_figure(figure, path)


def plot_encoder_layers(encoders: Mapping[str, Sequence[Sequence[float]]], path: Files) -> None:
    """A row an encoder: how alike any two of its layers are, and each with the embeddings and with the last."""
    figure, panels = new_figure(10.0, 4.0 * len(encoders), 2 * len(encoders), 2)
    for place, (encoder, similarity) in enumerate(encoders.items()):
        left, right = panels[2 * place : 2 * place + 2]
        _heatmap(figure, left, similarity, "viridis", None, "cosine")
        left.set_yticks(range(0, len(similarity), -(-len(similarity) // 13)))
        left.set_ylabel("encoder state")
        left.set_title(in_lines(f"Two layers, {encoder}", 44))
        for mark, (name, row) in enumerate((("the embeddings", similarity[0]), ("the last state", similarity[-1]))):
            right.plot(row, label=name, linewidth=1.2, **_mark(mark))
        right.set_ylabel("cosine")
        right.set_title("Each layer with")
        right.legend(frameon=False)
        right.grid(color=GRID)
        for axes in (left, right):
            _whole_ticks(axes)
            axes.set_xlabel(_STATE)
    save_figure(figure, path)


def plot_encoder_english(encoders: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: Files) -> None:
    """A row an encoder: by state, how near a translation is to its English, and how often that is the nearest."""
    figure, panels = new_figure(10.0, 3.8 * len(encoders) + 0.6, 2 * len(encoders), 2)
    for place, (encoder, languages) in enumerate(encoders.items()):
        left, right = panels[2 * place : 2 * place + 2]
        for axes, kind, title in (
            (left, "same", f"Cosine with English of the same meaning, {encoder}"),
            (right, "found", "English of the same meaning is nearest (%)"),
        ):
            for mark, (lang, values) in enumerate(languages.items()):
                axes.plot(values[kind], label=legible(lang), linewidth=1.2, markersize=4, **_mark(mark))
            _whole_ticks(axes)
            axes.set_xlabel(_STATE)
            axes.set_title(in_lines(title, 52))
            axes.grid(color=GRID)
    legend_below(figure, panels[0])
    save_figure(figure, path)


def plot_tokens(encoders: Mapping[str, Mapping[str, Any]], languages: Sequence[str | None], path: Files) -> None:
    """A row an encoder, a panel a layer: the cosine of each token of one text with each of another.

    Args:
        encoders: {name: what `tokens.token_map` gives}.
        languages: of the rows' and of the columns' text; None where it is not known.
        path: see `save_figure`.
    """
    most = max(max(map(len, found["tokens"])) for found in encoders.values())
    least = min(0.0, *(min(map(min, cosine)) for found in encoders.values() for cosine in found["cosine"]))
    layers = max(len(found["layers"]) for found in encoders.values())
    count = sum(len(found["layers"]) for found in encoders.values())
    columns = layers if most <= 24 else 1
    rows, side = -(-count // columns), max(3.2, 1.4 + 0.2 * most)
    figure, panels = new_figure(side * columns + 0.9, (side + 0.2) * rows + 0.3, count, columns)
    spare = iter(panels)
    for encoder, found in encoders.items():
        across, down = ([_token_label(*token) for token in enumerate(found["tokens"][text])] for text in (1, 0))
        for layer, cosine in zip(found["layers"], found["cosine"], strict=True):
            axes = next(spare)
            image = axes.imshow(cosine, cmap="cividis", vmin=least, vmax=1, aspect="auto", interpolation="nearest")
            small = {"fontsize": 9 if most <= 24 else 7}
            axes.set_xticks(range(len(across)), across, rotation=90, **small)
            axes.set_yticks(range(len(down)), down, **small)
            where = f"layer {layer}" if layer else "embeddings"
            first = len(encoders) > 1 and layer == found["layers"][0]
            axes.set_title(in_lines(f"{where}, {encoder}" if first else where, 36))
            axes.set_xlabel(legible(languages[1] or "second text"))
            axes.set_ylabel(legible(languages[0] or "first text"))
    figure.colorbar(image, ax=panels, label="cosine", aspect=4 * figure.get_figheight())
    if any(lacking(token) for found in encoders.values() for tokens in found["tokens"] for token in tokens):
        note = "#n: token n of its text, in letters that no font of this machine has; the report and the CSV file have them"
        figure.supxlabel(fill(note, int(13 * figure.get_figwidth())), fontsize="small")
    save_figure(figure, path)


def plot_ratio(systems: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float]]]], path: Files) -> None:
    """By LLM layer the mean over languages and their range, a line a system.

    Args:
        systems: {name: (fused layers, {lang: a number a layer})}.
        path: see `save_figure`.
    """
    figure, axes = new_figure(6.0, 4.0)
    for place, (name, (layers, ratio)) in enumerate(systems.items()):
        columns = list(zip(*ratio.values(), strict=True))
        means, mark = [sum(column) / len(column) for column in columns], _mark(place)
        axes.plot(layers, means, label=in_lines(name), **mark)
        axes.fill_between(layers, [*map(min, columns)], [*map(max, columns)], color=mark["color"], alpha=0.15)
    axes.set_ylim(bottom=0)
    _whole_ticks(axes)
    axes.set_xlabel("LLM layer")
    axes.set_ylabel("|gate x cross-attention| / |self-attention|")
    axes.set_title(in_lines(f"Weight of the cross-attention, mean and range of {len(ratio)} languages", 52))
    axes.grid(color=GRID)
    legend_below(figure, axes)
    save_figure(figure, path)


def plot_mix(systems: Mapping[str, Mapping[str, Any]], path: Files) -> None:
    """The aligner's weights of every encoder state in the keys and values of every fused layer; a row a system, one scale for all.

    Args:
        systems: {name: {"mix": {"keys", "values": (L, E)}, "mixed_states": (E,), "fused_layers": (L,)}}.
        path: see `save_figure`.
    """
    figure, panels = new_figure(11.0, 4.2 * len(systems), 2 * len(systems), 2)
    weights = [abs(x) for found in systems.values() for rows in found["mix"].values() for row in rows for x in row]
    spare = iter(panels)
    for name, found in systems.items():
        states, layers = found["mixed_states"], found["fused_layers"]
        for kind, rows in found["mix"].items():
            axes = next(spare)
            _heatmap(figure, axes, rows, "RdBu_r", max(weights) or 1.0, "weight")
            every = -(-len(states) // 13)
            axes.set_xticks(range(0, len(states), every), states[::every])
            every = -(-len(layers) // 16)
            axes.set_yticks(range(0, len(layers), every), layers[::every])
            axes.set_xlabel(_STATE)
            axes.set_ylabel("LLM layer")
            axes.set_title(in_lines(f"{name}, aligner: {kind}", 48))
    save_figure(figure, path)


def _mark(place: int) -> dict[str, Any]:
    """Colour and shape of one of many things in a figure: either tells apart those that are near."""
    colour, turn = place % len(MANY_COLOURS), place // len(MANY_COLOURS)
    return {"color": MANY_COLOURS[colour], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def _token_label(place: int, token: str) -> str:
    return f"#{place + 1}" if lacking(token) else legible(token)


def _whole_ticks(axes: Axes) -> None:
    """Layers have whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _heatmap(
    figure: Figure, axes: Axes, rows: Sequence[Sequence[float]], colours: str, most: float | None, label: str
) -> None:
    least = None if most is None else -most
    image = axes.imshow(rows, cmap=colours, aspect="auto", interpolation="nearest", vmin=least, vmax=most)
    figure.colorbar(image, ax=axes, label=label)
