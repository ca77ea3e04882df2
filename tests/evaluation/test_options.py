"""The options of the commands that ask a model: systems other than LayAlign, and what is refused, by name and with nothing written."""

import json

import pytest
from typer.testing import CliRunner

from layalign.cli import app


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def run(*words):
    result = invoke(*words)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of two languages, a file of examples, prompts."""
    folder = tmp_path_factory.mktemp("options")
    for lang in ("sw", "en"):
        (folder / f"mgsm_{lang}.tsv").write_text(
            "\n".join(f"what is {number} plus 1\t{number + 1}" for number in range(4))
        )
    shots = [{"question": f"what is {number} plus 2", "answer": str(number + 2)} for number in range(3)]
    (folder / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    (folder / "prompt.txt").write_text("question {text} so\n")
    (folder / "bad.txt").write_text("no place")
    (folder / "questions.txt").write_text("what is 3\n")
    return folder


def common(folder, output):
    return "--task", "mgsm", "--data", folder, "--output", output, "--max-new-tokens", 4, "--device", "cpu"


def test_systems_side_by_side(folder, bases, model_folder, tmp_path):
    """LayAlign, the LLM alone and with examples: a column each."""
    runs = {
        "layalign": (model_folder,),
        "llm": ("--llm", bases / "llm", "--prompt", "question {text} answer"),
        "shots": ("--llm", bases / "llm", "--examples", folder / "shots.jsonl", "--shots", 2),
    }
    for name, words in runs.items():
        run("evaluate", *words, *common(folder, tmp_path / name))
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in runs}
    assert [found["system"] for found in results.values()] == ["tiny", "llm", "llm (2-shot)"]
    text = run("compare", *(tmp_path / name for name in runs), "--output", tmp_path / "compared")
    assert "| tiny (layalign) | llm (llm) | llm (2-shot) (shots) |" in text.replace("  ", " ")
    assert (tmp_path / "compared" / "comparison.md").read_text() in text


def test_tasks_one_after_the_other(folder, model_folder, tmp_path):
    """As --task A --task B and --task A,B; the model may stand before or after them."""
    (tmp_path / "more.jsonl").write_text(json.dumps({"question": "what is 3", "answer": 3, "lang": "en"}))
    for place, words in enumerate(
        (
            [model_folder, "--task", "mgsm", tmp_path / "more.jsonl"],
            ["-t", "mgsm", tmp_path / "more.jsonl", model_folder],
            [model_folder, "--task", f"mgsm,{tmp_path / 'more.jsonl'}"],
        )
    ):
        output = tmp_path / str(place)
        run("evaluate", *words, "--data", folder, "--output", output, "--max-new-tokens", 2, "--device", "cpu")
        results = json.loads((output / "results.json").read_text())
        assert list(results["tasks"]) == ["mgsm", "more"]


def test_a_prompt_from_a_file_is_the_same_as_given(folder, model_folder, tmp_path):
    for name, words in {
        "file": ("--prompt-file", folder / "prompt.txt"),
        "text": ("--prompt", "question {text} so"),
    }.items():
        run("evaluate", model_folder, *common(folder, tmp_path / name), *words)
    records = [(tmp_path / name / "records.jsonl").read_bytes() for name in ("file", "text")]
    assert records[0] == records[1]
    config = json.loads((tmp_path / "file" / "results.json").read_text())["config"]
    assert config["prompt"] == "question {text} so"
    run(
        "analyze",
        model_folder,
        "--task",
        "mgsm",
        "--data",
        folder,
        "--output",
        tmp_path / "analysis",
        "--limit",
        3,
        "--prompt",
        "none",
    )
    answer = run(
        "generate",
        model_folder,
        "what is 3",
        "--prompt-file",
        folder / "prompt.txt",
        "--device",
        "cpu",
        "--max-new-tokens",
        3,
    )
    assert answer.strip()


BAD_EVALUATIONS = {
    "no system": ((), "model: got none and no --llm, takes one of them"),
    "examples for a model": (
        ("{model}", "--examples", "{folder}/shots.jsonl"),
        "--examples goes with --llm alone, got the model",
    ),
    "translator for a model": (("{model}", "--translator", "{llm}"), "--translator goes with --llm alone"),
    "shots without examples": (("--llm", "{llm}", "--shots", "2"), "--shots: give the file of --examples too"),
    "more shots than examples": (
        ("--llm", "{llm}", "--examples", "{folder}/shots.jsonl", "--shots", "9"),
        "shots: got 9, but there are 3 examples",
    ),
    "examples that are not there": (
        ("--llm", "{llm}", "--examples", "{folder}/none.jsonl"),
        "none.jsonl: no such file",
    ),
    "a malformed example": (
        ("--llm", "{llm}", "--examples", "{folder}/bad.txt"),
        "bad.txt:1: got 1 tab-separated fields",
    ),
    "an encoder for an LLM": (
        ("--llm", "{llm}", "--encoder", "{llm}"),
        "--encoder goes with a model or with --published",
    ),
    "an encoder's tokenizer for a model": (
        ("{model}", "--encoder-tokenizer", "x"),
        "--encoder-tokenizer goes with --published",
    ),
    "an LLM of other sizes for a model": (("{model}", "--llm", "layalign:tiny_llm"), "is not the one trained with"),
    "an empty language": (
        ("{model}", "--languages", "en,,sw"),
        "--languages: got 'en,,sw', takes names parted by commas",
    ),
    "a prefix without a translator": (
        ("--llm", "{llm}", "--prefix", "to English: "),
        "--prefix goes with --translator",
    ),
    "a baseline without its checkpoint": (
        ("--published", "mindmerger"),
        "--published: give the checkpoint as the model",
    ),
    "an unknown baseline": (
        ("{model}", "--published", "mindmerge"),
        "kind: got 'mindmerge', takes 'mindmerger' or 'langbridge'",
    ),
    "examples for a baseline": (
        ("{model}", "--published", "mindmerger", "--examples", "{folder}/shots.jsonl"),
        "--examples goes with --llm alone",
    ),
    "a baseline without bases": (("{model}", "--published", "mindmerger"), "holds no base, give encoder and llm"),
    "an encoder as LLM": (("--llm", "{encoder}"), "takes a causal LM"),
    "a LayAlign model as LLM": (("--llm", "{model}"), "holds a LayAlign model, takes a causal LM alone"),
    "an LLM as translator": (("--llm", "{llm}", "--translator", "{llm}"), "takes an encoder-decoder"),
    "no such LLM": (("--llm", "./nowhere"), "llm: no such folder: './nowhere'"),
    "an LLM without a prompt": (
        ("--llm", "{llm}", "--prompt", "none"),
        "an LLM alone reads nothing else than its prompt",
    ),
    "chat without a template": (("--llm", "{llm}", "--prompt", "chat"), "chat template"),
    "chat of a model without one": (("{model}", "--prompt", "chat"), "needs a chat template"),
    "a prompt without its place": (("{model}", "--prompt", "question"), "takes 'default', 'task', 'chat', 'none'"),
    "a prompt that names a language": (("{model}", "--prompt", "a {language}"), r"contains \{text\} once"),
    "two prompts": (
        ("{model}", "--prompt", "none", "--prompt-file", "{folder}/prompt.txt"),
        "--prompt, --prompt-file: give one",
    ),
    "a prompt file without a place": (("{model}", "--prompt-file", "{folder}/bad.txt"), "bad.txt: got 'no place'"),
    "no such prompt file": (("{model}", "--prompt-file", "{folder}/none.txt"), "none.txt cannot be read"),
    "an evaluation that is not there": (("{model}", "--against", "{folder}/none"), "none holds no finished evaluation"),
    "a language that is not there": (("{model}", "--languages", "sw,xx"), "languages: xx not in"),
    "no device": (("{model}", "--device", "gpu"), "device: got 'gpu'"),
    "device and devices": (("{model}", "--devices", "auto", "--device", "cpu"), "takes one of them"),
    "no way to spread": (("{model}", "--devices", "all"), "devices: got 'all', takes auto, balanced"),
    "no dtype": (("{model}", "--dtype", "int4"), "dtype: got 'int4'"),
    "a file as model": (("{folder}/bad.txt",), "bad.txt is a file, takes the folder of a trained model"),
}


@pytest.mark.parametrize("case", BAD_EVALUATIONS)
def test_bad_evaluations(case, folder, bases, model_folder, tmp_path):
    words, message = BAD_EVALUATIONS[case]
    places = {"model": model_folder, "llm": bases / "llm", "encoder": bases / "encoder", "folder": folder}
    words = [word.format(**places) if "{text}" not in word and "{language}" not in word else word for word in words]
    given = common(folder, tmp_path / "out")
    if "--device" in words or "--devices" in words:
        given = given[: given.index("--device")]
    result = invoke("evaluate", *words, *given)
    with pytest.raises(ValueError, match=message):
        raise result.exception
    written = [path.name for path in (tmp_path / "out").glob("*")] if (tmp_path / "out").exists() else []
    assert not any((tmp_path / "out" / name).stat().st_size for name in written if name != "evaluation.json"), written


BAD_COMMANDS = {
    "evaluate without a task": (("evaluate", "{model}"), "--task: got none, takes at least one"),
    "an unknown task": (("evaluate", "{model}", "--task", "gsm"), "task: got 'gsm'"),
    "a task twice": (("evaluate", "{model}", "--task", "mgsm", "--task", "mgsm"), "takes at least one, none twice"),
    # Whose data no hub is asked for before.
    "no model": (("evaluate", "{folder}/none", "--task", "mgsm"), "model: no such folder"),
    "no LLM": (("evaluate", "--llm", "{folder}/none", "--task", "mgsm"), "llm: no such folder"),
    "task's prompt where there is no task": (("generate", "{model}", "what", "--prompt", "task"), "there is none here"),
    "generate with a bad template": (("generate", "{model}", "what", "--prompt", "{{text}} {{text}}"), "once"),
    "a language that a prompt cannot name": (
        ("generate", "{model}", "what", "--prompt", "from {{language}} {{text}}", "--lang", "xx"),
        "no English name known for language 'xx'",
    ),
    "a prompt with a language, and none": (
        ("generate", "{model}", "what", "--prompt", "{{language}} {{text}}"),
        "pass lang",
    ),
    "analyze with a bad prompt": (("analyze", "{model}", "--data", "{folder}", "--prompt", "no"), "prompt: got 'no'"),
    "a task beside texts": (
        ("analyze", "{model}", "--texts", "{folder}", "--task", "msvamp", "--data", "none"),
        "--task, --data goes with questions of a task, not with --texts",
    ),
    "bases of an LLM alone": (
        ("analyze", "layalign:tiny_llm", "--data", "{folder}", "--encoder", "none", "--prompt", "math"),
        "--encoder, --prompt goes with a LayAlign model or --published",
    ),
    "a prompt for the published format": (
        ("convert", "{model}", "out.bin", "--to-published", "--compatible", "--task", "math"),
        "--compatible, --task goes with a published checkpoint, not with --to-published",
    ),
    "one run to compare": (("compare", "{folder}"), "takes at least two folders"),
    "runs that are none": (("compare", "{folder}", "{folder}"), "holds no finished evaluation"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands(case, folder, model_folder, tmp_path, monkeypatch):
    words, message = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    result = invoke(*(word.format(model=model_folder, folder=folder) for word in words))
    with pytest.raises(ValueError, match=message):
        raise result.exception
