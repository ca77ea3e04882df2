"""What reports share: Markdown tables, and figures with their panels and bars."""

import pytest

from layalign import figures
from layalign.analysis import plots
from layalign.evaluation import report


def test_markdown_columns_are_aligned_and_bars_escaped():
    rows = [["a|b", "c", "1"]]
    assert figures.markdown_table(["x", "y", "z"], rows) == [
        "| x | y | z |",
        "| --- | ---: | ---: |",
        "| a\\|b | c | 1 |",
    ]
    assert figures.markdown_table(["x", "y", "z"], rows, "llr")[1] == "| --- | --- | ---: |"


@pytest.mark.parametrize(
    ("panels", "columns", "rows_and_columns"), [(None, None, (1, 1)), (3, None, (1, 3)), (3, 2, (2, 2)), (1, 2, (1, 1))]
)
def test_panels_fill_rows_and_none_is_left_empty(panels, columns, rows_and_columns):
    figure, axes = figures.new_figure(4, 3, panels, columns)
    first = axes if panels is None else axes[0]
    assert first.get_subplotspec().get_geometry()[:2] == rows_and_columns
    assert len(figure.axes) == (panels or 1)


def test_bars_of_series_stand_side_by_side(tmp_path):
    figure, axes = figures.new_figure(4, 3)
    left, width = figures.draw_bars(axes, [0, 1], [3.0, 4.0], 0, 2, "ours")
    right, _ = figures.draw_bars(axes, [0, 1], [5.0, 6.0], 1, 2, "theirs", colour="#123456")
    assert right == pytest.approx([middle + width for middle in left])
    assert (left[0] + right[0]) / 2 == pytest.approx(0)
    assert [bar.get_height() for bars in axes.containers for bar in bars] == [3.0, 4.0, 5.0, 6.0]
    assert {bar.get_hatch() for bar in axes.containers[1]} == {None}
    figures.save_figure(figure, tmp_path / "new" / "bars.png", dpi=50)
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "names",
    [
        ["bn", "de", "en", "es", "fr", "id", "ja", "ru", "sw", "te", "th", "vi", "zh"],
        ["LLM alone", "model in task-04e7048c0516"] * 3,
    ],
)
def test_a_legend_below_lies_within_its_figure(names):
    figure, axes = figures.new_figure(9.6, 4.8, 2)
    for place, name in enumerate(names):
        axes[0].plot([0, 1], [place, place], label=name)
    figures.legend_below(figure, axes[0])
    figure.canvas.draw()
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert place.x0 >= 0 and place.x1 <= figure.bbox.width


def test_long_names_leave_room_for_the_axes(tmp_path, monkeypatch):
    """Inside of the axes a legend of six long names left nothing of them."""
    shares = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: save(figure, path) or shares.append(drawn(figure)))
    monkeypatch.setattr(plots, "save_figure", report.save_figure)
    names = [f"someone/layalign-mt5-xl-metamath-7b-with-a-very-long-name-number-{number}-of-six" for number in range(6)]
    near = {lang: {"same": 0.8, "other": 0.6, "found": 50.0} for lang in ("sw", "de")}
    report.plot_gates({name: [0.1, 0.2, 0.3] for name in names}, tmp_path / "gates.png")
    plots.plot_english(dict.fromkeys(names, near), tmp_path / "english.png")
    plots.plot_ratio(dict.fromkeys(names, ([0, 1], {"sw": [0.1, 0.2]})), tmp_path / "ratio.png")
    assert len(shares) == 3 and min(shares) > 2


def drawn(figure):
    """Height of the axes, in inches."""
    return figure.axes[0].get_position().height * figure.get_figheight()


save = figures.save_figure
