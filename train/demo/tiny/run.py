"""The embedded demo: both stages on the tiny bases, then every language against the LLM alone and two baselines."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layalign.evaluation.loop import evaluate_problems
from layalign.folders import damage
from layalign.generation.texts import Answerer, LLMAnswerer
from layalign.kernels.files import MANIFEST, read_json, write_json
from layalign.loading import load_llm
from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.checkpoints import sealed_folder
from layalign.train.data.data_source import DataSource
from layalign.train.demo.driver import Comparison, Run, made
from layalign.train.demo.problems import TINY
from layalign.train.demo.report import show_demo, write_demo
from layalign.train.demo.systems import LLM_ALONE, SYSTEMS, TITLES
from layalign.train.recipe import Recipe
from layalign.train.stage_recipe import StageRecipe

ENCODER, LLM = "layalign:tiny_encoder", "layalign:tiny_llm"
PROMPT = "{source} Answer:"
TRAINED = ("langbridge", "mindmerger", "layalign")
MARKER = "demo.json"
TRAINING, RESULTS = "training", "results.json"
GENERATION: dict[str, Any] = {"max_new_tokens": 32, "batch_size": 100}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a demo's numbers depend on; its arguments are those of `run_demo`."""

    seed: int
    translation_steps: int
    task_steps: int
    batch_size: int
    questions: int
    learning_rate: float


def run_demo(
    output: str | Path = "runs/demo",
    seed: int = 0,
    *,
    translation_steps: int = 180,
    task_steps: int = 500,
    batch_size: int = 16,
    questions: int = 100,
    learning_rate: float = 7e-3,
    progress: bool = True,
) -> dict:
    """Train LangBridge, MindMerger and LayAlign on the shipped bases, compare them with the LLM alone, save LayAlign.

    Writes results.json, plots/*.png, model/ and training/ (each system's own run) in `output`. The same call goes on where an earlier one
    stopped, and gives the results of one that was finished.

    Args:
        output: a new or empty folder, or that of an earlier demo; one with other settings is replaced.
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
    settings = Settings(
        seed=seed,
        translation_steps=translation_steps,
        task_steps=task_steps,
        batch_size=batch_size,
        questions=questions,
        learning_rate=learning_rate,
    )
    if (results := claim(output, settings)) is not None:
        if progress:
            show_demo(results, output)
            print("It had been made before and was not made again; another --output or --seed makes a new one.")
        return results
    comparison = TinyComparison(output / TRAINING, settings, progress)
    comparison.show(
        "LayAlign demo. All text is generated: word problems from sentence patterns, in "
        "English, German, Spanish, French, Chinese, Swahili, Bengali and Thai.\n"
        f"The {questions} problems asked per language use pattern combinations and number pairs held out of all training."
    )
    comparison.make()
    with sealed_folder(output / "model") as fresh:
        shutil.copytree(
            output / TRAINING / "layalign" / "model", fresh, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True
        )
    results = write_demo(output, comparison.folders, asdict(settings))
    if progress:
        show_demo(results, output)
    return results


class TinyComparison(Comparison):
    """The three trained systems and the LLM alone on the tiny bases.

    Args:
        folder: with a folder for each system.
        settings: of all of them.
        progress: show bars and what comes next.
    """

    def __init__(self, folder: Path, settings: Settings, progress: bool):
        self.settings, self.progress = settings, progress
        self.show: Callable[..., None] = print if progress else lambda *_: None
        self.llm_folder = llm = folder / LLM_ALONE
        self.runs = [Run(SYSTEMS[name], settings.seed, folder / name) for name in TRAINED]
        # Of the LLM alone and of each run.
        self.folders = [llm, *(run.folder for run in self.runs)]
        self.problems = TINY.evaluation_problems(settings.questions, settings.seed)
        self.steps = {"translation": settings.translation_steps, "task": settings.task_steps}
        self.records = {
            name: make(self.steps[name] * settings.batch_size, settings.seed)
            for name, make in (("translation", TINY.translation_records), ("task", TINY.task_records))
        }

    def recipe(self, run: Run) -> Recipe:
        """Two stages of the same batches, learning rate and schedule for every system."""
        llm_input = run.system.llm_input
        stages = {
            name: StageRecipe(
                data=[DataSource(records=records)],
                steps=self.steps[name],
                prompt=PROMPT if name == "task" and llm_input else None,
                batch_size=self.settings.batch_size,
                learning_rate=self.settings.learning_rate,
                betas=[0.9, 0.98],
                log_steps=5,
                length_grouped=True,
            )
            for name, records in self.records.items()
        }
        return Recipe(
            encoder=ENCODER,
            llm=LLM,
            output=str(run.folder),
            stages=stages,
            model=dict(run.system.settings),
            llm_input={"task": llm_input},
            seed=run.seed,
            progress=self.progress,
        )

    def evaluate(self, run: Run, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor) -> None:
        """The held-out problems, in every language at once."""
        self.ask(run.folder, Answerer(model, processor, **GENERATION))

    def evaluate_llm(self, folder: Path) -> None:
        """The same problems, of which the LLM reads the text."""
        tokenizer = LayAlignProcessor.from_bases(ENCODER, LLM).tokenizer
        self.ask(folder, LLMAnswerer(load_llm(LLM), tokenizer, PROMPT.format(source="{text}"), **GENERATION))

    def ask(self, folder: Path, answerer: Answerer | LLMAnswerer) -> None:
        """Ask every problem; keeps the answers and the seconds it took as a piece of the evaluation in `folder`."""
        self.show(f"\n{TITLES[folder.name]}: answering {len(self.problems)} questions")

        def answers() -> dict:
            begun = time.perf_counter()
            count = len(self.problems)
            found = evaluate_problems(answerer, self.problems, batch_size=count, progress=self.progress)
            return found | {"seconds": time.perf_counter() - begun}

        made(folder, {"held_out": answers}, progress=False)


def claim(output: Path, settings: Settings) -> dict[str, Any] | None:
    """Make `output` this demo's. What an earlier call with the same settings trained and asked stays; of a demo with others the training is
    removed, and its results stay until there are new ones.

    Returns:
        what results.json holds, of a demo with the same settings that is finished and whole.

    Raises:
        ValueError: it is something else's.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, takes a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise ValueError(
            f"output: {output} holds something that is no demo; nothing was changed, choose another folder"
        )
    if _read(output / MARKER) != asdict(settings):
        if (output / TRAINING).exists():
            shutil.rmtree(output / TRAINING)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / MARKER, asdict(settings))
        return None
    results = _read(output / RESULTS)
    return results if results.get("settings") == asdict(settings) and damage(output / "model") is None else None


def _read(file: Path) -> dict[str, Any]:
    """A JSON file's content; nothing of one that is not there, or is damaged."""
    try:
        return read_json(file)
    except (FileNotFoundError, ValueError):
        return {}
