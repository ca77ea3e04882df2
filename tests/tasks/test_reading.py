"""Reading MGSM, MSVAMP and one's own problems; every malformed input names its place."""

import json
from pathlib import Path

import pytest

from layalign.tasks import load_task, load_tasks
from layalign.tasks.numbers import official_correct, strict_correct

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def mgsm(tmp_path):
    """A folder with two MGSM files."""
    (tmp_path / "mgsm_en.tsv").write_text("How many\u2028ducks?\t18\nAnd eggs?\t2,125\n", encoding="utf-8")
    (tmp_path / "mgsm_sw.tsv").write_text("\ufeffBata wangapi?\t18\r\nMayai mangapi?\t-3\r\n\r\n", encoding="utf-8")
    return tmp_path


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_mgsm_files(mgsm):
    problems = load_task("mgsm", mgsm)
    assert [(p["lang"], p["index"], p["question"], p["answer"]) for p in problems] == [
        ("sw", 0, "Bata wangapi?", 18),
        ("sw", 1, "Mayai mangapi?", -3),
        ("en", 0, "How many\u2028ducks?", 18),
        ("en", 1, "And eggs?", 2125),
    ]
    assert {p["task"] for p in problems} == {"mgsm"}


def test_languages_and_limit(mgsm):
    assert [p["lang"] for p in load_task("mgsm", mgsm, languages=["en", "sw"], limit=1)] == ["sw", "en"]
    assert [p["lang"] for p in load_task("mgsm", mgsm, languages=["en"])] == ["en", "en"]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_msvamp_files_in_a_folder_of_their_own(tmp_path, ending):
    row = {"query": "english", "m_query": "কতজন?", "response": "8.0", "equation": "- number0 number1"}
    write_lines(tmp_path / "msvamp" / f"test_Bengali.{ending}", row, row | {"response": "0.5"})
    write_lines(tmp_path / "msvamp" / f"test_Thai.{ending}", row | {"m_query": "กี่คน"})
    problems = load_task("msvamp", tmp_path)
    assert [(p["lang"], p["question"], p["answer"]) for p in problems] == [
        ("bn", "কতজন?", 8),
        ("bn", "কতজন?", 0.5),
        ("th", "กี่คน", 8),
    ]


def test_own_problems(tmp_path):
    rows = [{"question": f"q{i}", "answer": i, "lang": lang} for i, lang in enumerate(["xx", "en", "sw", "en"])]
    path = write_lines(tmp_path / "held_out.jsonl", *rows)
    assert [(p["task"], p["lang"], p["index"], p["answer"]) for p in load_task(str(path))] == [
        ("held_out", "sw", 0, 2),
        ("held_out", "en", 0, 1),
        ("held_out", "en", 1, 3),
        ("held_out", "xx", 0, 0),
    ]
    assert len(load_task(path, limit=1)) == 3
    assert load_task("problems", path) == load_task(path)
    path.rename(tmp_path / "problems.jsonl")
    assert {p["task"] for p in load_task("problems", tmp_path)} == {"problems"}


def test_a_dataset_with_one_configuration_per_language(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copy"
    write_lines(folder / "sw.jsonl", {"question": "Ngapi?", "answer": None, "answer_number": 7})
    write_lines(folder / "en.jsonl", {"question": "How many?", "answer": None, "answer_number": 7})
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: test\n    path: en.jsonl\n"
        "- config_name: sw\n  data_files:\n  - split: test\n    path: sw.jsonl\n---\n"
    )
    problems = load_task("mgsm", f"datasets:{folder}")
    assert [(p["lang"], p["question"], p["answer"]) for p in problems] == [("sw", "Ngapi?", 7), ("en", "How many?", 7)]
    assert [p["lang"] for p in load_task("mgsm", f"datasets:{folder}", languages=["en"])] == ["en"]
    with pytest.raises(ValueError, match="te not in"):
        load_task("mgsm", f"datasets:{folder}", languages=["te"])


def test_a_dataset_with_one_file_per_language(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_lines(tmp_path / "copy" / "test_Swahili.json", {"m_query": "Ngapi?", "response": "7.0"})
    problems = load_task("msvamp", f"datasets:{tmp_path / 'copy'}", languages=["sw"])
    assert [(p["question"], p["answer"]) for p in problems] == [("Ngapi?", 7)]
    with pytest.raises(ValueError, match=r"could not be loaded as the dataset .*test_\{name\}.jsonl"):
        load_task("msvamp", f"datasets:{tmp_path / 'copy'}", languages=["th"])


def test_a_dataset_that_is_a_script_is_read_from_its_converted_branch(monkeypatch):
    branch = "refs/convert/parquet"

    def names(path, revision=None):
        if revision != branch:
            raise RuntimeError("Dataset scripts are no longer supported, but found mgsm.py")
        return ["en", "sw"]

    def load(path, name, split, streaming, revision=None):
        assert (path, split, streaming, revision) == ("juletxara/mgsm", "test", True, branch)
        return [{"question": f"in {name}", "answer": None, "answer_number": 7}]

    monkeypatch.setattr("datasets.get_dataset_config_names", names)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert [p["question"] for p in load_task("mgsm")] == ["in sw", "in en"]


BAD_MGSM = {
    "no tab": (b"How many?\t1\nHow many? 2\n", r"mgsm_en.tsv:2: got 1 tab-separated"),
    "two tabs": (b"How\tmany?\t1\n", r"mgsm_en.tsv:1: got 3 tab-separated"),
    "answer in words": (b"How many?\teight\n", r"mgsm_en.tsv:1: answer: got 'eight'"),
    "two numbers": (b"How many?\t8 9\n", r"mgsm_en.tsv:1: answer: got '8 9'"),
    "no answer": (b"How many?\t\n", r"mgsm_en.tsv:1: answer: got ''"),
    "no question": (b"a\t1\n  \t8\n", r"mgsm_en.tsv:2: question: got"),
    "an empty line within": (b"a\t1\n\nb\t2\n", r"mgsm_en.tsv:2: got 1 tab-separated"),
    "not UTF-8": (b"a\t1\nb\xff\t2\n", r"mgsm_en.tsv:2: not UTF-8 \(invalid start byte at byte 1\)"),
    "empty": (b"\n\n", r"mgsm_en.tsv: the file is empty"),
}


@pytest.mark.parametrize("case", BAD_MGSM)
def test_a_bad_mgsm_row_is_reported_with_its_place(tmp_path, case):
    content, message = BAD_MGSM[case]
    (tmp_path / "mgsm_en.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task("mgsm", tmp_path)


BAD_LINES = {
    "not JSON": ("{question: 1}", r"own.jsonl:2: not JSON \("),
    "cut short": ('{"question": "q", "answer"', r"own.jsonl:2: not JSON \("),
    "a list": ("[1, 2]", r"own.jsonl:2: got a list, takes a JSON object"),
    "no question": ({"answer": 1, "lang": "en"}, r"own.jsonl:2: no field question; it has answer, lang"),
    "null question": ({"question": None, "answer": 1, "lang": "en"}, r"own.jsonl:2: no field question"),
    "blank question": ({"question": " ", "answer": 1, "lang": "en"}, r"own.jsonl:2: question: got ' '"),
    "a number as question": ({"question": 5, "answer": 1, "lang": "en"}, r"own.jsonl:2: question: got 5"),
    "no answer": ({"question": "q", "lang": "en"}, r"own.jsonl:2: no field answer"),
    "true": ({"question": "q", "answer": True, "lang": "en"}, r"own.jsonl:2: answer: got True"),
    "NaN": ('{"question": "q", "answer": NaN, "lang": "en"}', r"own.jsonl:2: answer: got nan"),
    "no language": ({"question": "q", "answer": 1}, r"own.jsonl:2: no field lang"),
    "language is a list": ({"question": "q", "answer": 1, "lang": ["en"]}, r"own.jsonl:2: lang: got \['en'\]"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_json_line_is_reported_with_its_place(tmp_path, case):
    line, message = BAD_LINES[case]
    path = write_lines(tmp_path / "own.jsonl", {"question": "q", "answer": 1, "lang": "en"}, line)
    with pytest.raises(ValueError, match=message):
        load_task(str(path))


BAD_CALLS = {
    "unknown task": (dict(task="gsm8k"), "task: got 'gsm8k', takes 'mgsm'"),
    "missing file": (dict(task="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    "missing folder": (dict(task="mgsm", data="./nowhere"), "data: nowhere is not a folder"),
    "problems without data": (dict(task="problems", data=None), "data: problems takes a JSON-lines file"),
    "unknown language": (dict(task="mgsm", languages=["xx"]), "languages: xx not in .* which has"),
    "languages as text": (dict(task="mgsm", languages="en"), "languages: got the string 'en'"),
    "no languages": (dict(task="mgsm", languages=[]), "languages: got an empty list"),
    "limit 0": (dict(task="mgsm", limit=0), "limit: got 0"),
    "limit as text": (dict(task="mgsm", limit="5"), "limit: got '5'"),
    "no such files in the folder": (dict(task="msvamp"), "holds no file named like test_"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments(mgsm, case):
    arguments, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        load_task(**{"data": mgsm, **arguments})


def test_several_tasks(mgsm):
    own = write_lines(mgsm / "own.jsonl", {"question": "q", "answer": 1, "lang": "en"})
    loaded = load_tasks(["mgsm", str(own)], data={"mgsm": mgsm}, languages=["en"])
    assert list(loaded) == ["mgsm", "own"]
    assert [p["task"] for _, problems in loaded.values() for p in problems] == ["mgsm", "mgsm", "own"]
    with pytest.raises(ValueError, match="takes at least one, none twice"):
        load_tasks(["mgsm", "mgsm"], mgsm)
    with pytest.raises(ValueError, match="takes at least one"):
        load_tasks([], mgsm)
    with pytest.raises(ValueError, match="data: got msvamp, not among the tasks mgsm"):
        load_tasks(["mgsm"], {"msvamp": mgsm})


@pytest.mark.skipif(not (SHARED / "mgsm").is_dir(), reason="needs ../shared/data/mgsm")
def test_real_mgsm():
    problems = load_task("mgsm", SHARED / "mgsm")
    assert len(problems) == 11 * 250
    assert len({p["lang"] for p in problems}) == 11
    assert {p["answer"] for p in problems if p["index"] == 0} == {18}
    assert all(official_correct(str(p["answer"]), p["answer"]) for p in problems)
    assert all(strict_correct(f"The answer is: {p['answer']:,}.", p["answer"]) for p in problems)


@pytest.mark.skipif(not (SHARED / "msvamp").is_dir(), reason="needs ../shared/data/msvamp")
def test_real_msvamp():
    problems = load_task("msvamp", SHARED, limit=100)
    assert len(problems) == 10 * 100
    assert all(isinstance(p["answer"], int) for p in problems)
