"""Every cell of layalign/families.json is what is found, family by family, on tiny random models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from typer.testing import CliRunner

from layalign.cli import app
from layalign.compatibility import VERSION
from layalign.families import table
from layalign.family_table import written as written_page
from tests.model import encoder_cells, llm_cells
from tests.model.encoder_cells import ENCODERS, encoder_row
from tests.model.llm_cells import build, llm_row, refused_row
from tests.model.llm_families import JOINED, JOINED_SINCE, REASON_SINCE, REFUSED

HOW = "python -m tests.model.family_table > layalign/families.json"


@pytest.fixture(scope="module")
def llm():
    return build(JOINED["llama"])


def written(kind, name):
    """The row, without the cells that need what is not installed."""
    row = table()[kind][name]
    return {key: value for key, value in row.items() if llm_cells.PACKAGES.get(key, "torch") in llm_cells.INSTALLED}


@pytest.mark.parametrize("name", JOINED)
def test_llm(name, tmp_path):
    if Version(JOINED_SINCE.get(name, "0")) > VERSION:
        pytest.skip("its attention does not go through transformers' interface yet")
    row = llm_row(name, tmp_path)
    if row is None:
        pytest.skip("this transformers has no such family")
    assert row == written("llms", name), HOW


@pytest.mark.parametrize("name", REFUSED)
def test_refused_llm(name):
    row = refused_row(name)
    if row is None:
        pytest.skip("this transformers has no such family")
    if Version(REASON_SINCE.get(name, "0")) > VERSION:
        assert "attention interface" in row["refused"]
    else:
        assert row == written("llms", name), HOW


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, llm):
    row = encoder_row(name, llm)
    if row is None:
        pytest.skip("this transformers has no such family")
    assert row == written("encoders", name), HOW


def test_nothing_else_is_written():
    assert list(table()["llms"]) == [*JOINED, *REFUSED]
    assert list(table()["encoders"]) == list(ENCODERS)
    assert table()["cells"] == {"llms": llm_cells.CELLS, "encoders": encoder_cells.CELLS}
    joined = [row for row in table()["llms"].values() if "refused" not in row]
    assert all(list(row) == ["attention", *llm_cells.CELLS] for row in joined)


def test_the_page_shows_the_table():
    page = Path(__file__).parents[2] / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == written_page(page.read_text(encoding="utf-8"), table())


def test_the_command_prints_it():
    run = CliRunner()
    printed = run.invoke(app, ["models"]).output
    for name, row in table()["llms"].items():
        (line,) = (line for line in printed.splitlines() if line.split()[:1] in ([name], [f"{name}:"]))
        assert line.endswith(row["refused"]) if "refused" in row else line.split()[1:] == list(row.values())[1:]
    assert "mt5 " in run.invoke(app, ["models", "--encoders"]).output
    assert json.loads(run.invoke(app, ["models", "--json"]).output) == table()


def test_it_prints_without_torch():
    code = (
        "import sys; from layalign.family_table import models; models(False, False); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
