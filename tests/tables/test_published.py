"""The tables' files against the paper's text, and what of a file is refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MT5Config

from layalign.train.settings import build, read_yaml
from layalign.train.tables import make
from layalign.train.tables.runs import Sources
from layalign.train.tables.table import FOLDER, Table, load_table, table_numbers
from layalign.train.tables.text import heading

PAPER = Path(__file__).parents[3] / "shared" / "paper" / "paper.txt"
# The first cells of the paper's blocks, one after the other, and the tables that they are of. The text has no captions; it speaks of
# the tables in this order, main part and appendix.
BLOCKS = [
    (1, "Method"),
    (2, "MGSM"),
    (2, "MSVAMP"),
    (3, "X-CSQA"),
    (3, "XNLI"),
    (4, "MGSM"),
    (5, "MGSM"),
    (6, "MGSM"),
    (7, "MGSM"),
    (8, "MGSM"),
    (9, "Settings"),
    (10, "Model"),
    (11, "MGSM"),
    (12, "X-CQSA"),
    (13, "XNLI"),
    (14, "MGSM"),
    (15, "MGSM"),
    (16, "MGSM"),
]
HEADINGS = {first for _, first in BLOCKS}
# What the text says of tables, and a row that stands there.
SAID = {
    2: ("Table 2 presents the results of the mathematical reasoning tasks", "MathOctopus"),
    3: ("The results for X-CSQA and XNLI are presented in Table 3", "LLaMAX2-Mul"),
    4: ("Table 4 presents the ablation results", "w/o Task Stage"),
    6: ("As shown in Table 6, when trained in an English-only setting", "LayAlign w/o LLM Input"),
    7: ("the results are presented in Table 7. Compared to using only the final layer", "LayAlign-LR"),
    8: ("As shown in Table 8, while the dynamic gate", "LayAlign (Dgate)"),
    9: (
        "As shown in Table 9, it is consistently more effective to omit LLM text input",
        "LayAlign + LLM Input at Trans",
    ),
    11: ("The results are presented in Table 11", "First 8 Layers"),
    12: ("Table 12 presents the complete experimental results on the X-CSQA dataset", "LLaMAX2-X-CSQA-SFT"),
    13: ("Table 13 reports the results on the XNLI dataset", "LLaMAX2-XNLI-SFT"),
    14: ("Table 14 illustrates the performance of LayAlign when using different multilingual models", "nllb-3.3B"),
    15: ("Table 15 provides the ablation study results", "w/o Task Stage"),
    16: ("Table 16 shows the experimental results on MGSM using English-only task data", "LayAlign w/o LLM input"),
}


def cells(line):
    return [cell.strip() for cell in line.strip().removesuffix("|").split("|")]


@pytest.fixture(scope="module")
def paper():
    """[(table, heading's cells, rows of cells)] of the paper's text."""
    if not PAPER.is_file():
        pytest.skip("the paper's text is not beside this checkout")
    blocks = []
    for line in PAPER.read_text(encoding="utf-8").splitlines():
        found = cells(line) if "|" in line else []
        if found and found[0] in HEADINGS:
            blocks.append((found, []))
        elif blocks and len(found) > 1 and not found[0].startswith(("---", "(")):
            blocks[-1][1].append(found)
    assert [head[0] for head, _ in blocks] == [first for _, first in BLOCKS]
    return [(number, head, rows) for (number, _), (head, rows) in zip(BLOCKS, blocks, strict=True)]


def parts_of(table, blocks):
    """(part's name, its rows in the paper) of a table."""
    for part, (_, _, rows) in zip(table.parts, blocks, strict=True):
        yield part, rows


def published(paper, number):
    """{(part, row): cells} as the paper's text has them."""
    table, blocks = load_table(number), [block for block in paper if block[0] == number]
    found = {}
    if number == 9:  # one block in two halves, each under a line of its own
        half = None
        for row in blocks[0][2]:
            if row[0].endswith("Task Data"):
                half = row[0]
            else:
                found[half, row[0]] = [cell for cell in row[1:] if cell]
        return found
    for part, rows in parts_of(table, blocks):
        for row in rows:
            if not row[0].endswith("Baselines"):
                found[part.name, row[0]] = row[1:]
    return found


def same(value, cell):
    """Whether a file's figure is what the paper's cell says; its text has the numbers and addresses of footnotes in words."""
    if isinstance(value, float):
        return re.fullmatch(r"[0-9]+(\.[0-9]+)?", cell) is not None and float(cell) == value
    return re.sub(r"\d?https?://\S+", "", cell).rstrip("0123456789") == value or cell == value


@pytest.mark.parametrize("number", range(1, 17))
def test_every_published_figure_stands_in_the_paper(number, paper):
    """In the table, the row and the column that the file says; and the file leaves out none."""
    table, expected = load_table(number), published(paper, number)
    expected = {(part, row.lower()): found for (part, row), found in expected.items()}
    seen = set()
    for row in table.rows:
        for part, figures in row.published.items():
            found = expected[part, row.name.lower()]
            assert len(figures) == len(found), (row.name, part)
            wrong = [(value, cell) for value, cell in zip(figures, found, strict=True) if not same(value, cell)]
            assert not wrong, (row.name, part, wrong)
            seen.add((part, row.name.lower()))
    assert seen == expected.keys()


@pytest.mark.parametrize("number", [number for number in range(1, 17) if number not in (1, 9)])
def test_columns_are_the_papers(number, paper):
    heads = [head for found, head, _ in paper if found == number]
    for part, head in zip(load_table(number).parts, heads, strict=True):
        theirs = [cell.lower().rstrip(".") for cell in head[1:]]
        ours = [heading(column).lower().rstrip(".") for column in part.columns]
        named = {
            "encoder (m)": "parm(m)",
            "adapter (m)": "adapter’s parameters(m)",
            "trained (m)": "total train parameters (m)",
        }
        named["aligner (m)"] = "layer-wise aligner’s parameters(m)"
        assert [named.get(column, column) for column in ours] == theirs


@pytest.mark.parametrize("number", SAID)
def test_the_text_speaks_of_each_table_by_this_number(number, paper):
    sentence, row = SAID[number]
    assert sentence in PAPER.read_text(encoding="utf-8")
    assert row in {found.name for found in load_table(number).rows}


def test_there_are_sixteen():
    assert table_numbers() == list(range(1, 17))
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {f"{number:02}" for number in range(1, 17)}
    with pytest.raises(ValueError, match="table: got 17, takes 1 to 16"):
        load_table(17)


WRONG = [
    (
        lambda file: file["rows"][0]["published"].update({"MGSM": [1.0]}),
        "MetaMath: 1 figures in MGSM, which has 13 columns",
    ),
    (lambda file: file["rows"][0]["published"].update({"GSM": []}), "no part is called 'GSM'; there are MGSM, MSVAMP"),
    (
        lambda file: file["parts"][0].update({"columns": ["average"]}),
        "columns: 'average' is no average, language or other column",
    ),
    (
        lambda file: file["parts"][0].update({"task": "gsm8k"}),
        "task: must be one of mgsm, msvamp, xcsqa, xnli, got 'gsm8k'",
    ),
    (lambda file: file["rows"][7].update({"recipe": "maths"}), "none that is shipped is called 'maths'"),
    (lambda file: file["rows"][7].update({"translator": "nllb"}), "translator: goes with system translate"),
    (lambda file: file["rows"][7].update({"llm": "llama"}), "llm: goes with system llm"),
    (lambda file: file["rows"][7].update({"stages": []}), "stages: "),
    (lambda file: file.update({"rows": []}), "rows: "),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_file_is_refused(change, message):
    file = read_yaml((FOLDER / "02.yaml").read_text(encoding="utf-8"))
    change(file)
    with pytest.raises(ValueError) as caught:
        build(Table, {"number": 2, **file})
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders with nothing but the configurations of mT5-xl's encoder and a 7B Llama."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 250112}
    MT5Config(**sizes, architectures=["MT5ForConditionalGeneration"]).save_pretrained(folder / "mt5-xl")
    LlamaConfig().save_pretrained(folder / "llama-7b")
    return [f"encoder={folder / 'mt5-xl'}", f"llm={folder / 'llama-7b'}"]


@pytest.mark.parametrize("row", [row.name for row in load_table(10).rows])
def test_table_10_counts_what_is_published(row, shapes, tmp_path):
    """By the rows' own settings over the paper's recipe, without a weight."""
    table = load_table(10)
    (entry,) = make.entries(table, Sources(output=tmp_path, overrides=shapes), [row])
    sizes = make.sizes_of(make.empty_model(entry.recipe))
    counted = [f"{count / 1e6:.2f}" for count in (sizes.adapter, sizes.aligner, sizes.trained)]
    (wanted,) = (found.published["Model"][:3] for found in table.rows if found.name == row)
    assert counted == [f"{value:.2f}" for value in wanted]
    assert torch.device(make.empty_model(entry.recipe).device).type == "meta"


def test_table_5_counts_mt5s_encoder(shapes, tmp_path):
    table = load_table(5)
    (entry,) = make.entries(table, Sources(output=tmp_path, overrides=shapes), ["mT5-xl"])
    assert round(make.sizes_of(make.empty_model(entry.recipe)).encoder / 1e6) == table.rows[3].published["MGSM"][0]
