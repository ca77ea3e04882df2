"""Training of one system with one seed, through the recipe `small_real`."""

import json
from pathlib import Path

from layalign.processor import LayAlignProcessor
from layalign.train.real.proof.callbacks import StartAtEmbeddings, StepLog
from layalign.train.recipe import load_recipe
from layalign.train.sources import read_sources
from layalign.train.stages import train

RECIPE = "small_real"
LOG = "log.jsonl"
FITTED_ON = 64


def make_recipe(system, seed, steps, bases, output, data, precision=None):
    """The recipe of one run; steps: {stage: optimizer steps}, a stage that the system leaves out gives its to the other.

    bases: folders of encoder and LLM; output: the run's folder; data: the folder with the records; precision: "fp32" or
    "bf16", None for the recipe's own.
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
    recipe.stages[system.stages[-1]].steps += sum(steps[name] for name in missing)
    return recipe


def train_run(recipe):
    """Train a recipe's run, or go on with it; model, processor and history as `layalign.train.stages.train` gives them.

    Every logged step is also a line of log.jsonl in the run's folder.
    """
    first = next(iter(recipe.stages))
    rows, _ = read_sources(recipe.stages[first].data, recipe.data_root)
    batch = LayAlignProcessor.from_bases(recipe.encoder, recipe.llm)(
        [row["source"] for row in rows[:: -(-len(rows) // FITTED_ON)]],
        prompt=None,
        encoder_max_length=recipe.stages[first].source_max_length,
    )
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    return train(recipe, [StartAtEmbeddings(first, batch), StepLog(folder / LOG)])


def training_seconds(folder):
    """Wall seconds of a run's training by stage, repeated steps of resumed runs included: {stage: seconds}."""
    seconds = {}
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        seconds[entry["stage"]] = seconds.get(entry["stage"], 0.0) + entry["seconds"]
    return {stage: round(value, 1) for stage, value in seconds.items()}
