"""The registry: every name has its task, and what a task and the order of languages give."""

import pytest

from layalign.languages import MATHEMATICS, in_order, language_code
from layalign.tasks import Verdicts, find_task
from layalign.tasks.registry import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_its_tasks_file(name):
    assert find_task(name).name == name


def test_a_file_is_a_task_named_after_it(tmp_path):
    assert find_task(tmp_path / "own.jsonl").name == "own"


def test_verdicts_and_readings_go_into_a_record_in_their_order():
    scoring = Verdicts({"exact": str.__eq__, "prefix": str.startswith}, {"words": lambda said: len(said.split())})
    assert list(scoring.fields("yes sir", "yes").items()) == [("exact", False), ("prefix", True), ("words", 2)]
    records = [
        {"lang": lang, **scoring.fields(said, "yes")} for lang, said in (("sw", "yes"), ("en", "no"), ("sw", "yes."))
    ]
    assert scoring.scores(records) == {"exact": {"sw": 50.0, "en": 0.0}, "prefix": {"sw": 100.0, "en": 0.0}}
    assert scoring.scores([]) == {"exact": {}, "prefix": {}}


def test_languages_in_order_and_spellings():
    assert in_order(["te", "ar", "en", "sw", "en"]) == ["sw", "en", "ar", "te"]
    assert in_order(["te", "ar", "en", "sw"], MATHEMATICS) == ["sw", "en", "te", "ar"]
    assert [language_code(name) for name in (" Swahili", "Flemish", "TH", "xx")] == ["sw", "nl", "th", "xx"]
