"""The figure beside a table: which rows are points, and their numbers of trained parameters."""

import csv

from layalign.loading import load_model
from layalign.train.tables import make
from layalign.train.tables.figure import HEADER, points, trained_millions, write_figure
from layalign.train.tables.runs import entries
from layalign.train.tables.table import load_table


def result_of(number, measured=None):
    """A table of which some rows were measured: {(part, row): (figures, trained millions)}."""
    table, found = load_table(number), measured or {}
    parts = []
    for part in table.parts:
        rows = []
        for row in table.rows:
            figures, millions = found.get((part.name, row.name), (None, None))
            line = {"name": row.name, "published": row.published[part.name], "measured": figures}
            rows.append(line | ({} if millions is None else {"trained_millions": millions}))
        parts.append({"name": part.name, "columns": part.columns, "rows": rows})
    return {"table": number, "title": table.title, "parts": parts}


def test_table_10_is_the_papers_figure():
    found = {point.row: (point.millions, point.accuracy) for point in points(result_of(10))}
    assert found == {
        "LayAlign": (33.57, 59.0),
        "LayAlign +": (37.77, 58.4),
        "MindMerger": (25.18, 57.4),
        "MindMerger+": (37.76, 57.3),
    }


def test_measured_rows_stand_beside_published_ones(tmp_path):
    measured = {("Model", "LayAlign"): ([0.1, 0.2, 0.3, 12.5], 0.3)}
    assert write_figure(result_of(10, measured), tmp_path / "table_10")
    with (tmp_path / "table_10.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == HEADER and len(rows) == 5
    assert [row[2:] for row in rows if row[1] == "LayAlign"] == [
        ["paper", "33.57", "avg", "59.0"],
        ["here", "0.3", "avg", "12.5"],
    ]
    assert (tmp_path / "table_10.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "table_10.svg").read_text()


def test_a_table_without_numbers_of_parameters_has_measured_points_alone(tmp_path):
    """An LLM alone trains none; a row that was not measured is no point, and without any an earlier figure goes."""
    result = result_of(
        3, {("XNLI", "LLaMAX2"): ([76.0, None, 1.0, 2.0], 0.0), ("XNLI", "LayAlign"): ([79.0] * 4, 30.0)}
    )
    found = [(point.part, point.row, point.whose, point.millions, point.accuracy) for point in points(result)]
    assert found == [("XNLI", "LLaMAX2", "here", 0.0, 76.0), ("XNLI", "LayAlign", "here", 30.0, 79.0)]
    assert write_figure(result, tmp_path / "x") and len(list(tmp_path.iterdir())) == 3
    assert not write_figure(result_of(3), tmp_path / "x") and not list(tmp_path.iterdir())


def test_what_was_saved_is_counted(sources, tmp_path):
    """An adapter beside frozen bases, and an LLM that was trained whole."""
    training = {entry.row.name: entry.training for entry in entries(load_table(2), sources)}
    found = {}
    for row in ("MindMerger", "MetaMath-Mul"):
        for stage in training[row].in_order():
            make.make(stage)
        folder = training[row].folder / "model"
        model, _ = load_model(folder, device="cpu")
        found[row] = sum(own.numel() for own in (model.adapter if row == "MindMerger" else model.llm).parameters())
        assert trained_millions(folder) == found[row] / 1e6
    assert found["MindMerger"] < found["MetaMath-Mul"]
    assert trained_millions(tmp_path) == 0
