"""Evaluations of a saved model on questions with choices and on translations: what their folders hold."""

import json
from collections import Counter
from unittest.mock import patch

from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import GenerationSettings
from layalign.systems import LLM
from layalign.systems.llm import PromptedLLM
from tests.tasks.originals import flores101, xcsqa_published

filled = PromptedLLM._filled


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
    assert (
        ("spBLEU is left out" in table)
        == ("spbleu" not in flores["accuracy"])
        == any("spBLEU" in note for note in flores["notes"])
    )
    records = [json.loads(line) for line in (tmp_path / "results" / "records.jsonl").read_text("utf-8").splitlines()]
    cut = Counter(record["lang"] for record in records if record["task"] == "flores" and record.get("cut"))
    assert cut and flores["cut"] == cut
    assert all(f"{lang} {count} of {flores['counts'][lang]}" in flores["notes"][-1] for lang, count in cut.items())
    assert flores["notes"][-1] in table
    assert (tmp_path / "results" / "accuracy_flores.png").is_file()


def test_worked_examples_of_choices_end_as_their_questions_do(bases, tmp_path):
    """Such a question ends in "Answer:" by itself: the default frame of examples would say it twice."""
    xcsqa_published(tmp_path / "data")
    lines = [{"question": "what\nOptions:A. 3\tB. 4\nAnswer:", "answer": "A"}]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    read = []
    settings = GenerationSettings(batch_size=4, max_new_tokens=2, device="cpu")
    system = LLM(llm=str(bases / "llm"), examples=str(tmp_path / "examples.jsonl"), shots=1, settings=settings)
    with patch.object(
        PromptedLLM, "_filled", lambda self, asked: read.extend(filled(self, asked)) or filled(self, asked)
    ):
        evaluate(system, ["xcsqa"], data=tmp_path / "data", output=tmp_path / "results", progress=False)
    assert read and all(text.startswith(lines[0]["question"] + " A\n\n") for text in read)
    assert all(text.count("Answer:") == 2 and text.endswith("\nAnswer:") for text in read)
