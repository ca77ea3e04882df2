"""The evaluation loop and the evaluation of a saved model: scores, files, resuming, refusals."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from layalign.evaluation.loop import evaluate_problems
from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import GenerationSettings
from layalign.generation.texts import Answerer
from layalign.tasks import Task, registry

PROBLEMS = [
    {"lang": "sw", "question": "what is 3 plus 4", "answer": 7, "note": "kept"},
    {"lang": "sw", "question": "a much longer question than the others", "answer": 0},
    {"lang": "en", "question": "what is 2 plus 3", "answer": -5},
    {"lang": "en", "question": "what", "answer": 1234},
]
REPLIES = {
    PROBLEMS[0]["question"]: "The answer is 7.",
    PROBLEMS[1]["question"]: "I do not know.",
    PROBLEMS[2]["question"]: "It is 5.",
    PROBLEMS[3]["question"]: "1 234",
}


def replies(questions):
    return [REPLIES[question] for question in questions]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_problems_are_asked_and_scored(batch_size, capsys):
    result = evaluate_problems(replies, PROBLEMS, batch_size=batch_size)
    assert result["accuracy"] == {"official": {"sw": 100.0, "en": 50.0}, "strict": {"sw": 50.0, "en": 50.0}}
    assert [record["prediction"] for record in result["records"]] == list(REPLIES.values())
    assert result["records"][0] == PROBLEMS[0] | {
        "prediction": "The answer is 7.",
        "official": True,
        "strict": True,
        "official_number": 7.0,
        "strict_number": "7",
    }
    assert [record["strict_number"] for record in result["records"]] == ["7", None, "5", "1234"]
    assert "4/4" in capsys.readouterr().err


def test_batches_hold_at_most_batch_size_questions_longest_first(capsys):
    asked, kept = [], []

    def answer(questions):
        asked.append(list(questions))
        return replies(questions)

    evaluate_problems(answer, PROBLEMS, batch_size=2, progress=False, keep=kept.append)
    assert [len(questions) for questions in asked] == [2, 2]
    lengths = [len(question) for questions in asked for question in questions]
    assert lengths == sorted(lengths, reverse=True)
    assert [[record["question"] for record in records] for records in kept] == asked
    assert capsys.readouterr().err == ""


def test_bad_loops():
    with pytest.raises(ValueError, match="problems: got none"):
        evaluate_problems(replies, [])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        evaluate_problems(replies, PROBLEMS, batch_size=0)
    with pytest.raises(ValueError, match="got 1 answers for 4 questions"):
        evaluate_problems(lambda questions: ["7"], PROBLEMS)


@pytest.fixture
def call(model_folder, tmp_path):
    """Arguments of an evaluation on two MGSM languages and problems of one's own, 20 questions in all."""
    for lang, question in (("sw", "tufaha ngapi"), ("te", "ni ngapi")):
        lines = [f"{question} {'na ' * (number % 4)}{number}\t{number}" for number in range(8)]
        (tmp_path / f"mgsm_{lang}.tsv").write_text("\n".join(lines))
    own = [{"question": f"how many {number} so", "answer": number, "lang": "en"} for number in range(4)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    return dict(
        model=model_folder,
        tasks=["mgsm", str(tmp_path / "own.jsonl")],
        data={"mgsm": tmp_path},
        settings=GenerationSettings(batch_size=3, max_new_tokens=6, device="cpu"),
        output=tmp_path / "results",
        progress=False,
    )


def changed(call, **changes):
    """The call with other arguments, or other fields of its settings."""
    settings = {name: changes.pop(name) for name in list(changes) if hasattr(call["settings"], name)}
    return call | {"settings": replace(call["settings"], **settings)} | changes


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_an_evaluation_writes_its_folder(call, loaded, capsys):
    results = evaluate(**call | {"progress": True})
    printed = capsys.readouterr()
    assert "tiny (strict scorer)" in printed.out
    assert "20/20" in printed.err
    output = call["output"]
    assert {path.name for path in output.iterdir()} == {
        "evaluation.json",
        "records.jsonl",
        "records.jsonl.sums",
        "results.json",
        "table.md",
        "accuracy_mgsm.png",
        "accuracy_own.png",
    }
    assert json.loads((output / "results.json").read_text()) == results
    records = lines_of(output / "records.jsonl")
    assert len(records) == 20
    answers = Answerer(*loaded, max_new_tokens=6)([record["question"] for record in records])
    assert [record["prediction"] for record in records] == answers
    assert results["tasks"]["mgsm"]["counts"] == {"sw": 8, "te": 8}
    assert results["tasks"]["own"]["counts"] == {"en": 4}
    for scorer in ("official", "strict"):
        right = [record[scorer] for record in records if record["lang"] == "sw"]
        assert results["tasks"]["mgsm"]["accuracy"][scorer]["sw"] == 100 * sum(right) / 8
        summary = results["tasks"]["mgsm"]["summary"][scorer]
        assert summary["avg"] == summary["lrl"] == results["tasks"]["mgsm"]["accuracy"][scorer]["sw"]
    assert results["config"]["max_new_tokens"] == 6
    assert set(results["versions"]) == {"python", "layalign", "torch", "transformers"}
    table = (output / "table.md").read_text()
    assert "## mgsm" in table
    assert "tiny (strict scorer)" in table
    assert "te: in no average" in table


def test_a_task_brings_its_own_loader_and_scoring(call, monkeypatch):
    class Lengths:
        """Of all answers in a language together, as a translation's score is."""

        def fields(self, prediction, answer):
            return {"length": len(prediction)}

        def scores(self, records):
            lengths = [record["length"] for record in records]
            return {"length": {"sw": sum(lengths) / len(lengths)}}

    problem = {"task": "echo", "lang": "sw", "index": 0, "question": "ni ngapi", "answer": "how many"}
    task = Task(name="echo", load=lambda data, languages, limit: [problem], scoring=Lengths())
    monkeypatch.setitem(sys.modules, "layalign.tasks.echo", SimpleNamespace(TASK=task))
    monkeypatch.setattr(registry, "NAMES", (*registry.NAMES, "echo"))
    results = evaluate(**call | {"tasks": ["mgsm", "echo"]})
    records = {record["task"]: record for record in lines_of(call["output"] / "records.jsonl")}
    names = {task: [name for name in record if name != "cut"] for task, record in records.items()}
    assert names["echo"] == [*problem, "prediction", "length"]
    assert names["mgsm"][-4:] == ["official", "strict", "official_number", "strict_number"]
    assert results["tasks"]["echo"]["accuracy"] == {"length": {"sw": records["echo"]["length"]}}
    assert results["tasks"]["mgsm"]["counts"] == {"sw": 8, "te": 8}


def test_the_batch_size_changes_no_answer(call):
    def answers(batch_size):
        output = call["output"].with_name(f"batch{batch_size}")
        evaluate(**changed(call, batch_size=batch_size, output=output))
        return {record["question"]: record["prediction"] for record in lines_of(output / "records.jsonl")}

    alone = answers(1)
    assert len(set(alone.values())) > 5
    assert answers(7) == alone
    assert answers(64) == alone


def test_a_cut_evaluation_goes_on_without_repeating_or_losing_a_question(call, loaded, monkeypatch):
    whole = evaluate(**call)
    path = call["output"] / "records.jsonl"
    content = path.read_bytes()
    asked = []
    generate = Answerer._generate
    monkeypatch.setattr(
        Answerer, "_generate", lambda self, given, **rest: (asked.extend(given.texts), generate(self, given, **rest))[1]
    )
    monkeypatch.setattr("layalign.systems.layalign_model.load_model", lambda *_, **__: loaded)
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for length in (0, 5, ends[0], ends[0] + 1, ends[9] + 4, len(content) - 1):
        path.write_bytes(content[:length])
        asked.clear()
        results = evaluate(**changed(call, batch_size=4))
        assert results["tasks"] == whole["tasks"]
        kept = content[:length].count(b"\n")
        assert len(asked) == len(set(asked)) == 20 - kept
        by_question = {record["question"]: record for record in lines_of(path)}
        assert len(lines_of(path)) == 20
        assert by_question == {record["question"]: record for record in map(json.loads, content.splitlines())}


def test_a_cut_evaluation_goes_on_in_another_place(call, loaded, tmp_path, monkeypatch):
    """Where its folder, its model, its data and its problems have moved to."""
    whole = evaluate(**call)
    content = (call["output"] / "records.jsonl").read_bytes()
    there = tmp_path / "there"
    shutil.copytree(call["model"], there / "model")
    for name in ("results", "mgsm_sw.tsv", "mgsm_te.tsv", "own.jsonl"):
        shutil.move(tmp_path / name, there / name)
    (there / "results" / "records.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[:9]))
    (there / "results" / "results.json").unlink()
    monkeypatch.setattr("layalign.systems.layalign_model.load_model", lambda *_, **__: loaded)
    places = {"model": there / "model", "data": {"mgsm": there}, "output": there / "results"}
    moved = evaluate(**call | places | {"tasks": ["mgsm", str(there / "own.jsonl")]})
    assert moved["tasks"] == whole["tasks"]
    assert (there / "results" / "records.jsonl").read_bytes() == content


def test_a_finished_evaluation_keeps_what_was_measured(call):
    """Its seconds and batches, and the versions that answered."""
    file = call["output"] / "results.json"
    found = evaluate(**call)
    before = json.loads(file.read_text()) | {"versions": {"torch": "older"}}
    file.write_text(json.dumps(before))
    again = evaluate(**changed(call, batch_size=5))
    assert again == json.loads(file.read_text()) == before
    assert again["seconds"] == found["seconds"] and again["config"]["batch_size"] == 3
    file.write_text("{")
    assert evaluate(**call)["tasks"] == found["tasks"]


def test_a_finished_evaluation_only_reads_its_records(call, monkeypatch):
    results = evaluate(**call)
    (call["output"] / "results.json").unlink()
    monkeypatch.setattr(
        "layalign.systems.layalign_model.load_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert evaluate(**call)["tasks"] == results["tasks"]
    assert (call["output"] / "results.json").is_file()


DIFFERENT = {
    "fewer questions": (dict(limit=2), "limit, problems"),
    "longer answers": (dict(max_new_tokens=7), "max_new_tokens"),
    "another prompt": (dict(prompt=None), "prompt"),
    "another dtype": (dict(dtype="bfloat16"), "dtype"),
    "beams": (dict(num_beams=2), "generate"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_evaluations_folder_is_refused_and_kept(call, case):
    change, named = DIFFERENT[case]
    evaluate(**call)
    before = {path.name: path.read_bytes() for path in call["output"].iterdir()}
    with pytest.raises(ValueError, match=rf"belongs to another job \(different {named}\)"):
        evaluate(**changed(call, **change))
    assert {path.name: path.read_bytes() for path in call["output"].iterdir()} == before


def test_a_folder_or_file_of_someone_elses_is_refused_and_kept(call):
    call["output"].mkdir()
    (call["output"] / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no evaluation"):
        evaluate(**call)
    assert [path.name for path in call["output"].iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file, takes a folder"):
        evaluate(**call | {"output": call["output"] / "notes.txt"})
    assert (call["output"] / "notes.txt").read_text() == "mine"


BAD_EVALUATIONS = {
    "missing model": (dict(model="./nowhere"), "model: no such folder"),
    "missing data": (dict(data="./nowhere", tasks=["mgsm"]), "data: nowhere is not a folder"),
    "unknown task": (dict(tasks=["gsm"], data=None), "task: got 'gsm'"),
    "data for no task": (dict(tasks=["msvamp"]), "data: got mgsm, not among the tasks msvamp"),
    "unknown language": (dict(languages=["xx"]), "languages: xx not in"),
    "unknown dtype": (dict(dtype="int8"), "dtype: got 'int8'"),
    "no batch": (dict(batch_size=0), "batch_size: got 0"),
    "prompt without a place": (
        dict(prompt="question"),
        "prompt: got 'question', takes 'default', 'task', 'chat', 'none'",
    ),
}


@pytest.mark.parametrize("case", BAD_EVALUATIONS)
def test_bad_evaluations(call, case):
    change, message = BAD_EVALUATIONS[case]
    with pytest.raises(ValueError, match=message):
        evaluate(**changed(call, **change))


def test_after_a_bad_setting_the_right_call_works(call):
    with pytest.raises(ValueError, match="dtype"):
        evaluate(**changed(call, dtype="int8"))
    assert (call["output"] / "records.jsonl").read_bytes() == b""
    assert evaluate(**call)["tasks"]["own"]["counts"] == {"en": 4}
