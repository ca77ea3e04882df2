"""The command line. Each command imports what it needs when it runs, so that `layalign --help` is instant."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

app = typer.Typer(
    help="LayAlign: a frozen LLM answers in languages it never learned, through a frozen multilingual encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Folder or hub name of a LayAlign model.")]
Texts = Annotated[
    list[str] | None, typer.Argument(help="Questions; left out, they are read from --file or standard input.")
]
TaskData = Annotated[Path | None, typer.Option(help="Folder with the task's files; left out, a datasets name is used.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where results go.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored by default.")]
EncoderMaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="Cut questions to so many of the encoder's tokens; else too long a one is refused."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")]


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
):
    """Train both stages on tiny bases shipped with the package and compare four systems, in minutes on a CPU."""
    if not real:
        _refuse({"--ask": ask, "--train": train_again}, "--real")
    if not (real and train_again):
        _refuse({"--data": data, "--minutes": minutes, "--steps": steps}, "--real --train")
    if train_again:
        from layalign.train.real.proof.driver import run_proof

        _refuse({"--ask": ask}, "--real without --train")
        run_proof(output or Path("runs/proof"), data, ["layalign"], [seed or 0], steps=steps, minutes=minutes)
        return
    if real:
        from layalign.train.real.shipped import answer_shipped

        _refuse({"--output": output, "--seed": seed}, "a training: add --train or leave out --real")
        answer_shipped(ask)
        return
    from layalign.train.demo.run import run_demo

    run_demo(output=output or Path("runs/demo"), seed=seed or 0)


def _refuse(options, where):
    """options: {name: value as given}."""
    if given := [name for name, value in options.items() if value is not None and value is not False and value != []]:
        raise ValueError(f"{', '.join(given)} goes with {where}")


def _given(**options):
    """Those that were given: a journal of a job without them stays the same job's."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; train/recipes has the paper's.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as stages.task.learning_rate=1e-4.")
    ] = None,
):
    """Train one or both stages of a recipe; run it again and it resumes."""
    from layalign.train.recipe import load_recipe
    from layalign.train.stages import train

    loaded = load_recipe(recipe, overrides or [])
    train(loaded)
    typer.echo(f"trained model: {Path(loaded.output) / 'model'}")


@app.command()
def generate(
    model: Model,
    texts: Texts = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A text file with one question a line; - is standard input.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines; an interrupted job resumes.")
    ] = None,
    batch_size: BatchSize = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    encoder_max_length: EncoderMaxLength = None,
    dtype: Dtype = None,
    device: Device = None,
):
    """Answer questions, in any language the encoder knows."""
    from layalign.generating import generate_texts

    generate_texts(
        model,
        texts or (),
        file=None if file is None else str(file),
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        **_given(encoder_max_length=encoder_max_length),
    )


@app.command()
def evaluate(
    model: Model,
    task: Annotated[list[str], typer.Option("--task", "-t", help="mgsm, msvamp or problems; may be repeated.")],
    data: TaskData = None,
    languages: Annotated[str | None, typer.Option(help="Comma-separated codes; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per language.")] = None,
    batch_size: BatchSize = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    encoder_max_length: EncoderMaxLength = None,
    output: Output = None,
    dtype: Dtype = None,
    device: Device = None,
):
    """Accuracy by language with the official and a strict scorer: table, JSON, plot."""
    from layalign.evaluation.run import evaluate

    evaluate(
        model,
        tasks=task,
        data=data,
        languages=languages.split(",") if languages else None,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
        dtype=dtype,
        device=device,
        **_given(encoder_max_length=encoder_max_length),
    )


@app.command()
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
    batch_size: BatchSize = 16,
    encoder_max_length: EncoderMaxLength = None,
    output: Output = None,
    dtype: Dtype = None,
    device: Device = None,
):
    """The paper's figures: languages side by side in the states, the weight of the cross-attention, the aligner's weights."""
    from layalign.analysis.run import analyze

    analyze(
        model,
        task,
        data=data,
        texts=texts,
        languages=languages.split(",") if languages else None,
        limit=limit,
        batch_size=batch_size,
        encoder_max_length=encoder_max_length,
        output=output,
        dtype=dtype,
        device=device,
    )


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
    to_published: Annotated[bool, typer.Option("--to-published", help="From ours to theirs.")] = False,
):
    """Convert a published checkpoint to ours and back."""
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    if target.exists():
        raise ValueError(f"{target} exists already; choose another target, nothing is overwritten")
    if to_published:
        LayAlignForConditionalGeneration.from_pretrained(source, encoder=encoder, llm=llm).save_published(target)
        return
    if encoder is None or llm is None:
        raise ValueError("a published checkpoint does not say what its bases are: pass --encoder and --llm")
    model = LayAlignForConditionalGeneration.from_published(source, encoder=encoder, llm=llm, compatible=compatible)
    try:
        processor = LayAlignProcessor.from_bases(encoder, llm)
    except (OSError, ValueError) as error:
        typer.echo(f"note: no processor saved, the bases' tokenizers cannot be loaded: {error}", err=True)
        processor = None
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)


class SeveralValues(typer.core.TyperCommand):
    """A command without arguments: a repeatable option takes all words up to the next option, and commas part them too."""

    def parse_args(self, ctx, args):
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, option, words = [], None, iter(args)
        for word in words:
            name, _, values = word.partition("=")
            if name in repeatable:
                option, word = name, values or next(words, "-")
                if word.startswith("-"):
                    ctx.fail(f"Option '{option}' requires an argument.")
            elif word.startswith("-"):
                option = None
            spread += [word] if option is None else [part for value in word.split(",") for part in (option, value)]
        return super().parse_args(ctx, spread)


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
):
    """Compile every kernel ahead of time, no GPU needed, into Triton's cache: registers, spills, shared memory, tensor cores."""
    import json
    import os

    from tqdm import tqdm

    from layalign.kernels.compile_calls import described_calls
    from layalign.kernels.compile_report import compile_report, default_architectures, describe, table

    calls = described_calls(
        arch or default_architectures(), head_dim or (64, 128), dtype or ("bfloat16",), variant or ()
    )
    lines = []
    for compiled in tqdm(compile_report(calls, jobs or os.cpu_count(), refresh), "compiling", len(calls), unit="call"):
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


bench = typer.Typer(help="Results of `pytest bench/`: tables, plots, comparison.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON files of results; bench/results/*/benchmarks.json by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a folder a machine; beside each file by default.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File whose section between the bench marks is written."),
    ] = None,
):
    """Tables (results.md) and plots from result files."""
    from layalign.benchmarks.report import report

    for path in report(files, output, readme):
        typer.echo(path)


@bench.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON of `pytest bench/ --benchmark-json=FILE`.")],
    against: Annotated[Path, typer.Option(help="Folder with the recorded results of each kind of machine.")],
    tolerance: Annotated[float, typer.Option(min=0.0, help="0.10 passes what is at most a tenth slower.")] = 0.10,
    failing: Annotated[
        Path | None, typer.Option(help="Write the tests of slower rows there: `pytest @FILE` measures them again.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="FILE has only some of the rows: name none it lacks.")
    ] = False,
):
    """Compare our times over the yardstick with recorded ones; exit status 1 where one is slower past the tolerance."""
    from layalign.benchmarks.check import compare, recorded_for, table
    from layalign.benchmarks.results import read_results

    now = read_results(file)
    comparisons, only_recorded, only_now = compare(now, recorded_for(now.kind, against))
    typer.echo(table(comparisons, tolerance))
    if partial:
        only_recorded = []
    for side, names in (("recorded, not measured now", only_recorded), ("measured now, not recorded", only_now)):
        for name in names:
            typer.echo(f"{side}: {name}")
    slower = [one for one in comparisons if one.is_slower(tolerance)]
    if failing is not None:
        failing.write_text("".join(f"{one.fullname}\n" for one in slower), encoding="utf-8")
    if slower:
        typer.echo(f"{len(slower)} of {len(comparisons)} rows are over {tolerance:.0%} slower", err=True)
        raise typer.Exit(1)


def main():
    """Entry point: what a user can mend is one line on standard error and exit status 2; anything else keeps its traceback."""
    try:
        app()
    except ValueError as error:
        typer.echo(f"layalign: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
