import bz2
import gzip
import json
import logging
import lzma

import pytest

from layalign.prompts import PUBLISHED
from layalign.tasks import prompts
from layalign.train.data.data_source import DataSource
from layalign.train.data.sources import read_sources, stream_sources
from layalign.train.recipe import load_recipe

GOOD = [{"source": "moja", "target": "one", "lang": "sw"}, {"source": "mbili", "target": "two", "lang": "sw"}]


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read(tmp_path, content, file="data.jsonl", **settings):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    settings.setdefault("format", file.partition(".")[2])
    return read_sources([DataSource(path=file, **settings)], tmp_path)


def read_pairs(tmp_path, source, target, **settings):
    (tmp_path / "a.sw").write_bytes(source)
    (tmp_path / "a.en").write_bytes(target)
    return read_sources([DataSource(format="pairs", path="a.sw", target_path="a.en", lang="sw", **settings)], tmp_path)


def test_every_format_gives_the_same_records(tmp_path):
    import datasets

    assert read(tmp_path, lines(*GOOD))[0] == GOOD
    assert read(tmp_path, json.dumps(GOOD, indent=1), "data.json")[0] == GOOD
    assert read(tmp_path, "source\ttarget\tlang\nmoja\tone\tsw\nmbili\ttwo\tSwahili\n", "data.tsv")[0] == GOOD
    assert read(tmp_path, "moja\tone\r\nmbili\ttwo", "x.tsv", columns=["source", "target"], lang="sw")[0] == GOOD
    assert read_pairs(tmp_path, b"moja\nmbili\n", b"one\ntwo")[0] == GOOD
    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    assert read_sources([DataSource(format="dataset", path="saved")], tmp_path)[0] == GOOD
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(GOOD)}).save_to_disk(tmp_path / "parts")
    assert read_sources([DataSource(format="dataset", path="parts", split="dev")], tmp_path)[0] == GOOD
    assert read_sources([DataSource(records=GOOD)])[0] == GOOD


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_are_read_as_what_they_hold(tmp_path, pack):
    assert read(tmp_path, pack(lines(*GOOD).encode()))[0] == GOOD
    assert read(tmp_path, pack(json.dumps(GOOD).encode()), "data.json")[0] == GOOD
    assert (
        read(tmp_path, pack(b"\xef\xbb\xbfsource\ttarget\tlang\nmoja\tone\tsw\nmbili\ttwo\tsw"), "data.tsv")[0] == GOOD
    )
    assert read_pairs(tmp_path, pack(b"moja\nmbili\n"), b"one\ntwo")[0] == GOOD
    with pytest.raises(ValueError, match=r"a.sw has 3 lines and .*a.en 1"):
        read_pairs(tmp_path, pack(b"a\nb\nc"), pack(b"a\n"))


def test_a_long_list_is_decoded_piece_by_piece(tmp_path, monkeypatch):
    """Blocks that end anywhere: within a number, an escape, a character of several bytes, a literal, white space."""
    rows = [
        {
            "source": f"a\u00e9\u4e2d{'x' * (7 * row % 50)}",
            "target": 'b "\\"',
            "lang": "sw",
            "n": [row * 1.5, True, None, -(10**row)],
        }
        for row in range(20)
    ]
    expected = [{key: row[key] for key in ("source", "target", "lang")} for row in rows]
    for indent in (None, 1):
        for escaped in (False, True):
            text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
            for block in (1, 2, 3, 7, 64):
                monkeypatch.setattr("layalign.train.data.rows._BLOCK", block)
                assert read(tmp_path, "\ufeff \n" + text + "\n", "data.json")[0] == expected
    broken = json.dumps(rows, indent=1).replace('"target"', "target", 1)
    for block in (3, 64, 1 << 20):
        monkeypatch.setattr("layalign.train.data.rows._BLOCK", block)
        with pytest.raises(ValueError, match=r"data\.json:4: not JSON: Expecting property name .* at column 3"):
            read(tmp_path, broken, "data.json")
        with pytest.raises(ValueError, match=r"data\.json:3: no field 'target'"):
            read(tmp_path, '[\n\n{"source": "a"}]', "data.json")
    monkeypatch.setattr("layalign.train.data.rows._BLOCK", 5)
    assert read(tmp_path, "[1, 23, 456, " + json.dumps(GOOD)[1:], "data.json", on_bad_line="skip")[0] == GOOD


def test_a_list_longer_than_memory_is_not_held(tmp_path):
    import tracemalloc

    file = tmp_path / "long.json"
    with open(file, "w") as long:
        long.write("[")
        for _ in range(40_000):
            long.write(f"{json.dumps({**GOOD[0], 'filler': 'x' * 500})},\n")
        long.write(json.dumps(GOOD[1]) + "]")
    tracemalloc.start()
    count = sum(1 for _ in stream_sources([DataSource(format="json", path=str(file))], None, print))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_001
    assert most < file.stat().st_size / 3, "22 MB are read in blocks of 1"


# (file, content, settings, what the message must say)
BAD_FILES = [
    ("a.jsonl", "", {}, "a.jsonl: empty file"),
    ("a.json", " \n", {}, "a.json: empty file"),
    ("a.tsv", "", {}, "a.tsv: empty file"),
    ("a.tsv", "source\ttarget\n", {}, "a.tsv: no records"),
    ("a.json", "[]", {}, "a.json: no records"),
    ("a.jsonl", lines(*GOOD) + "{broken\n", {}, "a.jsonl:3: not JSON"),
    ("a.jsonl", lines(GOOD[0]) + "\n" + lines(GOOD[1]), {}, "a.jsonl:2: empty line"),
    ("a.jsonl", lines(GOOD[0], [1]), {}, "a.jsonl:2: expected an object with fields, got list"),
    ("a.jsonl", lines(GOOD[0], {"source": "a"}), {}, "a.jsonl:2: no field 'target'; fields: source"),
    ("a.jsonl", lines(GOOD[0], {**GOOD[0], "target": " "}), {}, "a.jsonl:2: field 'target' is empty"),
    ("a.jsonl", lines({**GOOD[0], "source": None}), {}, "a.jsonl:1: field 'source' holds NoneType, not text"),
    ("a.jsonl", lines({**GOOD[0], "source": ["a"]}), {}, "a.jsonl:1: field 'source' holds list, not text"),
    ("a.jsonl", lines({**GOOD[0], "lang": 3}), {}, "a.jsonl:1: field 'lang' holds int, not text"),
    ("a.jsonl", lines(*GOOD), {"lang_field": "language"}, "a.jsonl:1: no field 'language'"),
    ("a.jsonl", lines(*GOOD).encode() + b'{"source": "\xff"}\n', {}, "a.jsonl:3: not UTF-8 (byte 13 of the line)"),
    ("a.jsonl", lines(*GOOD), {"languages": ["sw", "th"]}, "a.jsonl: no records of languages ['th']"),
    (
        "a.jsonl",
        lines(*GOOD),
        {"source": "{source} {choices[0]}"},
        "a.jsonl:1: template '{source} {choices[0]}' does not",
    ),
    ("a.jsonl", lines({**GOOD[0], "choices": []}), {"source": "{choices[0]}"}, "IndexError"),
    (
        "a.jsonl",
        lines({**GOOD[0], "x": None}),
        {"source": "a {x}"},
        "a.jsonl:1: a field of the template holds NoneType",
    ),
    ("a.json", json.dumps(GOOD)[:-1], {}, "a.json:1: not JSON: expected a comma or the end of the list"),
    ("a.json", '[\n{"source": "a",\n "target": }]', {}, "a.json:3: not JSON"),
    ("a.json", '[\n{"source": "a", "target": "b"},\n\n{"source": "a"}]', {}, "a.json:4: no field 'target'"),
    ("a.json", '{"source": "a"}', {}, "a.json: expected a list of objects, got"),
    ("a.json", b"[\n1,\n\xff]", {}, "a.json:3: not UTF-8"),
    ("a.tsv", "source\ttarget\na\tb\nc\n", {}, "a.tsv:3: 1 columns, expected 2"),
    ("a.tsv", "question\tanswer\na\tb\n", {}, "a.tsv:2: no field 'source'; fields: question, answer"),
    ("a.tsv", b"source\ttarget\n\xc3(\tb\n", {}, "a.tsv:2: not UTF-8 (byte 1 of the line)"),
    ("a.tsv", "source\ttarget\tsource\na\tb\tc\n", {}, "a.tsv:1: columns ['source'] are there more than once"),
    ("a.tsv", "source\ttarget\n\n", {}, "a.tsv:2: 1 columns, expected 2"),
    ("a.tsv", b"(\xb5/\xfdxx", {}, "a.tsv: is compressed (zstd); unpack it"),
    ("a.json", b"PK\x03\x04", {}, "a.json: is compressed (zip)"),
    ("a.jsonl", gzip.compress(lines(*GOOD).encode())[:-9], {}, "a.jsonl: cannot be read: Compressed file ended before"),
    (
        "a.json",
        bz2.compress(json.dumps(GOOD).encode())[:-9],
        {},
        "a.json: cannot be read: Compressed file ended before",
    ),
    (
        "a.tsv",
        lzma.compress(b"source\ttarget\n" * 99)[:40] + b"x" * 40,
        {},
        "a.tsv: cannot be read: Corrupt input data",
    ),
    ("a.jsonl", gzip.compress(b"{\n"), {}, "a.jsonl:1: not JSON"),
    ("a.jsonl", lines(*GOOD).encode("utf-16"), {}, "a.jsonl:1: not UTF-8 (byte 1 of the line)"),
    ("a.jsonl", '{"source": "\\ud83d", "target": "b"}\n', {}, "a.jsonl:1: field 'source' holds a surrogate"),
    (
        "a.jsonl",
        '{"source": "a", "target": "b\\udc00"}\n',
        {},
        "holds a surrogate, which is no character (character 2)",
    ),
    ("a.jsonl", '{"source": NaN, "target": "b"}\n', {}, "a.jsonl:1: field 'source' holds nan, not text"),
    ("a.jsonl", '{"source": "a", "target": -Infinity}\n', {}, "a.jsonl:1: field 'target' holds -inf, not text"),
    ("a.jsonl", '{"source": true, "target": "b"}\n', {}, "a.jsonl:1: field 'source' holds bool, not text"),
    ("a.jsonl", "[" * 200_000 + "\n", {}, "a.jsonl:1: JSON that cannot be held"),
    (
        "a.jsonl",
        f'{{"source": {"9" * 5000}, "target": "b"}}\n',
        {},
        "a.jsonl:1: JSON that cannot be held: Exceeds the limit",
    ),
    ("a.jsonl", '{"source": "a", "target": "b"} {}\n', {}, "a.jsonl:1: not JSON: Extra data at column 32"),
    ("a.jsonl", "null\n", {}, "a.jsonl:1: expected an object with fields, got NoneType"),
    ("a.jsonl", lines({**GOOD[0], "lang": None}), {}, "a.jsonl:1: field 'lang' holds NoneType, not text"),
    ("a.json", json.dumps(GOOD)[:-30], {}, "a.json:1: not JSON: Unterminated string"),
    ("a.json", json.dumps(GOOD) + "\n[]", {}, "a.json:2: not JSON: more text after the list"),
    ("a.json", "[" + "[" * 200_000, {}, "a.json:1: JSON that cannot be held"),
    ("a.json", f'[{{"source": {"9" * 5000}}}]', {}, "a.json:1: JSON that cannot be held"),
    ("a.json", b"[\n" + json.dumps(GOOD[0]).encode("utf-16"), {}, "a.json:2: not UTF-8"),
    ("a.json", "[{}", {}, "a.json:1: no field 'source'; fields: none"),
    ("a.json", "[", {}, "a.json:1: not JSON: Expecting value"),
]


@pytest.mark.parametrize(("file", "content", "settings", "message"), BAD_FILES, ids=[bad[3][:40] for bad in BAD_FILES])
def test_bad_files_say_where(tmp_path, file, content, settings, message):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content, file, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\nc\n", b"a\nb\n", r"a.sw has 3 lines and .*a.en 2"),
        (b"a\n\nc\n", b"a\nb\nc\n", "a.sw:2: empty line"),
        (b"a\nb\n", b"a\n \n", "a.en:2: empty line"),
        (b"a\nb\n", b"a\n\xfe\n", r"a.en:2: not UTF-8 \(byte 1"),
        (b"", b"", "a.sw: empty file"),
    ],
)
def test_bad_pairs_say_where(tmp_path, source, target, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path, source, target)


def test_missing_and_unreadable_places(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_sources([DataSource(format="jsonl", path="absent.jsonl")], tmp_path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_sources([DataSource(format="tsv", path=str(tmp_path))])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"dataset '.*empty'"):
        read_sources([DataSource(format="dataset", path=str(empty))])
    with pytest.raises(ValueError, match=r"records\[1\]: no field 'target'"):
        read_sources([DataSource(records=[GOOD[0], {"source": "a"}])])
    for given in (None, {"source": "a"}):
        with pytest.raises(ValueError, match=f"records: the function gave {type(given).__name__}, takes one"):
            read_sources([DataSource(records=lambda given=given: given)])


def test_line_separators_inside_a_line_do_not_shift_the_pairs(tmp_path):
    records, _ = read_pairs(tmp_path, "a\u2028b\x0cc\r\nd\n".encode(), b"one\ntwo\n")
    assert [record["source"] for record in records] == ["a\u2028b\x0cc", "d"]


def test_bad_lines_are_left_out_only_when_asked_and_reported(tmp_path, caplog):
    content = lines(GOOD[0], {"source": "a"}).encode() + b"\xff\n{\n" + lines(GOOD[1]).encode()
    with pytest.raises(ValueError, match=r"data.jsonl:2"):
        read(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        records, skipped = read(tmp_path, content, on_bad_line="skip")
    assert records == GOOD
    assert [place.partition(": ")[0][-12:] for place in skipped] == ["data.jsonl:2", "data.jsonl:3", "data.jsonl:4"]
    assert "3 bad lines left out" in caplog.text
    assert "data.jsonl:2: no field 'target'" in caplog.text


def test_different_line_counts_are_never_skipped(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        read_pairs(tmp_path, b"a\nb\n", b"a\n", on_bad_line="skip")


def test_limits_and_languages(tmp_path):
    records = [{"source": str(i), "target": "x", "lang": ("sw", "Thai", "fr")[i % 3]} for i in range(12)]
    kept, _ = read(tmp_path, lines(*records), limit_per_language=2, languages=["sw", "th"])
    assert [(record["source"], record["lang"]) for record in kept] == [
        ("0", "sw"),
        ("1", "th"),
        ("3", "sw"),
        ("4", "th"),
    ]
    assert len(read(tmp_path, lines(*records), limit=5)[0]) == 5


def test_a_limit_stops_the_reading(tmp_path):
    """What stands behind the limit is not parsed: not even its broken lines are seen."""
    assert read(tmp_path, lines(*GOOD) + "{broken\n", limit=2)[0] == GOOD
    assert read(tmp_path, json.dumps(GOOD)[:-1] + ", {broken", "a.json", limit=2)[0] == GOOD


def test_the_published_layout_is_read_by_the_shipped_recipes(tmp_path):
    """A few rows in each file of the published layout, in the published form."""
    codes = set()
    for name in ("math", "xcsqa", "xnli"):
        codes |= set(load_recipe(name, check_files=False).stages["translation"].data[0].languages)
    for code in codes:
        folder = tmp_path / "bilingual_pairs" / f"en-{code}"
        folder.mkdir(parents=True)
        (folder / f"train_100k.{code}").write_text("a\nb\n")
        (folder / "train_100k.en").write_text("one\ntwo\n")
    tasks = tmp_path / "query_translation"
    (tasks / "x-csqa").mkdir(parents=True)
    languages = [
        "Bengali",
        "Thai",
        "Swahili",
        "Japanese",
        "Chinese",
        "German",
        "French",
        "Russian",
        "Spanish",
        "English",
    ]
    (tasks / "metamath_615k.json").write_text(
        json.dumps([{"query": "q", "response": "r", "lang": name} for name in languages])
    )
    xcsqa = load_recipe("xcsqa", check_files=False).stages["task"].data[0].languages
    question = {"stem": "Where?", "choices": [{"label": c, "text": f"in {c}"} for c in "ABCDE"]}
    for code in xcsqa:
        (tasks / "x-csqa" / f"train_{code}.jsonl").write_text(lines({"question": question, "answerKey": "C"}))
    nli = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "entailment", "language": "Greek"}
    (tasks / "xnli_dev.json").write_text(json.dumps([nli]))

    found = {}
    for name in ("math", "xcsqa", "xnli"):
        recipe = load_recipe(name, [f"data_root={tmp_path}"])
        stages = recipe.stages
        pairs, _ = read_sources(stages["translation"].data, recipe.data_root)
        assert {record["lang"] for record in pairs} == set(stages["translation"].data[0].languages)
        assert pairs[1]["target"] == "two"
        found[name], _ = read_sources(stages["task"].data, recipe.data_root)
    assert [record["lang"] for record in found["math"]] == ["bn", "th", "sw", "ja", "zh", "de", "fr", "ru", "es"]
    # The same texts as evaluation asks, which are compared with the published ones in tests/tasks.
    text = prompts.xcsqa("Where?", [f"in {letter}" for letter in "ABCDE"])
    assert text.startswith("Where?\nOptions:A. in A\tB. in B")
    assert found["xcsqa"][0] == {"source": text, "target": "C", "lang": "ur"}
    text = prompts.xnli("It rains.", "It is wet.")
    assert found["xnli"] == [{"source": text, "target": "entailment", "lang": "el"}]
    for name, expected in PUBLISHED.items():
        assert load_recipe(name, check_files=False).stages["task"].prompt.replace("{source}", "{text}") == expected
