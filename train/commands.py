"""Commands that train: the demonstration, recipes, and the report of a run."""

import os
from pathlib import Path
from typing import Annotated

import typer

from layalign.commands.options import Output, refuse, require


def demo(
    output: Output = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the trained part and the data order; 0 by default.")
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Real pretrained models, with the trained part that comes with the package.")
    ] = False,
    ask: Annotated[list[str] | None, typer.Option(help="--real: a question of your own; may be repeated.")] = None,
    train_again: Annotated[bool, typer.Option("--train", help="--real: repeat the training of that part.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="--real --train: folder with tatoeba_pairs/ and benchmarks.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="--real --train: budget in minutes.")] = None,
    steps: Annotated[int | None, typer.Option(help="--real --train: budget in steps over both stages.")] = None,
) -> None:
    """Train both stages on tiny bases shipped with the package and compare four systems, in minutes on a CPU."""
    if not real:
        refuse({"--ask": ask, "--train": train_again}, "--real")
    if not (real and train_again):
        refuse({"--data": data, "--minutes": minutes, "--steps": steps}, "--real --train")
    if not real or train_again:
        require("accelerate", "matplotlib", "num2words2", "rich")
    if train_again:
        from layalign.train.demo.real.experiment import run_experiment
        from layalign.train.demo.real.plan import Settings

        refuse({"--ask": ask}, "--real without --train")
        settings = Settings(data=data, steps=steps, minutes=minutes)
        run_experiment(output or Path("runs/experiment"), ["layalign"], [seed or 0], settings)
        return
    if real:
        from layalign.train.demo.real.shipped import answer_shipped

        refuse({"--output": output, "--seed": seed}, "a training: add --train or leave out --real")
        answer_shipped(ask)
        return
    from layalign.train.demo.tiny.run import run_demo

    run_demo(output=output or Path("runs/demo"), seed=seed or 0)


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; train/recipes has the paper's.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as stages.task.learning_rate=1e-4.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only tell parameters, steps, memory and time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="--plan: one JSON object.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="--plan: so many would train together.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="--plan: on this GPU (h100, a100, l40, ...), not on this machine.")
    ] = None,
) -> None:
    """Train one or both stages of a recipe; run it again and it resumes."""
    require("accelerate", "pydantic")
    if plan:
        from layalign.train.plan.command import print_plan

        print_plan(recipe, overrides or [], as_json, processes, gpu)
        return
    refuse({"--json": as_json, "--processes": processes, "--gpu": gpu}, "--plan")
    from layalign.train.recipe import load_recipe
    from layalign.train.stages import train

    loaded = load_recipe(recipe, overrides or [])
    train(loaded)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"trained model: {Path(loaded.output) / 'model'}")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, ended, interrupted or under way.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; report.html in the run by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=24, help="Let the trained model answer so many samples.")] = 0,
) -> None:
    """One HTML file of a training run: curves, stages, samples, data, settings, versions."""
    require("accelerate", "pydantic")
    from layalign.train.report.command import write_report

    write_report(run, output, samples)
