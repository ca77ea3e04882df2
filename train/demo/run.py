"""The embedded demo: both stages on the tiny bases, then every language against the LLM alone and two baselines."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from layalign.evaluation.report import plot_accuracy, plot_gates, plot_losses, print_table
from layalign.evaluation.run import evaluate_problems
from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.loading import load_llm
from layalign.processor import LayAlignProcessor
from layalign.train.demo.problems import evaluation_problems, task_records, translation_records
from layalign.train.recipe import DataSource, Recipe, StageRecipe
from layalign.train.stages import train

ENCODER, LLM = "layalign:tiny_encoder", "layalign:tiny_llm"
PROMPT = "{source} Answer:"
MARKER = "demo.json"
# Everything a demo writes; a run that replaces another removes these and nothing else.
WRITTEN = ("results.json", "plots", "model", "training", MARKER)
LONGEST_ANSWER = 32


@dataclass(frozen=True)
class System:
    """A setting of the one model. llm_input: whether the LLM reads the question too, in the task stage."""

    name: str
    settings: dict
    llm_input: bool


SYSTEMS = (
    System("langbridge", {"adapter": "linear", "aligner": None}, False),
    System("mindmerger", {"adapter": "mlp", "aligner": None}, True),
    System("layalign", {}, True),
)
TITLES = {"llm": "LLM alone", "langbridge": "LangBridge", "mindmerger": "MindMerger", "layalign": "LayAlign"}


def run_demo(
    output="runs/demo",
    seed=0,
    *,
    translation_steps=180,
    task_steps=500,
    batch_size=16,
    questions=100,
    learning_rate=7e-3,
    progress=True,
):
    """Train LangBridge, MindMerger and LayAlign on the shipped bases, compare them with the LLM alone, save LayAlign.

    Writes results.json, plots/*.png, model/ and training/ (each system's own run) in `output`.

    Args:
        output: a new or empty folder, or that of an earlier demo, whose files are replaced.
        seed: of the generated data, the trained parts and the data order.
        translation_steps, task_steps, batch_size, learning_rate: the budget of each system and stage, the same for all.
        questions: held-out problems, asked in every language.
        progress: show progress bars and the tables.

    Returns:
        what results.json holds: {"accuracy": {system: {language: per cent}}, "seconds": {...}, "seed": seed, ...}.

    Raises:
        ValueError: `output` holds something that is no demo.
    """
    output = Path(output)
    settings = {
        "seed": seed,
        "translation_steps": translation_steps,
        "task_steps": task_steps,
        "batch_size": batch_size,
        "questions": questions,
        "learning_rate": learning_rate,
    }
    claim(output, settings)
    started = time.perf_counter()
    show = print if progress else lambda *_: None
    show(
        "LayAlign demo. All text is generated: word problems from templates, in "
        "English, German, Spanish, French, Chinese, Swahili, Bengali and Thai.\n"
        f"The {questions} problems asked per language use template combinations and number pairs held out of all training."
    )
    problems = evaluation_problems(questions, seed)
    seconds, accuracy, histories, samples = {}, {}, {}, {}

    def evaluate(name, answerer):
        show(f"\n{TITLES[name]}: answering {len(problems)} questions")
        begun = time.perf_counter()
        result = evaluate_problems(answerer, problems, batch_size=len(problems), progress=progress)
        accuracy[name] = result["accuracy"]["official"]
        samples[name] = sample_answers(result["records"])
        seconds[f"{name}_evaluation"] = time.perf_counter() - begun

    generation = {"max_new_tokens": LONGEST_ANSWER, "batch_size": 100}
    tokenizer = LayAlignProcessor.from_bases(ENCODER, LLM).tokenizer
    evaluate("llm", LLMAnswerer(load_llm(LLM), tokenizer, PROMPT.format(source="{text}"), **generation))
    translation = translation_records(translation_steps * batch_size, seed)
    task = task_records(task_steps * batch_size, seed)
    for system in SYSTEMS:
        show(f"\n{TITLES[system.name]}: translation stage, then task stage")
        begun = time.perf_counter()
        stage = {
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "betas": [0.9, 0.98],
            "log_steps": 5,
            "length_grouped": True,
        }
        recipe = Recipe(
            encoder=ENCODER,
            llm=LLM,
            output=str(output / "training" / system.name),
            stages={
                "translation": StageRecipe(data=[DataSource(records=translation)], steps=translation_steps, **stage),
                "task": StageRecipe(
                    data=[DataSource(records=task)],
                    steps=task_steps,
                    prompt=PROMPT if system.llm_input else None,
                    **stage,
                ),
            },
            model=system.settings,
            llm_input={"task": system.llm_input},
            seed=seed,
            progress=progress,
        )
        model, processor, histories[TITLES[system.name]] = train(recipe)
        seconds[f"{system.name}_training"] = time.perf_counter() - begun
        evaluate(system.name, Answerer(model, processor, **generation))

    shutil.copytree(output / "training" / "layalign" / "model", output / "model")
    table = {TITLES[name]: scores for name, scores in accuracy.items()}
    plots = output / "plots"
    plot_accuracy(table, plots / "accuracy.png", "Generated word problems, held out: accuracy by language")
    plot_losses(histories, plots / "loss.png", "Training loss")
    plot_gates({"LayAlign": model.gates()}, plots / "gates.png", "LayAlign's gates after both stages")
    seconds["total"] = time.perf_counter() - started
    results = {
        "accuracy": accuracy,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seed": seed,
        "settings": settings,
        "data": "generated word problems; evaluated on held-out template combinations and number pairs",
        "samples": samples,
        "history": histories,
    }
    write_json(output / "results.json", results)
    if progress:
        report(table, samples["layalign"], output, seconds["total"])
    return results


def report(table, samples, output, seconds):
    """Print the table, a few of LayAlign's answers and where everything is."""
    print()
    print_table(table, "Accuracy in per cent on generated problems")
    for language, sample in samples.items():
        print(f"{language}: {sample['question']}\n    -> {sample['answer']}")
    question = samples["sw"]["question"]
    print(f"\n{seconds:.0f} s in all. Results, plots and the model are in {output}; ask it something:")
    print(f'    layalign generate {output / "model"} "{question}"')


def sample_answers(records):
    """{language: {"question", "answer", "expected"}} of the last problem in each language."""
    return {
        record["lang"]: {"question": record["question"], "answer": record["prediction"], "expected": record["answer"]}
        for record in records
    }


def claim(output, settings):
    """Make `output` this demo's, removing what an earlier demo wrote there. ValueError where it is something else's."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, takes a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise ValueError(
            f"output: {output} holds something that is no demo; nothing was changed, choose another folder"
        )
    for name in WRITTEN:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / MARKER, settings)


def write_json(path, value):
    """Written beside and renamed, so that a reader never finds half a file."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
