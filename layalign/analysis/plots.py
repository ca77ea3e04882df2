"""The figures of an analysis; their data is described in `run.analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from layalign.analysis.measures import Nearness
from layalign.figures import COLOURS, GRID, MARKERS, draw_bar_grid, draw_bars, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_english(readers: Mapping[str, Mapping[str, Nearness]], path: str | PathLike) -> None:
    """Bars by language: cosine with English of the same meaning, a line across each at that of other meanings."""
    languages = list(next(iter(readers.values())))
    figure, axes = new_figure(max(6.0, 2 + 0.3 * len(languages) * len(readers)), 4.2)
    for place, (reader, found) in enumerate(readers.items()):
        same = [found[lang]["same"] for lang in languages]
        middles, width = draw_bars(axes, range(len(languages)), same, place, len(readers), reader)
        axes.hlines(
            [found[lang]["other"] for lang in languages],
            [middle - width / 2 for middle in middles],
            [middle + width / 2 for middle in middles],
            color="black",
            label="other meanings" if place == 0 else None,
        )
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("cosine with English")
    axes.set_title("Mean-pooled states: the same meaning in English")
    draw_bar_grid(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def plot_components(readers: Mapping[str, Mapping[str, Any]], path: str | PathLike) -> None:
    """A panel a reader: the texts of every language along the first two principal components."""
    figure, panels = new_figure(5.4 * len(readers), 4.6, len(readers))
    for axes, (reader, found) in zip(panels, readers.items(), strict=True):
        for place, (lang, points) in enumerate(found["points"].items()):
            axes.scatter(
                *zip(*points, strict=True),
                s=14,
                alpha=0.7,
                label=lang,
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place // len(COLOURS) % len(MARKERS)],
                linewidths=0,
            )
        first, second = found["share"]
        axes.set_xlabel(f"first component ({first:.0%} of the variance)")
        axes.set_ylabel(f"second component ({second:.0%})")
        axes.set_title(reader)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    save_figure(figure, path)


def plot_encoder_layers(found: Mapping[str, Any], path: str | PathLike) -> None:
    """How alike the encoder's layers are, and how near a translation is to its English in each."""
    figure, (left, middle, right) = new_figure(14.0, 4.2, 3)
    _heatmap(figure, left, found["similarity"], "viridis", None, "cosine")
    left.set_xlabel("encoder state (0: embeddings)")
    left.set_ylabel("encoder state")
    left.set_title("Cosine of two layers, the same text")
    for axes, kind, title in (
        (middle, "same", "Cosine with English of the same meaning"),
        (right, "found", "English of the same meaning is nearest (%)"),
    ):
        for place, (lang, values) in enumerate(found["english"].items()):
            style = "-" if place < len(COLOURS) else "--"
            axes.plot(values[kind], style, color=COLOURS[place % len(COLOURS)], label=lang, linewidth=1.2)
        axes.set_xlabel("encoder state (0: embeddings)")
        axes.set_title(title)
        axes.grid(color=GRID)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False)
    save_figure(figure, path)


def plot_ratio(ratio: Mapping[str, Sequence[float]], layers: Sequence[int], path: str | PathLike) -> None:
    """By LLM layer, the mean over languages and their range."""
    rows = list(ratio.values())
    columns = list(zip(*rows, strict=True))
    figure, axes = new_figure(7.0, 4.0)
    axes.plot(layers, [sum(column) / len(column) for column in columns], color=COLOURS[0], marker=MARKERS[0])
    axes.fill_between(layers, list(map(min, columns)), list(map(max, columns)), color=COLOURS[0], alpha=0.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("LLM layer")
    axes.set_ylabel("|gate x cross-attention| / |self-attention|")
    axes.set_title(f"Weight of the cross-attention, mean and range of {len(rows)} languages")
    axes.grid(color=GRID)
    save_figure(figure, path)


def plot_mix(
    mix: Mapping[str, Sequence[Sequence[float]]], states: Sequence[Any], layers: Sequence[int], path: str | PathLike
) -> None:
    """The aligner's weights of every encoder state in the keys and values of every fused layer."""
    figure, panels = new_figure(11.0, 4.6, 2)
    most = max(abs(weight) for rows in mix.values() for row in rows for weight in row) or 1.0
    for axes, (kind, rows) in zip(panels, mix.items(), strict=True):
        _heatmap(figure, axes, rows, "RdBu_r", most, "weight")
        axes.set_xticks(range(len(states)), states, fontsize="small")
        axes.set_yticks(range(0, len(layers), max(1, len(layers) // 16)), layers[:: max(1, len(layers) // 16)])
        axes.set_xlabel("encoder state (0: embeddings)")
        axes.set_ylabel("LLM layer")
        axes.set_title(f"Aligner: {kind}")
    save_figure(figure, path)


def _heatmap(
    figure: Figure, axes: Axes, rows: Sequence[Sequence[float]], colours: str, most: float | None, label: str
) -> None:
    least = None if most is None else -most
    image = axes.imshow(rows, cmap=colours, aspect="auto", interpolation="nearest", vmin=least, vmax=most)
    figure.colorbar(image, ax=axes, label=label)
