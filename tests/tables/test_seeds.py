"""Rows over several seeds: means, spreads and what lies beyond them, and that each seed is a training of its own."""

import itertools
import json
import statistics

import pytest

from layalign.kernels.files import InUse
from layalign.train.tables import make
from layalign.train.tables.runs import Sources
from layalign.train.tables.seeds import apart, by_luck, over_seeds
from layalign.train.tables.table import load_table, table_numbers
from layalign.train.tables.text import table_text
from tests.tables.test_command import printed


def line(name, *figures, reference=False):
    found = {str(seed): {"measured": [figure, "words"]} for seed, figure in enumerate(figures)}
    return {"name": name, "reference": reference, "published": [50.0, "words"], **over_seeds(found)}


def test_means_spreads_and_what_lies_beyond_them():
    rows = [line("a", 1.0, 2.0, 4.5), line("b", 5.0, 5.5, 9.0), line("LayAlign", 4.0, 6.0, 8.0, reference=True)]
    assert rows[0]["measured"] == [2.5, "words"]
    assert rows[0]["spread"] == [pytest.approx(statistics.stdev([1, 2, 4.5])), None]
    # One of a's seeds is above one of LayAlign's.
    assert list(apart(rows)) == [("a", -3.5, False, 3), ("b", 0.5, False, 3)]
    rows += [
        line("c", 1.0, 2.0, 3.9),
        {"name": "llm", "published": [1.0, ""], "measured": [8.1, ""]},
        line("d", 1.0, 2.0),
    ]
    rows += [{"name": "absent", "published": [1.0, ""], "measured": None, "why": "it is not here"}]
    # Over the seeds that both have: of d's two, of e's one nothing can be said.
    rows.append(line("e", 1.0))
    found = list(apart(rows))[2:]
    assert found[:2] == [("c", pytest.approx(-3.7), True, 3), ("llm", pytest.approx(2.1), True, 0)]
    assert found[2:] == [("d", -3.5, True, 2), ("e", 0.0, False, 1)]
    part = {"name": "MGSM", "task": "mgsm", "file": "held_out.jsonl", "columns": ["avg", "source"], "rows": rows}
    text = table_text({"table": 4, "title": "t", "section": "s", "scorer": "official", "parts": [part]})
    assert "|  | here, 3 seeds | 2.5 | words |\n|  | ± | 1.8 |  |" in text
    said = "every seed's figure lies on one side of all of the other's, which"
    assert f"- c: Avg. -3.7, {said} 3 seeds each would be by luck in 1 of 10 rows" in text
    assert f"- d: Avg. -3.5, {said} 2 seeds each would be by luck in 1 of 3 rows" in text
    assert "- llm: Avg. +2.1, on one side of every seed of LayAlign\n" in text
    assert "- e: not compared, there are no two seeds of both" in text
    assert "- a: Avg. -3.5, within what seeds differ by" in text
    assert "Beside LayAlign, over the seeds that both have:" in text


def test_how_often_rows_lie_apart_by_luck():
    """Counted over all orders of the figures of two rows that nothing but luck tells apart."""
    for seeds in (2, 3):
        orders = list(itertools.combinations(range(2 * seeds), seeds))
        ends = sum(max(own) < seeds or min(own) >= seeds for own in orders)
        assert by_luck(seeds) == pytest.approx(ends / len(orders))


def test_rows_are_compared_by_answers_and_not_by_what_is_counted():
    """Tables 5, 10 and 14 begin with numbers of parameters."""

    def row(name, *figures, reference=False):
        found = {str(seed): {"measured": [12.5, figure]} for seed, figure in enumerate(figures)}
        return {"name": name, "reference": reference, "published": [1.0, 50.0], **over_seeds(found)}

    rows = [row("a", 1.0, 2.0), row("LayAlign", 4.0, 6.0, reference=True)]
    part = {"name": "MGSM", "task": "mgsm", "columns": ["adapter_millions", "avg"], "rows": rows}
    result = {"table": 10, "title": "t", "section": "s", "scorer": "official", "parts": [part]}
    text = table_text(result)
    assert "- a: Avg. -3.5, every seed's figure" in text and "|  | ± |  | 0.7 |" in text
    del rows[1]["reference"]
    assert "± is the sample standard deviation over seeds.\n" in table_text(result)


def test_tables_name_the_row_that_others_are_compared_with():
    found = {number: load_table(number).reference for number in table_numbers()}
    assert found.pop(1) is None and found.pop(5) == found.pop(14) == "mT5-xl"
    assert set(found.values()) == {"LayAlign"}


def test_a_single_seed_has_no_spread():
    rows = [line("a", 1.0), line("LayAlign", 2.0, reference=True)]
    assert rows[0]["spread"] == [None, None] and list(apart(rows)) == []


def test_each_seed_is_trained_and_asked(sources, recipes, asking, monkeypatch):
    """Those that are there already are not made again."""
    words = (4, "-r", recipes["math"], "-o", sources.output, "--task", f"mgsm={asking.tasks['mgsm']}")
    words += ("--max-new-tokens", 2, "--device", "cpu", "--row", "LayAlign", "--row", "MetaMath")
    plan = json.loads(printed(*words, "--seeds", "3,1", "--plan", "--json"))
    assert len(plan["trainings"]) == 4
    printed(*words, "--seeds", "3")
    trained = []
    real = make.train
    monkeypatch.setattr(make, "train", lambda recipe, calls: trained.append(recipe.seed) or real(recipe, calls))
    text = printed(*words, "--seeds", "3,1")
    assert trained == [1, 1]
    rows = {row["name"]: row for row in json.loads((sources.output / "table_04.json").read_text())["parts"][0]["rows"]}
    assert list(rows["LayAlign"]["seeds"]) == ["1", "3"] and "seeds" not in rows["MetaMath"]
    folders = {found["folder"] for found in rows["LayAlign"]["seeds"].values()}
    assert folders == {line["output"] for line in plan["trainings"] if line["run"].startswith("task")}
    assert rows["MetaMath"]["measured"] is not None and rows["w/o Adapter"]["why"] == "not asked for"
    assert "table 4: LayAlign, MGSM, seed 1" in text and "here, 2 seeds" in text
    assert "table 4: LayAlign, MGSM, seed 3" not in text


def test_a_row_asked_alone_leaves_the_others_in_the_table(sources, recipes, asking, monkeypatch):
    """And a call that is stopped writes nothing that lacks what was there, of any seed."""
    file = sources.output / "table_07.json"
    words = (7, "-r", recipes["math"], "-o", sources.output, "--task", f"mgsm={asking.tasks['mgsm']}")
    words += ("--max-new-tokens", 2, "--device", "cpu", "--seeds", "0,1")
    printed(*words)
    whole = file.read_bytes()
    monkeypatch.setattr(make, "train", lambda *_: pytest.fail("trained again"))
    text = printed(*words, "--row", "LayAlign-LR")
    assert file.read_bytes() == whole and "table 7:" not in text and text.count("here, 2 seeds") == 2
    text = printed(*words, "--row", "LayAlign", "--limit", 1)  # other questions
    rows = {row["name"]: row for row in json.loads(file.read_text())["parts"][0]["rows"]}
    assert rows["LayAlign-LR"]["why"] == "not asked for" and rows["LayAlign"]["measured"] is not None

    def killed(*_, **__):
        raise ValueError("killed")

    printed(*words)
    monkeypatch.setattr(make, "train", killed)
    with pytest.raises(ValueError, match="killed"):
        printed(*words[:-1], "0,2,1")
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("seeds", "overrides", "said"),
    [
        ("0,0", [], "seeds: got 0, 0, takes different numbers from 0 on"),
        ("0,-1", [], "takes different numbers from 0 on"),
        ("0,one", [], "--seeds: got '0,one', takes whole numbers, such as 0,1,2"),
        ("1", ["seed=2"], "seeds: got 1 and seed=2, takes one of them"),
    ],
)
def test_wrong_seeds(recipes, tmp_path, seeds, overrides, said):
    with pytest.raises(ValueError, match=said):
        printed(4, *overrides, "--seeds", seeds, "-r", recipes["math"], "-o", tmp_path / "t", "--plan")


def test_seeds_go_into_the_recipes(recipes):
    own = Sources(output=None, recipes=recipes, seeds=(0, 1)).of_seeds()
    assert [one.overrides for one in own] == [("seed=0",), ("seed=1",)]


def words_of(sources, recipes, asking, number=7):
    words = (number, "-r", recipes["math"], "-o", sources.output, "--task", f"mgsm={asking.tasks['mgsm']}")
    return *words, "--max-new-tokens", 2, "--device", "cpu"


def test_seeds_that_were_made_before_stay_in_the_table(sources, recipes, asking):
    words = words_of(sources, recipes, asking)
    printed(*words, "--row", "LayAlign", "--seeds", "0")
    assert "here, 2 seeds" in printed(*words, "--row", "LayAlign", "--seeds", "4")
    rows = {row["name"]: row for row in json.loads((sources.output / "table_07.json").read_text())["parts"][0]["rows"]}
    assert list(rows["LayAlign"]["seeds"]) == ["0", "4"]


def test_seeds_that_another_process_makes_meanwhile_stay(sources, recipes, asking, monkeypatch):
    """Its rows are in the last one's table, and none is asked twice."""
    words = (*words_of(sources, recipes, asking), "--row", "LayAlign")
    real, asked = make.measure, []

    def measure(entry, own, *rest, **other):
        if not asked:
            asked.append("the other's")
            printed(*words, "--seeds", "1")
        asked.append(own.said_seed)
        return real(entry, own, *rest, **other)

    monkeypatch.setattr(make, "measure", measure)
    assert "here, 2 seeds" in printed(*words, "--seeds", "0")
    assert asked == ["the other's", ", seed 1", ", seed 0", ", seed 1"]  # the last is read, not asked
    rows = {row["name"]: row for row in json.loads((sources.output / "table_07.json").read_text())["parts"][0]["rows"]}
    assert list(rows["LayAlign"]["seeds"]) == ["0", "1"]


def test_a_row_that_another_process_reads_is_waited_for(sources, recipes, asking, monkeypatch):
    words = (*words_of(sources, recipes, asking), "--row", "LayAlign")
    printed(*words)
    real, calls, waited = make.measure, [], []

    def measure(*given, **other):
        calls.append(1)
        if len(calls) < 3:
            raise InUse("output: records.jsonl is being written by another process")
        return real(*given, **other)

    monkeypatch.setattr(make, "measure", measure)
    monkeypatch.setattr(make.time, "sleep", waited.append)
    assert "| here |" in printed(*words) and len(waited) == 1


def test_rows_of_others_may_be_left_to_them(sources, recipes, asking, monkeypatch, capsys):
    """Where there are more tables to make: nothing is waited for, and no table shown that lacks rows."""
    real = make.measure

    def measure(entry, *given, **other):
        if entry.row.name == "LayAlign-LR":
            raise InUse("output: it is in use by another run")
        return real(entry, *given, **other)

    monkeypatch.setattr(make, "measure", measure)
    monkeypatch.setattr(make.time, "sleep", lambda _: pytest.fail("waited"))
    result = make.make_table(load_table(7), sources, asking, wait=False)
    rows = {row["name"]: row for row in result["parts"][0]["rows"]}
    assert rows["LayAlign"]["measured"] is not None and rows["LayAlign-LR"]["why"] == "not made yet"
    assert "| MGSM" not in capsys.readouterr().out


def test_rows_that_are_not_made_yet_are_not_called_unasked(sources, recipes, asking, monkeypatch):
    """And a table of one seed has no ±."""
    file = sources.output / "table_07.md"

    def killed(entry, *rest, **other):
        if entry.row.name == "LayAlign":
            raise ValueError("killed")
        return real(entry, *rest, **other)

    real = make.measure
    monkeypatch.setattr(make, "measure", killed)
    with pytest.raises(ValueError, match="killed"):
        printed(*words_of(sources, recipes, asking), "--seeds", "0")
    text = file.read_text(encoding="utf-8")
    assert (
        "- LayAlign: as published only; it could not be made: killed" in text and "| here |" in text and "±" not in text
    )


def test_averages_over_some_of_their_languages_say_so(sources, recipes, asking):
    words = (*words_of(sources, recipes, asking), "--row", "LayAlign")
    text = printed(*words, "--languages", "sw,en")
    assert "here, of their languages: Avg. over sw, en; Lrl. over sw; Hrl. over en." in text


def test_a_table_that_asks_nothing_needs_no_problems(sources, recipes, monkeypatch):
    monkeypatch.setattr("layalign.train.tables.asking.load_tasks", lambda *_: pytest.fail("problems were looked for"))
    words = [word for name in ("math", "langbridge_english") for word in ("-r", f"{name}={recipes[name]}")]
    assert "| here |" in printed(1, *words, "-o", sources.output, "--row", "MindMerge", "--row", "MetaMath")


def test_what_another_process_is_at_is_made_last(sources, recipes, asking, monkeypatch):
    """And waited for, if nothing else is left."""
    real, calls, waited = make.measure, [], []

    def measure(entry, *rest):
        calls.append(entry.row.name)
        if entry.row.name == "LayAlign-LR" and len(calls) < 4:
            raise InUse("output: it is in use by another run")
        return real(entry, *rest)

    monkeypatch.setattr(make, "measure", measure)
    monkeypatch.setattr(make.time, "sleep", waited.append)
    text = printed(*words_of(sources, recipes, asking))
    assert calls == ["LayAlign-LR", "LayAlign", "LayAlign-LR", "LayAlign-LR"] and len(waited) == 1
    assert text.count("left to another process for now: output: it is in use by another run") == 2
    rows = json.loads((sources.output / "table_07.json").read_text())["parts"][0]["rows"]
    assert all(row["measured"] is not None for row in rows)
