"""Evaluations side by side: the table with a column a system, paired comparisons, what cannot be compared."""

import json

import pytest

from layalign.evaluation.run import evaluate
from layalign.evaluation.runs import against, compare_runs, read_run
from layalign.evaluation.settings import GenerationSettings


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Folders of two evaluations of the same 24 questions, with and without the prompt, and one of fewer."""
    folder = tmp_path_factory.mktemp("runs")
    for lang in ("sw", "te"):
        lines = [f"ni ngapi {number} na {number}\t{(7 * number) % 12}" for number in range(12)]
        (folder / f"mgsm_{lang}.tsv").write_text("\n".join(lines))

    def run(name, limit=None, **settings):
        options = GenerationSettings(max_new_tokens=8, device="cpu", **settings)
        evaluate(model_folder, "mgsm", data=folder, limit=limit, output=folder / name, settings=options, progress=False)
        return folder / name

    return run("with"), run("without", prompt="none"), run("fewer", limit=4)


def test_a_column_a_system(runs, tmp_path):
    text = compare_runs(runs[:2], tmp_path)
    header = next(line for line in text.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:] == ["tiny (with)", "tiny (without)"]
    found = json.loads((tmp_path / "comparison.json").read_text())
    for folder, name in zip(runs, found["runs"], strict=False):
        results = json.loads((folder / "results.json").read_text())
        assert found["tasks"]["mgsm"]["strict"]["scores"][name] == results["tasks"]["mgsm"]["accuracy"]["strict"]
    assert set(found["paired"]) == {"tiny (without)"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"comparison.md", "comparison.json", "compared_mgsm_official.png", "compared_mgsm_strict.png"}
    assert (tmp_path / "comparison.md").read_text() == text


def test_a_run_is_as_good_as_itself(runs):
    result = against(read_run(runs[0]), read_run(runs[0]))["mgsm"]["scores"]["official"]
    assert {name: found["difference"] for name, found in result.items()} == {"avg": 0, "lrl": 0, "sw": 0, "te": 0}
    assert all(found["p"] == 1.0 for found in result.values())


def test_against_another_run(runs, model_folder, tmp_path, capsys):
    options = GenerationSettings(max_new_tokens=8, device="cpu")
    data = runs[0].parent
    evaluate(model_folder, "mgsm", data=data, output=tmp_path / "new", against=runs[1], settings=options)
    text = (tmp_path / "new" / "against.md").read_text()
    assert text in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "against.json").read_text())
    assert found["against"] == "tiny (without)"
    strict = found["tasks"]["mgsm"]["scores"]["strict"]["sw"]
    scores = [read_run(folder).results["tasks"]["mgsm"]["accuracy"]["strict"]["sw"] for folder in runs[:2]]
    assert [strict["a"], strict["b"]] == scores


def test_problems_of_a_file_are_compared(model_folder, tmp_path):
    """By their file's name, which is no task's."""
    file = tmp_path / "own.jsonl"
    rows = [{"question": f"ni ngapi {number} na {number}", "answer": number, "lang": "sw"} for number in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = GenerationSettings(max_new_tokens=4, device="cpu")
    for name, first in (("a", None), ("b", tmp_path / "a")):
        evaluate(model_folder, "problems", data=file, output=tmp_path / name, against=first, settings=options)
    found = json.loads((tmp_path / "b" / "against.json").read_text())
    assert found["tasks"]["own"]["scores"]["strict"]["sw"]["difference"] == 0
    assert "own" in compare_runs((tmp_path / "a", tmp_path / "b"), tmp_path)


def test_what_cannot_be_compared(runs, model_folder, tmp_path):
    with pytest.raises(ValueError, match="is not in the second run"):
        compare_runs((runs[2], runs[0]), tmp_path)
    with pytest.raises(ValueError, match="takes at least two"):
        compare_runs(runs[:1], tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "records.jsonl").write_text("")
    with pytest.raises(ValueError, match="it is not finished; the same command goes on with it"):
        compare_runs((runs[0], tmp_path / "unfinished"), tmp_path)
    (tmp_path / "unfinished" / "results.json").write_text('{"tasks": 1}')
    with pytest.raises(ValueError, match=r"results\.json: not the results of an evaluation"):
        read_run(tmp_path / "unfinished")
    with pytest.raises(ValueError, match=r"absent holds no finished evaluation: no results\.json"):
        evaluate(model_folder, "mgsm", data=runs[0].parent, output=tmp_path / "new", against=tmp_path / "absent")
    assert not (tmp_path / "new").exists()
