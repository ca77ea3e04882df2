"""The command line. Each command imports what it needs when it runs, so that `layalign --help` is instant."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from layalign.command_options import Model, Output, Running, SeveralValues, TaskData, Texts, runs_a_model

# What an installation of the core alone lacks, by the extra that installs it and the command whose work it is.
TRAIN = ("accelerate", "datasets")
EVAL = ("matplotlib", "rich", "datasets", "sacrebleu")
EXTRAS = {"train": TRAIN, "eval": EVAL, "demo": (*TRAIN, *EVAL, "num2words2", "gguf")}
EXTRA_OF = {"train": "train", "evaluate": "eval", "compare": "eval", "analyze": "eval", "bench": "eval", "demo": "demo"}

app = typer.Typer(
    help="LayAlign: a frozen LLM answers in languages it never learned, through a frozen multilingual encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _require(*packages: str) -> None:
    """Before work that ends with them; `main` says how to install the first that is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _languages(listed: str | None) -> list[str] | None:
    return listed.split(",") if listed else None


@app.command()
def demo(
    output: Output = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the trained part and the data order; 0 by default.")] = None,
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
        _refuse({"--ask": ask, "--train": train_again}, "--real")
    if not (real and train_again):
        _refuse({"--data": data, "--minutes": minutes, "--steps": steps}, "--real --train")
    if not real or train_again:
        _require("accelerate", "matplotlib", "num2words2", "rich")
    if train_again:
        from layalign.train.demo.real.experiment import run_experiment
        from layalign.train.demo.real.plan import Settings

        _refuse({"--ask": ask}, "--real without --train")
        settings = Settings(data=data, steps=steps, minutes=minutes)
        run_experiment(output or Path("runs/experiment"), ["layalign"], [seed or 0], settings)
        return
    if real:
        from layalign.train.demo.real.shipped import answer_shipped

        _refuse({"--output": output, "--seed": seed}, "a training: add --train or leave out --real")
        answer_shipped(ask)
        return
    from layalign.train.demo.tiny.run import run_demo

    run_demo(output=output or Path("runs/demo"), seed=seed or 0)


def _refuse(options: dict[str, Any], where: str) -> None:
    """options: {name: value as given}."""
    if given := [name for name, value in options.items() if value is not None and value is not False and value != []]:
        raise ValueError(f"{', '.join(given)} goes with {where}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; train/recipes has the paper's.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as stages.task.learning_rate=1e-4.")
    ] = None,
) -> None:
    """Train one or both stages of a recipe; run it again and it resumes."""
    _require("accelerate")
    from layalign.train.recipe import load_recipe
    from layalign.train.stages import train

    loaded = load_recipe(recipe, overrides or [])
    train(loaded)
    typer.echo(f"trained model: {Path(loaded.output) / 'model'}")


@app.command()
@runs_a_model
def generate(
    model: Model,
    texts: Texts = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A text file with one question a line; - is standard input.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines; an interrupted job resumes.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    lang: Annotated[
        str | None,
        typer.Option(help="Their language, for encoders that are told it (NLLB, M2M100, mBART): sw, swh_Latn, ..."),
    ] = None,
    *,
    running: Running,
) -> None:
    """Answer questions, in any language the encoder knows."""
    from layalign.generation.jobs import generate_texts

    given = {"lang": lang, "max_new_tokens": max_new_tokens, **running.given()}
    generate_texts(model, texts or (), file=file, output=output, **given)


@app.command()
@runs_a_model
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of a LayAlign model, or with --published a baseline's checkpoint."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="mgsm, msvamp, xcsqa, xnli, flores, xcopa or a file of problems; may be repeated.",
        ),
    ] = None,
    data: TaskData = None,
    languages: Annotated[str | None, typer.Option(help="Comma-separated codes; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per language.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    output: Output = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another evaluation of the same questions, to be compared with.")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="Instead of a model: any causal LM alone; with --published, the baseline's.")
    ] = None,
    translator: Annotated[
        str | None, typer.Option(help="--llm: an encoder-decoder that translates questions into English first.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="--llm: file of worked examples, question, answer, lang.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="--examples: so many before each question.")] = None,
    published: Annotated[
        str | None, typer.Option(help="mindmerger or langbridge: MODEL is a checkpoint of theirs.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="--published: the encoder it was trained with.")] = None,
    encoder_tokenizer: Annotated[
        str | None, typer.Option(help="--published: where the encoder's tokenizer is, if not with it.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="--translator: put before each text, {language} for its language (T5).")
    ] = None,
    *,
    running: Running,
) -> None:
    """Accuracy by language with the published and other scorers: table, JSON, plot. Under torchrun processes share the questions."""
    _require("matplotlib", "rich")
    from layalign.evaluation.run import evaluate
    from layalign.evaluation.settings import GenerationSettings
    from layalign.systems import chosen_system

    if not task:
        raise ValueError("--task: got none, takes at least one")
    settings = GenerationSettings(max_new_tokens=max_new_tokens, **running.given())
    system = chosen_system(
        settings,
        model=model,
        llm=llm,
        translator=translator,
        examples=None if examples is None else str(examples),
        shots=shots,
        published=published,
        encoder=encoder,
        encoder_tokenizer=encoder_tokenizer,
        prefix=prefix,
    )
    evaluate(system, task, data=data, languages=_languages(languages), limit=limit, output=output, against=against)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished evaluations of the same questions.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("runs/comparison"),
) -> None:
    """Evaluations side by side: a table with a column a system, intervals, and whether they differ from the first."""
    _require("matplotlib", "numpy")
    from layalign.evaluation.runs import compare_runs

    typer.echo(compare_runs(runs, output))


@app.command()
@runs_a_model
def analyze(
    model: Model,
    task: Annotated[
        str, typer.Option("--task", "-t", help="mgsm, msvamp, problems or a JSON-lines file; questions are parallel.")
    ] = "mgsm",
    data: TaskData = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Instead of a task: a folder of parallel files, a language each, such as sw.txt."),
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Comma-separated codes, en among them; all by default.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Texts per language.")] = 100,
    output: Output = None,
    *,
    running: Running,
) -> None:
    """The paper's figures: languages side by side in the states, the weight of the cross-attention, the aligner's weights."""
    _require("matplotlib", "rich")
    from layalign.analysis.run import analyze
    from layalign.evaluation.settings import GenerationSettings

    settings = GenerationSettings(**running.given())
    codes = _languages(languages)
    analyze(model, task, data=data, texts=texts, languages=codes, limit=limit, output=output, settings=settings)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="The authors' pytorch_model.bin, or a LayAlign model folder with --to-published.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write, or the file with --to-published.")],
    encoder: Annotated[str | None, typer.Option(help="The encoder it was trained with.")] = None,
    llm: Annotated[str | None, typer.Option(help="The LLM it was trained with.")] = None,
    compatible: Annotated[
        bool, typer.Option(help="Keep the published code's quirks (padding seen by cross-attention).")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help="math, xcsqa or xnli: what it was trained for; its published prompt is saved with the model."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Instead of --task: the prompt to save, a text with {text}, or none.")
    ] = None,
    to_published: Annotated[bool, typer.Option("--to-published", help="From ours to theirs.")] = False,
) -> None:
    """Convert a published checkpoint to ours and back."""
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
    from layalign.prompts import published_prompt

    if target.exists():
        raise ValueError(f"{target} exists already; choose another target, nothing is overwritten")
    if to_published:
        LayAlignForConditionalGeneration.from_pretrained(source, encoder=encoder, llm=llm).save_published(target)
        return
    if encoder is None or llm is None:
        raise ValueError("a published checkpoint does not say what its bases are: pass --encoder and --llm")
    template = published_prompt(task, prompt)
    model = LayAlignForConditionalGeneration.from_published(source, encoder=encoder, llm=llm, compatible=compatible)
    if task is None and prompt is None:
        typer.echo(
            "note: no prompt saved; the LLM of a published checkpoint was trained with one: --task math, xcsqa or xnli, or --prompt",
            err=True,
        )
    try:
        processor = LayAlignProcessor.from_bases(encoder, llm, template)
    except (OSError, ValueError) as error:
        typer.echo(f"note: no processor saved, the bases' tokenizers cannot be loaded: {error}", err=True)
        processor = None
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)


@app.command(cls=SeveralValues)
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80 sm_90 ...; the present GPU's, else sm_80 sm_89 sm_90 sm_100.")
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Widths of a head; 64 128 by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 (by default) float16 float32.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Feature combinations; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line instead of a table.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilations at a time; one per core by default.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Compile again what was compiled before.")] = False,
    model: Annotated[
        str | None, typer.Option(help="h100 h200 a100: add loops, occupancy and predicted times there.")
    ] = None,
) -> None:
    """Compile every kernel ahead of time, no GPU needed, into Triton's cache: registers, spills, shared memory, tensor cores."""
    import json
    import os

    from tqdm import tqdm

    from layalign.kernels.ahead_of_time.calls import described_calls
    from layalign.kernels.ahead_of_time.report import (
        compile_report,
        default_architectures,
        describe,
        modelled_gpu,
        table,
    )

    gpu = modelled_gpu(model, arch)
    architectures = arch or ([gpu.architecture] if gpu else default_architectures())
    calls = described_calls(architectures, head_dim or (64, 128), dtype or ("bfloat16",), variant or ())
    lines = []
    for compiled in tqdm(
        compile_report(calls, jobs or os.cpu_count() or 1, refresh, gpu), "compiling", len(calls), unit="call"
    ):
        lines += compiled
        if as_json:
            for line in compiled:
                typer.echo(json.dumps(line))
    if not as_json:
        typer.echo(table(lines))
    failing = [line for line in lines if line["failures"]]
    for line in failing:
        typer.echo(f"fails: {describe(line)}: {'; '.join(line['failures'])}", err=True)
    if failing:
        raise typer.Exit(1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Results of the repository's `pytest bench/`: tables, plots, comparison."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        where = "bench: the benchmarks are in the repository: `pytest bench/` there, then `python -m bench report`"
        if "--help" not in context.args:
            raise ValueError(where)
        typer.echo(where)
        return
    sys.path.insert(0, str(root))
    from bench.__main__ import app as benchmarks

    benchmarks(context.args, prog_name="layalign bench")


def main() -> None:
    """Entry point: what a user can mend is one line on standard error and exit status 2; anything else keeps its traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = _missing_extra(error, next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
        if missing is None:
            raise
        typer.echo(f"layalign: {missing}", err=True)
        sys.exit(2)
    except ValueError as error:
        typer.echo(f"layalign: {error}", err=True)
        sys.exit(2)


def _missing_extra(error: ModuleNotFoundError, command: str) -> str | None:
    """What to install where a package is missing that an extra installs."""
    package = (error.name or "").partition(".")[0]
    having = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not having:
        return None
    extra = EXTRA_OF[command] if EXTRA_OF.get(command) in having else having[0]
    return f'{command} needs {package}, which is not installed: pip install "layalign[{extra}]"'


if __name__ == "__main__":
    main()
