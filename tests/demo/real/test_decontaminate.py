import json

import pytest

from layalign.train.demo.real.decontaminate import benchmark_texts, decontaminated, normalised

TESTS = {
    "mgsm": ["Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning."],
    "tatoeba_laser": ["ฉันต้องการซื้อหนังสือเล่มใหม่", "Go on!"],
}
CLEAN = {"source": "Tom ana kalamu tano.", "target": "Tom has five pens.", "lang": "sw"}


@pytest.mark.parametrize(
    ("side", "text", "found"),
    [
        ("target", "JANETS ducks", None),
        ("target", "Janet’s ducks LAY 16 eggs per day; she eats three for breakfast every morning", "exact"),
        ("target", "Well, she eats three for breakfast every morning and 2 at night", None),
        ("target", "They lay 16 eggs per day. She eats three at night", "overlap"),
        ("source", "go  on", "exact"),
        ("source", "Go on then", None),
        ("source", "เมื่อวานฉันต้องการซื้อหนังสือสามเล่ม", "overlap"),
        ("source", "ฉันต้องการซื้อ", None),
    ],
)
def test_planted_lines_are_removed(side, text, found):
    records = [CLEAN, CLEAN | {side: text}]
    kept, removed = decontaminated(records, TESTS)
    assert kept == (records if found is None else [CLEAN])
    total = {kind: sum(counts[kind] for counts in removed.values()) for kind in ("exact", "overlap")}
    assert total == {"exact": int(found == "exact"), "overlap": int(found == "overlap")}


def test_nothing_to_compare_with_removes_nothing():
    assert decontaminated([CLEAN], {}) == ([CLEAN], {})


def test_normalised():
    assert normalised("  Ｇo, ON！\t½") == "go on 1 2"
    assert normalised("কলমটি?") == "কলমটি"


def test_benchmark_texts(tmp_path):
    for folder, name, text in (
        ("mgsm", "mgsm_sw.tsv", "Swali moja?\t3\n"),
        ("msvamp", "test_Thai.json", json.dumps({"m_query": "ก", "query": "q", "response": "1"}) + "\n"),
        ("tatoeba_laser", "tatoeba.swh-eng.swh", "Nenda.\nNjoo.\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text, encoding="utf-8")
    assert benchmark_texts(tmp_path) == {
        "mgsm": ["Swali moja?"],
        "msvamp": ["ก", "q"],
        "tatoeba_laser": ["Nenda.", "Njoo."],
    }
