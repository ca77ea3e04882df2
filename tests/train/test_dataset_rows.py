"""What the `datasets` library reads: files, packed ones too, folders of them, and streams."""

import gzip
import json
import lzma

import pytest

from layalign.train.data.data_source import DataSource
from layalign.train.data.sources import read_sources

GOOD = [{"source": "moja", "target": "one", "lang": "sw"}, {"source": "mbili", "target": "two", "lang": "sw"}]


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_unpacks_files(tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*GOOD).encode()))
    (tmp_path / "b.csv.xz").write_bytes(lzma.compress(b"source,target,lang\nmoja,1.0,sw\n"))

    def targets(path):
        source = DataSource(format="dataset", path=path, streaming=streaming)
        return [record["target"] for record in read_sources([source], tmp_path)[0]]

    assert targets("a.jsonl.gz") == ["one", "two"] and targets("b.csv.xz") == ["1.0"]
    (tmp_path / "a.md.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a file called \*.md; datasets reads .parquet"):
        targets("a.md.gz")


def test_a_folder_of_files_is_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(*GOOD))
    assert read_sources([DataSource(format="dataset", path=str(folder))])[0] == GOOD


def stream(folder, **settings):
    return read_sources([DataSource(format="dataset", path=str(folder), streaming=True, **settings)])


@pytest.fixture
def parquet(tmp_path):
    """A folder of two Parquet files of 500 records each."""
    import datasets

    folder = tmp_path / "parquet"
    for part in range(2):
        rows = [{"source": f"neno {part} {row}", "target": "word", "lang": "sw"} for row in range(500)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"train-{part:05}-of-00002.parquet", batch_size=100)
    return folder


def test_datasets_are_streamed(tmp_path, parquet, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "none"))
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "train.jsonl").write_text(lines(*GOOD))
    assert stream(tmp_path / "json")[0] == GOOD
    assert [record["source"] for record in stream(parquet)[0]][::999] == ["neno 0 0", "neno 1 499"]
    assert len(stream(parquet, limit=3)[0]) == 3
    assert len(stream(parquet / "train-00001-of-00002.parquet")[0]) == 500
    assert not list((tmp_path / "none").rglob("*.arrow")), "nothing was converted first"


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_csv_are_the_texts_they_are(tmp_path, monkeypatch, streaming):
    """Not the numbers, truth values and gaps that pandas takes them for."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = ["007", "12", "3.10", "12345678901234567890123", "True", "None", "NA"]
    cells = "".join(f"swali {answer},{answer},nan\n" for answer in answers)
    (tmp_path / "a.csv").write_text(f"source,target,lang\n{cells}swali,,sw\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text(f"\ufeffsource,target,lang\n{cells}")
    (tmp_path / "folder" / "train_2.csv").write_text('source,target,lang\n"a, b",-0,sw\n', encoding="utf-8")
    (tmp_path / "tabs").mkdir()
    (tmp_path / "tabs" / "train.tsv").write_text("source\ttarget\na, b\t1.0\n")

    def rows(path, **settings):
        return read_sources([DataSource(format="dataset", path=path, streaming=streaming, **settings)], tmp_path)

    found = rows("a.csv", on_bad_line="skip")
    assert [(record["target"], record["lang"]) for record in found.records] == [(text, "nan") for text in answers]
    assert len(found.skipped) == 1 and "row 7: field 'target' is empty" in found.skipped[0]
    assert [record["target"] for record in rows("folder")[0]] == [*answers, "-0"]
    assert rows("tabs")[0] == [{"source": "a, b", "target": "1.0", "lang": ""}]
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"dataset '.*empty.csv' .*No columns to parse from file"):
        rows("empty.csv")


def test_datasets_that_cannot_be_streamed_are_named(tmp_path, parquet):
    with pytest.raises(ValueError, match=r"split 'dev'\): Bad split: dev"):
        stream(parquet, split="dev")
    with pytest.raises(ValueError, match=r"row 0: no field 'source'; fields: a"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "train.jsonl").write_text('{"a": 1}\n')
        stream(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot be read on after 1 rows|split 'train'\): "):
        (tmp_path / "other" / "train.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": \n')
        stream(tmp_path / "other")
    file = parquet / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"dataset '.*' \(subset None, split 'train'\): cannot be read on after 500 rows"
    ):
        stream(parquet)
    with pytest.raises(ValueError, match=r"a file called \*.md; datasets reads .parquet"):
        (tmp_path / "a.md").write_text("")
        stream(tmp_path / "a.md")
