"""The experiment with real models: the systems on the same bases, data, steps and order, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback

from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.demo.driver import Comparison, Run, keep
from layalign.train.demo.problems import REAL
from layalign.train.demo.real.bases import encoder_folder, llm_folder
from layalign.train.demo.real.data import prepare
from layalign.train.demo.real.evaluation import EvaluationSets, evaluate_llm, evaluate_trained, evaluation_sets
from layalign.train.demo.real.fitting import fitting
from layalign.train.demo.real.interfaces import interface_pairs
from layalign.train.demo.real.plan import PLAN, SHARES, Settings, plan_steps, read_plan
from layalign.train.demo.report import write_experiment
from layalign.train.demo.systems import LLM_ALONE, SYSTEMS, System, runs_of
from layalign.train.recipe import Recipe, load_recipe

RECIPE = "small_real"
SYSTEMS_OF_THE_PAPER = ("layalign", "mindmerger", "langbridge", LLM_ALONE)
SEEDS = (0, 1, 2)
TIMED_RECORDS = 128


def run_experiment(
    output: str | Path = "runs/experiment",
    systems: Sequence[str] = SYSTEMS_OF_THE_PAPER,
    seeds: Sequence[int] = SEEDS,
    settings: Settings | None = None,
    cache: str | Path | None = None,
) -> dict:
    """Train and evaluate every system and the LLM alone; write results.json, table.md and plots/ after each.

    The same call goes on where an earlier one stopped, in the middle of a stage too, and leaves alone what is finished;
    more systems and seeds may be added later, or by another process meanwhile: two of one thread each take 2.15 s a step
    on two cores, one of two threads takes 1.4.

    Args:
        output: folder of the experiment; each run has a folder `SYSTEM-SEED` there.
        systems: names of `SYSTEMS` and "llm", the LLM alone, which is asked first.
        seeds: of the trained part and the data order; see `runs_of`.
        settings: data, budget and how much is asked.
        cache: folder of the converted bases.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a wrong argument, a folder of another experiment, data that cannot be read, a package that cannot be
            had.
    """
    output, settings = Path(output), settings or Settings()
    arguments = settings.arguments()
    runs = [Run(system, seed, output / f"{system.name}-{seed}") for system, seed in runs_of(systems, seeds)]
    plan = read_plan(output, arguments)
    sets = evaluation_sets(settings.questions, settings.benchmark_questions, settings.sentences, settings.data)
    bases = str(encoder_folder(cache)), str(llm_folder(cache))
    if plan is None:
        plan = {"arguments": arguments, "steps": _planned(arguments, bases)}
        output.mkdir(parents=True, exist_ok=True)
        keep(output / PLAN, plan)
    counts = _record_counts(plan["steps"], runs, bases)
    further = partial(interface_pairs, cache) if settings.interfaces else list
    data_report = prepare(output / "data", counts, settings.data, settings.real_share, further=further)
    llm = output / LLM_ALONE if LLM_ALONE in systems else None
    experiment = Experiment(output, plan, bases, sets, data_report, runs, llm)
    experiment.make()
    print(f"results in {output}; each run's model is in RUN/model, for `layalign generate`", flush=True)
    return experiment.results


@dataclass
class Experiment(Comparison):
    """The runs of one call, and everything of the plan that they share.

    Attributes:
        output: folder of the experiment.
        plan: its arguments, and {stage: steps}.
        bases: folders of encoder and LLM.
        sets: what is asked.
        data_report: of `prepare`.
        results: of the newest report.
    """

    output: Path
    plan: dict
    bases: tuple[str, str]
    sets: EvaluationSets
    data_report: dict
    runs: list[Run]
    llm_folder: Path | None
    results: dict = field(default_factory=dict)

    def recipe(self, run: Run) -> Recipe:
        """The recipe `small_real`, fitted to system and seed."""
        precision = self.plan["arguments"]["precision"]
        data = self.output / "data"
        return make_recipe(run.system, run.seed, self.plan["steps"], self.bases, run.folder, data, precision)

    def callbacks(self, recipe: Recipe) -> list[TrainerCallback]:
        """What fits the adapter to the embeddings before the first step."""
        return fitting(recipe)

    def evaluate(self, run: Run, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor) -> None:
        """Everything that is measured of a trained run."""
        evaluate_trained(model, processor, run.folder, self.sets)

    def evaluate_llm(self, folder: Path) -> None:
        """What of it the LLM alone has."""
        evaluate_llm(self.bases[1], folder, self.sets)

    def finished(self) -> None:
        """A report of everything in the folder, other processes' runs too."""
        self.results = write_experiment(self.output, self.plan, self.data_report)


def make_recipe(
    system: System,
    seed: int,
    steps: dict[str, int],
    bases: tuple[str, str],
    output: str | Path,
    data: str | Path,
    precision: Literal["fp32", "bf16"] | None = None,
) -> Recipe:
    """The recipe of one run.

    Args:
        system, seed: what is trained.
        steps: {stage: optimizer steps}; a stage that the system leaves out gives its to the other.
        bases: folders of encoder and LLM.
        output: the run's folder.
        data: the folder with the records.
        precision: "fp32" or "bf16", None for the recipe's own.
    """
    recipe = load_recipe(RECIPE, check_files=False)
    recipe.encoder, recipe.llm = bases
    recipe.output, recipe.data_root, recipe.seed = str(output), str(data), seed
    recipe.model |= system.settings
    missing = [name for name in recipe.stages if name not in system.stages]
    recipe.stages = {name: recipe.stages[name] for name in system.stages}
    for name, stage in recipe.stages.items():
        stage.steps = steps[name]
        stage.precision = precision or stage.precision
    last = system.stages[-1]
    recipe.stages[last].steps = sum(steps[name] for name in (last, *missing))
    return recipe


def _planned(arguments: dict, bases: tuple[str, str]) -> dict[str, int]:
    def recipe() -> Recipe:
        return make_recipe(SYSTEMS["layalign"], 0, dict.fromkeys(SHARES, 1), bases, ".", ".", arguments["precision"])

    return plan_steps(arguments, recipe, REAL.task_records(TIMED_RECORDS, "timing"))


def _record_counts(steps: dict[str, int], runs: list[Run], bases: tuple[str, str]) -> dict[str, int]:
    """{stage: records}, enough for every run: one with one stage spends all its steps on that one."""
    total = sum(steps.values())
    translating = any(run.system.stages == ("translation",) for run in runs)
    batch_size = make_recipe(SYSTEMS["layalign"], 0, steps, bases, ".", ".").stages["task"].batch_size
    needed = {"translation": total if translating else steps["translation"], "task": total}
    return {stage: count * batch_size for stage, count in needed.items()}
