"""`python -m layalign.train.demo.real.further`: a longer translation stage over people's sentences, then problems of one and two steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from layalign.model import LayAlignForConditionalGeneration
from layalign.processor import LayAlignProcessor
from layalign.train.demo.driver import Run, keep, kept
from layalign.train.demo.real.bases import encoder_folder, llm_folder
from layalign.train.demo.real.evaluation import evaluate_answers, evaluate_translation
from layalign.train.demo.real.experiment import Experiment, make_recipe
from layalign.train.demo.real.export import FURTHER_REPORT, LAST_REPORT, ship, ship_translations
from layalign.train.demo.real.further_data import MIXTURES, TEMPERATURE, further_sets, prepare_further
from layalign.train.demo.real.plan import PLAN, check_count, check_folder, check_rate, read_plan
from layalign.train.demo.systems import LLM_ALONE, SYSTEMS, runs_of
from layalign.train.recipe import InitFrom, Recipe

COMPARED = ("layalign", "mindmerger", LLM_ALONE)
COMMAND = "python -m layalign.train.demo.real.further"
ANSWERS = "word problems of one and two steps (addition and subtraction, numbers up to 100, in words or digits)"
# Encoder and answer tokens of the task stage: people's problems are longer, and two steps are.
SOURCE_TOKENS, TARGET_TOKENS = 96, 48
SAVE_STEPS = 100
# Settings that a plan names where they are not the usual ones: older plans are without them.
CHOSEN = ("mixture", "learning_rate")
REPORTS = {"wide": FURTHER_REPORT, "last": LAST_REPORT}


@dataclass(frozen=True, kw_only=True)
class FurtherSettings:
    """What the second experiment is asked for.

    Attributes:
        data: folder with tatoeba_pairs/, gsm8k/, and msvamp/ and tatoeba_laser/ to be tested on.
        translation_steps, task_steps: optimizer steps, batches of 16; of a last task stage, which begins with a part, the latter alone.
        questions, benchmark_questions, sentences: a language: generated problems, MSVAMP questions, LASER sentences.
        mixture: of the task stage's records, one of MIXTURES.
        learning_rate: of the task stage; None: the recipe's.
    """

    data: Path
    translation_steps: int = 6000
    task_steps: int = 3000
    questions: int = 50
    benchmark_questions: int = 30
    sentences: int = 50
    mixture: str = "wide"
    learning_rate: float | None = None

    def arguments(self) -> dict:
        """As plan.json holds them.

        Raises:
            ValueError: a wrong one.
        """
        counts = {name: value for name, value in asdict(self).items() if name not in ("data", *CHOSEN)}
        for name, value in counts.items():
            check_count(name, value, 2)
        check_folder(self.data)
        if self.mixture not in MIXTURES:
            raise ValueError(f"mixture: got {self.mixture!r}, takes {' or '.join(MIXTURES)}")
        if self.learning_rate is not None:
            check_rate(self.learning_rate)
        chosen = {name: getattr(self, name) for name in CHOSEN if getattr(self, name) != getattr(type(self), name)}
        return {"data": str(self.data.resolve()), "precision": None} | counts | chosen

    def plan(self) -> dict:
        """As plan.json holds it.

        Raises:
            ValueError: a wrong argument.
        """
        arguments = self.arguments()
        steps = {"translation": 0 if self.mixture == "last" else self.translation_steps, "task": self.task_steps}
        options = (f"--{name.replace('_', '-')} {arguments[name]}" for name in CHOSEN if name in arguments)
        command = " ".join([COMMAND, *options])
        return {"arguments": arguments, "steps": steps, "command": command, "answers": ANSWERS}


def run_further(
    settings: FurtherSettings,
    output: str | Path = "runs/further",
    systems: Sequence[str] = COMPARED,
    seeds: Sequence[int] = (0,),
    starts: Mapping[str, Path] | None = None,
    cache: str | Path | None = None,
) -> dict:
    """Train and evaluate; write results.json, table.md and plots/ after each run. The same call goes on where an earlier one stopped.

    A system's translation stage is trained once, with the first seed, and every seed's task stage begins with it.

    Args:
        settings: data, steps and how much is asked.
        output: folder of the experiment; a run has a folder `SYSTEM-SEED` there, a translation stage `SYSTEM_translation-SEED`.
        systems: "layalign", "mindmerger" and "llm", the LLM alone.
        seeds: of the task stage.
        starts: {system: trained part} for translation stages that have been trained already.
        cache: folder of the converted bases.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a wrong argument, a folder of another experiment, data that cannot be read, a package that cannot be had.
    """
    output, plan = Path(output), settings.plan()
    starts = {name: Path(start) for name, start in (starts or {}).items()}
    for argument, names in (("systems", systems), ("starts", starts)):
        if unknown := [name for name in names if name not in COMPARED]:
            raise ValueError(f"{argument}: no {', '.join(unknown)} here; there are {', '.join(COMPARED)}")
    if settings.mixture == "last" and (without := [name for name in systems if name not in (*starts, LLM_ALONE)]):
        raise ValueError(f"starts: a last task stage goes on from a trained part; give one for {', '.join(without)}")
    runs = []
    for system, seed in runs_of(systems, seeds):
        stage = SYSTEMS[f"{system.name}_translation"]
        folder = output / f"{stage.name}-{seeds[0]}"
        if system.name not in starts:
            starts[system.name] = folder / "model"
            runs.append(Run(stage, seeds[0], folder))
        runs.append(Run(system, seed, output / f"{system.name}-{seed}"))
    if read_plan(output, plan["arguments"]) is None:
        output.mkdir(parents=True, exist_ok=True)
        keep(output / PLAN, plan)
    bases = str(encoder_folder(cache)), str(llm_folder(cache))
    task = make_recipe(SYSTEMS["layalign"], 0, plan["steps"], bases, output, output / "data").stages["task"]
    records = task.batch_size * settings.task_steps
    report = prepare_further(output / "data", records, settings.data, cache, mixture=settings.mixture)
    sets = further_sets(settings.questions, settings.benchmark_questions, settings.sentences, settings.data)
    llm = output / LLM_ALONE if LLM_ALONE in systems else None
    experiment = Further(output, plan, bases, sets, report, runs, llm, starts=starts)
    experiment.make()
    return experiment.results


@dataclass
class Further(Experiment):
    """The second experiment's runs.

    Attributes:
        starts: {system: the trained part its task stages begin with}.
    """

    starts: Mapping[str, Path] = field(default_factory=dict)

    def recipe(self, run: Run) -> Recipe:
        """The recipe `small_real` with one stage, fitted to system, seed and these data."""
        stage = "translation" if run.system.name.endswith("_translation") else "task"
        system, steps = replace(run.system, stages=(stage,)), self.plan["steps"]
        recipe = make_recipe(system, run.seed, steps, self.bases, run.folder, self.output / "data")
        recipe.stages[stage].steps = steps[stage]
        recipe.stages[stage].save_steps = SAVE_STEPS
        if stage == "translation":
            recipe.stages[stage].mixing = {"temperature": TEMPERATURE}
            return recipe
        recipe.init_from = InitFrom(path=str(self.starts[run.system.name]))
        recipe.stages[stage].source_max_length = SOURCE_TOKENS
        recipe.stages[stage].target_max_length = TARGET_TOKENS
        if (learning_rate := self.plan["arguments"].get("learning_rate")) is not None:
            recipe.stages[stage].learning_rate = learning_rate
        return recipe

    def evaluate(self, run: Run, model: LayAlignForConditionalGeneration, processor: LayAlignProcessor) -> None:
        """A translation stage translates; a task stage's model does both, as it is."""
        translated = run.system.name.endswith("_translation")
        if not translated:
            evaluate_answers(model, processor, run.folder, self.sets)
        if "tatoeba" in self.sets:
            after = "" if translated else "_task"
            evaluate_translation(model, processor, run.folder, self.sets["tatoeba"], after)


def _ship(output: Path) -> list[Path]:
    """Export the best LayAlign run, with the report that its kind of task stage has."""
    mixture = kept(output / PLAN)["arguments"].get("mixture", "wide") if (output / PLAN).exists() else "wide"
    return [ship(output, report=REPORTS[mixture].name)]


EXPORTS: dict[str, Callable[[Path], list[Path]]] = {"ship": _ship, "ship_translation": ship_translations}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    add, default = parser.add_argument, FurtherSettings(data=Path())
    add("--output", type=Path, default=Path("runs/further"), help="folder of the experiment; the same one resumes")
    add("--data", type=Path, required=True, help="folder with tatoeba_pairs, gsm8k, msvamp, tatoeba_laser")
    add("--systems", nargs="+", default=list(COMPARED), choices=COMPARED, metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[0], help="of the task stage")
    add("--starts", nargs="+", default=[], metavar="SYSTEM=PART", help="trained parts of translation stages")
    add("--translation-steps", type=int, default=default.translation_steps)
    add("--task-steps", type=int, default=default.task_steps)
    add("--mixture", default=default.mixture, choices=MIXTURES, help="of the task stage's records")
    add("--learning-rate", type=float, help="of the task stage; else the recipe's")
    add("--questions", type=int, default=default.questions, help="generated problems a language, of each kind")
    add("--benchmark-questions", type=int, default=default.benchmark_questions, help="MSVAMP questions a language")
    add("--sentences", type=int, default=default.sentences, help="LASER sentences a language")
    add("--cache", type=Path, help="folder of the converted models and of the wheels with sentences")
    add("--ship", action="store_true", help="export the best LayAlign run of --output")
    add("--ship-translation", action="store_true", help="export the parts after the translation stage")
    given = vars(parser.parse_args(arguments))
    exports = {name: given.pop(name) for name in ("ship", "ship_translation")}
    output, systems, seeds, cache = (given.pop(name) for name in ("output", "systems", "seeds", "cache"))
    try:
        if any(exports.values()):
            print(*(folder for name, asked in exports.items() if asked for folder in EXPORTS[name](output)), sep="\n")
            return
        starts = dict(start.partition("=")[::2] for start in given.pop("starts"))
        run_further(FurtherSettings(**given), output, systems, seeds, starts, cache)
    except ValueError as error:
        print(f"further: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
