"""Each task from the published files' layout, the original one, saved folders and names of `datasets`: the same problems."""

import json

import pytest

from layalign.tasks import find_task, load_task
from tests.tasks.originals import (
    EXPECTED,
    FLORES,
    LAYOUTS,
    hub_rows,
    write_lines,
    write_rows,
    xcsqa_published,
    xnli_jsonl,
)

SPLITS = {"xcsqa": "validation", "xnli": "test", "xcopa": "test", "flores": "devtest"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def answers(problems):
    found = {}
    for problem in problems:
        found.setdefault(problem["lang"], []).append(problem["answer"])
    return found


def check(task, problems):
    assert answers(problems) == EXPECTED[task]
    assert {problem["task"] for problem in problems} == {task}
    for problem in problems:
        if task != "flores":
            assert problem["answer"] in problem["choices"]
    order = list(dict.fromkeys(problem["lang"] for problem in problems))
    assert order == [code for code in find_task(task).groups["avg"] if code in EXPECTED[task]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout(layout, tmp_path):
    task, write = LAYOUTS[layout]
    write(tmp_path)
    check(task, load_task(task, tmp_path))
    assert all(problem["index"] == 0 for problem in load_task(task, tmp_path, limit=1))
    assert {problem["lang"] for problem in load_task(task, tmp_path, languages=["sw"])} == {"sw"}
    with pytest.raises(ValueError, match="languages: xx not in"):
        load_task(task, tmp_path, languages=["xx"])


@pytest.mark.parametrize("task", SPLITS)
def test_a_dataset_with_a_configuration_for_each_language(task, tmp_path):
    folder = tmp_path / "copy"
    configs = []
    for label, rows in hub_rows()[task].items():
        write_rows(folder / f"{label}.jsonl", rows)
        part = f"  data_files:\n  - split: {SPLITS[task]}\n    path: {label}.jsonl\n"
        configs.append(f"- config_name: {label}\n{part}")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n", encoding="utf-8")
    check(task, load_task(task, f"datasets:{folder}"))
    assert len(load_task(task, f"datasets:{folder}", languages=["sw"], limit=1)) == 1


@pytest.mark.parametrize("prefix", ["", "datasets:"])
@pytest.mark.parametrize("task", SPLITS)
def test_saved_folders(task, prefix, tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {label: Dataset.from_list(rows) for label, rows in hub_rows()[task].items()}
    for label, part in parts.items():
        part.save_to_disk(tmp_path / "single" / label)
        DatasetDict({SPLITS[task]: part, "train": part.select([0])}).save_to_disk(tmp_path / "splits" / label)
    DatasetDict({label.replace("-", "_"): part for label, part in parts.items()}).save_to_disk(tmp_path / "dict")
    names = ["single", "splits"] + (["dict"] if task != "xcsqa" else [])  # a split's name takes no dash
    for name in names:
        check(task, load_task(task, f"{prefix}{tmp_path / name}"))


@pytest.mark.parametrize("saved", ["split", "alone"])
def test_a_saved_folder_with_the_language_in_its_rows(saved, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"language": lang, **row} for lang, found in hub_rows()["xnli"].items() for row in found]
    part = Dataset.from_list(rows)
    (DatasetDict({"test": part}) if saved == "split" else part).save_to_disk(tmp_path / "saved")
    check("xnli", load_task("xnli", tmp_path / "saved"))


def test_a_dataset_with_the_language_in_its_rows(tmp_path):
    write_rows(
        tmp_path / "copy" / "test.jsonl",
        [{"language": lang, **row} for lang, found in hub_rows()["xnli"].items() for row in found],
    )
    check("xnli", load_task("xnli", f"datasets:{tmp_path / 'copy'}"))


class Watched:
    """Rows that count how many of them were read, and end in an error."""

    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row
        raise AssertionError("read to the end")


@pytest.mark.parametrize("task", SPLITS)
def test_a_limit_reads_no_more_of_a_stream_than_it_needs(task, monkeypatch):
    watched = {}

    def load(path, name, split, streaming):
        assert (path, split, streaming) == (find_task(task).load.__self__.hub, SPLITS[task], True)
        return watched.setdefault(name, Watched(hub_rows()[task][name] * 3))

    monkeypatch.setattr("datasets.get_dataset_config_names", lambda path: [*hub_rows()[task], "all", "default"])
    monkeypatch.setattr("datasets.load_dataset", load)
    problems = load_task(task, limit=2, languages=["sw"])
    assert [problem["index"] for problem in problems] == [0, 1]
    with pytest.raises(ValueError, match=r"languages: all not in .*, which has"):
        load_task(task, limit=2, languages=["all"])
    assert {rows.read for rows in watched.values()} == {2}
    assert len(watched) == (2 if task == "flores" else 1)


def test_rows_of_many_languages_are_read_as_far_as_the_wanted_ones_need(monkeypatch):
    rows = Watched([{"language": lang, **row} for lang, found in hub_rows()["xnli"].items() for row in found])
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda path: ["default"])
    monkeypatch.setattr("datasets.load_dataset", lambda path, split, streaming: rows)
    problems = load_task("xnli", limit=1, languages=["sw", "en"])
    assert [(problem["lang"], problem["index"]) for problem in problems] == [("sw", 0), ("en", 0)]
    assert rows.read == 3


def test_the_encoders_texts(tmp_path):
    for layout in ("xcsqa, original", "xnli, original table", "xcopa, original", "flores, 101"):
        LAYOUTS[layout][1](tmp_path)
    first = {task: load_task(task, tmp_path, languages=["sw"])[0] for task in ("xcsqa", "xnli", "xcopa", "flores")}
    assert first["xcsqa"]["question"] == (
        "Samaki huishi wapi?\nOptions:A. jangwani\tB. majini\tC. angani\tD. mtini\tE. kitabuni\nAnswer:"
    )
    assert first["xcsqa"]["choices"] == ["A", "B", "C", "D", "E"]
    assert first["xnli"]["question"] == "Premise: Mvua inanyesha.\nHypothesis: Ni mchana.\nLabel:"
    assert first["xnli"]["choices"] == ["entailment", "neutral", "contradiction"]
    assert first["xcopa"]["question"] == (
        "Mwanamume alifungua bomba. What was the cause of this?\nOptions:A. Alikuwa na kiu.\tB. Alikuwa amelala.\nAnswer:"
    )
    assert first["flores"] == {
        "task": "flores",
        "lang": "sw",
        "index": 0,
        "question": "Treni husimama hapa.",
        "answer": "Trains stop here.",
    }


def test_older_versions_of_the_dataset_keep_a_question_in_lists(tmp_path):
    row = hub_rows()["xcsqa"]["X-CSQA-sw"][0]
    question = {"stem": [row["question"]["stem"]], "choices": [row["question"]["choices"]]}
    write_rows(tmp_path / "sw" / "dev.jsonl", [row | {"question": question}])
    xcsqa_published(tmp_path / "new")
    assert load_task("xcsqa", tmp_path) == load_task("xcsqa", tmp_path / "new", languages=["sw"], limit=1)


def test_any_language_of_the_files_is_taken_the_papers_first(tmp_path):
    for code in ("gu", "te", "sw", "yo", "bn"):
        write_lines(tmp_path / f"mgsm_{code}.tsv", ["How many?\t1"])
    write_lines(tmp_path / "mgsm_notes.tsv", ["not a language"])
    assert [problem["lang"] for problem in load_task("mgsm", tmp_path)] == ["bn", "sw", "te", "gu", "yo"]
    write_rows(tmp_path / "test_Telugu.json", [{"m_query": "q", "response": "1"}])
    assert [problem["lang"] for problem in load_task("msvamp", tmp_path)] == ["te"]
    for code in ("eng_Latn", "wol_Latn", "zho_Hant", "zho_Hans"):
        write_lines(tmp_path / f"{code}.devtest", ["a"])
    assert [problem["lang"] for problem in load_task("flores", tmp_path)] == ["zh", "wol_Latn", "zho_Hant"]


def test_devtest_comes_before_dev_and_a_dev_folder_is_taken_itself(tmp_path):
    for part in ("dev", "devtest"):
        for code, lines in FLORES.items():
            write_lines(tmp_path / part / f"{code}.{part}", lines[: 1 if part == "dev" else 2])
    assert len(load_task("flores", tmp_path, languages=["sw"])) == 2
    assert len(load_task("flores", tmp_path / "dev", languages=["sw"])) == 1


def test_one_of_the_files_of_all_languages_may_be_named_itself(tmp_path):
    xnli_jsonl(tmp_path)
    check("xnli", load_task("xnli", tmp_path / "XNLI-1.0" / "xnli.test.jsonl"))


def test_a_json_list_on_one_line_or_many_is_the_same(tmp_path):
    rows = [{"language": "sw", "sentence1": "a [1]", "sentence2": 'b "c"', "label": "neutral"}] * 2
    found = []
    for indent in (None, 1, "\t"):
        (tmp_path / "test.json").write_text(json.dumps(rows, indent=indent) + "\n", encoding="utf-8")
        found.append(load_task("xnli", tmp_path))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


def test_sentences_of_dev_are_not_paired_with_those_of_devtest(tmp_path):
    """Rows are joined by number: a folder with both kinds of files gives those of the target's kind."""
    for name, lines in {
        "eng.devtest": ["t0", "t1"],
        "eng.dev": ["d0", "d1"],
        "swh.devtest": ["s0", "s1"],
        "hau.dev": ["h0", "h1"],
    }.items():
        write_lines(tmp_path / name, lines)
    assert [(problem["lang"], problem["answer"]) for problem in load_task("flores", tmp_path)] == [
        ("sw", "t0"),
        ("sw", "t1"),
    ]
