"""Evaluations of a saved model on questions with choices and on translations: what their folders hold."""

import json

from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import GenerationSettings
from tests.tasks.originals import flores101, xcsqa_published


def test_choices_and_translations_in_one_evaluation(model_folder, tmp_path):
    xcsqa_published(tmp_path / "data")
    flores101(tmp_path / "data")
    results = evaluate(
        model_folder,
        ["xcsqa", "flores"],
        data=tmp_path / "data",
        settings=GenerationSettings(batch_size=2, max_new_tokens=4, device="cpu"),
        output=tmp_path / "results",
        progress=False,
    )
    assert json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8")) == results
    xcsqa, flores = results["tasks"]["xcsqa"], results["tasks"]["flores"]
    assert list(xcsqa["accuracy"]["official"]) == ["sw", "ja", "en"]
    assert list(xcsqa["summary"]["official"]) == ["avg"]
    assert xcsqa["counts"] == {"sw": 2, "ja": 1, "en": 1}
    assert {"bleu", "chrf++"} <= set(flores["accuracy"]) == set(flores["signatures"]) == set(flores["intervals"])
    assert list(flores["summary"]["bleu"]) == ["avg", "lrl", "hrl"]
    assert list(flores["intervals"]["bleu"]) == ["avg", "lrl", "hrl", "sw", "zh"]
    table = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert "## xcsqa" in table and "## flores" in table
    assert "* over the languages shown, not all 16." in table
    assert ("spBLEU is left out" in table) == ("spbleu" not in flores["accuracy"]) == bool(flores["notes"])
    assert (tmp_path / "results" / "accuracy_flores.png").is_file()
