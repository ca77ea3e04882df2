"""Averages against the paper's tables, Markdown and terminal tables, and that the plots draw what they are given."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from layalign.evaluation import report
from layalign.languages import (
    FLORES_GROUPS,
    MATHEMATICS_GROUPS,
    PAPER_LANGUAGES,
    XCOPA_GROUPS,
    XCSQA_GROUPS,
    XNLI_GROUPS,
)

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper" / "paper.txt"

# Table 2 of the paper (arXiv 2502.11405): averages, then bn th sw ja zh de fr ru es en.
ROWS = {
    "MGSM LayAlign": "59.0 56.4 60.2 51.6 59.2 58.4 52.0 56.0 62.0 61.6 61.6 61.6 66.4",
    "MGSM MindMerger": "57.4 54.8 58.6 51.2 56.8 56.4 50.8 54.4 60.0 55.2 62.4 59.6 67.6",
    "MGSM MetaMath": "37.9 5.9 51.6 6.4 6.4 4.8 34.8 39.2 56.4 55.6 51.6 55.2 68.4",
    "MSVAMP LayAlign": "59.1 54.6 61.1 51.8 55.1 56.9 59.3 58.7 62.5 62.1 58.8 62.0 64.0",
    "MSVAMP LangBridge": "54.4 51.6 55.5 49.9 52.2 52.7 53.3 54.1 56.0 56.4 54.7 56.1 58.1",
}
TABLE = {
    "LLM alone": {"bn": 1.0, "th": 2.0, "sw": 4.5, "de": 10.0, "en": 60.0, "te": 0.0},
    "LayAlign": {"bn": 51.6, "th": 59.2, "sw": 58.4, "de": 62.0, "en": 66.4},
}


def assert_averages(printed):
    averages, scores = printed[:3], dict(zip(PAPER_LANGUAGES, printed[3:], strict=True))
    for computed, expected in zip(report.summarize(scores).values(), averages, strict=True):
        assert abs(computed - expected) < 0.0501


@pytest.mark.parametrize("row", ROWS)
def test_averages_are_the_papers(row):
    assert_averages([float(value) for value in ROWS[row].split()])


@pytest.mark.skipif(not PAPER.is_file(), reason="needs ../shared/paper/paper.txt")
def test_averages_of_every_full_mathematics_row_of_the_paper():
    rows, in_table = [], False
    for line in PAPER.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if {"Avg.", "Avg"} & set(cells):
            in_table = cells[-10:] == ["Bn", "Th", "Sw", "Ja", "Zh", "De", "Fr", "Ru", "Es", "En"]
        elif in_table and len(cells) >= 14 and not line.startswith("---"):
            rows.append([float(cell) for cell in cells[-13:]])
    assert len(rows) >= 40
    for row in rows:
        assert_averages(row)


# Tables 12 and 13: the average, then the languages in their order.
OTHER_ROWS = {
    "X-CSQA LayAlign": (
        XCSQA_GROUPS,
        "62.3 51.7 53.3 53.7 55.9 62.0 56.4 64.8 64.6 66.2 62.0 66.2 65.2 64.3 66.5 67.3 76.7",
    ),
    "X-CSQA LLaMAX2": (
        XCSQA_GROUPS,
        "55.0 38.9 43.1 44.3 45.5 54.1 49.4 54.6 58.1 58.5 56.9 59.1 58.9 61.1 61.4 62.7 73.9",
    ),
    "XNLI LayAlign": (XNLI_GROUPS, "79.7 73.0 71.0 74.7 74.1 77.6 76.0 79.6 80.8 80.8 81.8 83.4 83.9 84.7 84.8 88.9"),
}


@pytest.mark.parametrize("row", OTHER_ROWS)
def test_averages_and_order_of_the_other_tasks_are_the_papers(row):
    groups, printed = OTHER_ROWS[row]
    average, *scores = map(float, printed.split())
    table = dict(zip(groups["avg"], scores, strict=True))
    assert abs(report.summarize(table, groups)["avg"] - average) < 0.0501
    shuffled = dict(sorted(table.items()))
    cells = report.markdown_table({"a": shuffled}, groups=groups).splitlines()[2].strip("| ").split(" | ")
    assert cells[1:] == printed.split()


@pytest.mark.skipif(not PAPER.is_file(), reason="needs ../shared/paper/paper.txt")
@pytest.mark.parametrize(("title", "groups"), [("X-CQSA", XCSQA_GROUPS), ("XNLI", XNLI_GROUPS)])
def test_the_orders_are_those_of_tables_12_and_13(title, groups):
    heads = [line for line in PAPER.read_text(encoding="utf-8").splitlines() if line.startswith(f"{title} | Avg |")]
    assert list(groups["avg"]) == [cell.strip().lower() for cell in heads[0].strip(" |").split("|")[2:]]


def test_groups_of_translation_lack_english_and_xcopa_has_all_of_its_own():
    assert FLORES_GROUPS["avg"] == PAPER_LANGUAGES[:-1]
    assert set(FLORES_GROUPS) == set(MATHEMATICS_GROUPS)
    table = report.markdown_table({"a": {"sw": 1.0, "qu": 2.0}}, groups=XCOPA_GROUPS).splitlines()
    assert table == [
        "| system | Avg.* | qu | sw |",
        "| --- | ---: | ---: | ---: |",
        "| a | 1.5 | 2.0 | 1.0 |",
        "",
        "* over the languages shown, not all 11.",
    ]


INTERVALS = {"LayAlign": {"avg": [57.0, 62.0], "bn": [45.0, 58.0], "en": [60.0, 72.5]}}


def test_a_table_with_intervals():
    lines = report.markdown_table(TABLE, intervals=INTERVALS).splitlines()
    assert lines[2] == "| LLM alone | 15.5 | 2.5 | 35.0 | 1.0 | 2.0 | 4.5 | 10.0 | 60.0 | 0.0 |"
    assert lines[3] == "| LayAlign | 59.5 ±2.5 | 56.4 | 64.2 | 51.6 ±6.5 | 59.2 | 58.4 | 62.0 | 66.4 ±6.2 | - |"
    assert lines[-1] == "±: half the width of a 95 % interval over draws of the questions."
    assert "±" not in report.markdown_table(TABLE, intervals={})


def test_telugu_enters_no_average_and_a_missing_group_is_none():
    scores = {"bn": 10.0, "th": 20.0, "te": 90.0}
    assert report.summarize(scores) == {"avg": 15.0, "lrl": 15.0, "hrl": None}
    assert report.summarize({"te": 90.0}) == {"avg": None, "lrl": None, "hrl": None}


def test_markdown_table():
    assert report.markdown_table(TABLE, title="mgsm").splitlines() == [
        "## mgsm",
        "",
        "| system | Avg.* | Lrl.* | Hrl.* | bn | th | sw | de | en | te |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| LLM alone | 15.5 | 2.5 | 35.0 | 1.0 | 2.0 | 4.5 | 10.0 | 60.0 | 0.0 |",
        "| LayAlign | 59.5 | 56.4 | 64.2 | 51.6 | 59.2 | 58.4 | 62.0 | 66.4 | - |",
        "",
        "* over the languages shown, not the paper's ten.",
        "te: in no average, as in the paper.",
    ]


def test_no_star_and_no_note_with_the_papers_languages():
    table = report.markdown_table({"a|b": dict.fromkeys(PAPER_LANGUAGES, 50.0)})
    assert "*" not in table
    assert "| a\\|b | 50.0 | 50.0 | 50.0 |" in table


def test_terminal_table():
    console = Console(file=StringIO(), width=60)
    report.print_table(TABLE, title="mgsm", console=console)
    printed = console.file.getvalue()
    assert "LLM alone" in printed
    assert [line.split() for line in printed.splitlines() if "Lrl." in line] == [
        ["│", "Lrl.*", "│", "2.5", "│", "56.4", "│"]
    ]
    assert "te: in no" in printed


def test_empty_tables_and_histories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="table: got no system"):
        report.markdown_table({})
    with pytest.raises(ValueError, match="table: got no system"):
        report.plot_accuracy({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="histories: got no stage"):
        report.plot_losses({"LayAlign": {"task": []}}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    saved = []
    save = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_accuracy_plot(tmp_path, figures):
    report.plot_accuracy(TABLE, tmp_path / "plots" / "accuracy.png")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(TABLE)
    assert "te: in no average" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_xticklabels()][:4] == ["Avg.*", "Lrl.*", "Hrl.*", "bn"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights[0][3:] == [1.0, 2.0, 4.5, 10.0, 60.0, 0.0]
    assert heights[1][3:] == [51.6, 59.2, 58.4, 62.0, 66.4]
    assert (tmp_path / "plots" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_error_bars_end_where_the_intervals_do(tmp_path, figures):
    report.plot_accuracy(TABLE, tmp_path / "accuracy.png", intervals=INTERVALS, measure="score (0 to 100)")
    axes = figures[0].axes[0]
    assert axes.get_ylabel() == "score (0 to 100)"
    drawn = [
        line.get_segments()[0] for bars in axes.containers if not hasattr(bars, "patches") for line in bars.lines[2]
    ]
    ends = sorted((segment[0][1], segment[1][1]) for segment in drawn)
    assert ends == [pytest.approx(end) for end in sorted(map(tuple, INTERVALS["LayAlign"].values()))]
    bars = next(found for found in axes.containers if hasattr(found, "patches") and found.get_label() == "LayAlign")
    middles = {round(bar.get_height(), 1): bar.get_x() + bar.get_width() / 2 for bar in bars}
    at = {round(segment[1][1], 1): segment[0][0] for segment in drawn}
    assert at[58.0] == pytest.approx(middles[51.6])
    assert at[72.5] == pytest.approx(middles[66.4])


def test_loss_plot(tmp_path, figures):
    history = {
        "translation": [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}],
        "task": [{"step": 10, "loss": 1.0}, {"step": 11, "runtime": 5.0}],
    }
    report.plot_losses(
        {"LayAlign": history, "LangBridge": {"task": [{"step": 10, "loss": 2.0}]}}, tmp_path / "loss.png"
    )
    translation, task = figures[0].axes
    assert [list(line.get_ydata()) for line in translation.lines] == [[3.0, 2.0], [2.5]]
    assert [line.get_label() for line in task.lines] == ["LayAlign", "LangBridge"]
    assert translation.get_title() == "translation stage"


def test_gate_plot(tmp_path, figures):
    torch = pytest.importorskip("torch")
    report.plot_gates({"scalar": [0.1, -0.2], "head": torch.tensor([[0.0, 0.5], [0.25, 0.75]])}, tmp_path / "gates.png")
    lines = figures[0].axes[0].lines
    assert list(lines[0].get_ydata()) == [0.1, -0.2]
    assert list(lines[1].get_ydata()) == [0.25, 0.5]


def test_plotting_leaves_the_users_matplotlib_alone(tmp_path):
    import matplotlib.pyplot as pyplot

    report.plot_gates({"LayAlign": [[0.1], [0.2]]}, tmp_path / "gates.png")
    assert pyplot.get_fignums() == []
