"""Commands that ask a model: answers, evaluations, their comparison, and the paper's figures."""

from pathlib import Path
from typing import Annotated

import typer

from layalign.commands.options import (
    Encoder,
    Model,
    Output,
    OwnLLM,
    Running,
    Sampling,
    TaskData,
    Texts,
    listed,
    require,
    runs_a_model,
)


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
    on_bad_line: Annotated[
        str,
        typer.Option(help="A line that cannot be answered: error (before any is), or skip (null, with the reason)."),
    ] = "error",
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm (layalign[vllm]): continuous batches, for long files.")
    ] = "transformers",
    encoder: Encoder = None,
    llm: OwnLLM = None,
    *,
    sampling: Sampling,
    running: Running,
) -> None:
    """Answer questions, in any language the encoder knows."""
    if engine == "vllm":
        require("vllm")
    from layalign.generation.jobs import generate_texts

    given = {
        "lang": lang,
        "on_bad_line": on_bad_line,
        "engine": engine,
        "max_new_tokens": max_new_tokens,
        **sampling.given(),
        **running.given(),
    }
    generate_texts(model, texts or (), file=file, output=output, encoder=encoder, llm=llm, **given)


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
            help="mgsm, msvamp, xcsqa, xnli, flores, xcopa or a file of problems; may be repeated, or parted by commas.",
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
        str | None,
        typer.Option(
            help="Instead of a model: any causal LM alone; with --published, the baseline's; with a model, its own, where it has moved."
        ),
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
    encoder: Annotated[
        str | None,
        typer.Option(help="--published: the encoder it was trained with; with a model, its own, where it has moved."),
    ] = None,
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
    require("matplotlib", "rich")
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
    codes, tasks = listed(languages, "--languages"), listed(task, "--task") or []
    evaluate(system, tasks, data=data, languages=codes, limit=limit, output=output, against=against)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished evaluations of the same questions.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go.")] = Path("runs/comparison"),
) -> None:
    """Evaluations side by side: a table with a column a system, intervals, and whether they differ from the first."""
    require("matplotlib", "numpy")
    from layalign.evaluation.runs import compare_runs

    typer.echo(compare_runs(runs, output))


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
    encoder: Encoder = None,
    llm: OwnLLM = None,
    *,
    running: Running,
) -> None:
    """The paper's figures: languages side by side in the states, the weight of the cross-attention, the aligner's weights."""
    require("matplotlib", "rich")
    from layalign.analysis.run import analyze
    from layalign.evaluation.settings import GenerationSettings

    settings = GenerationSettings(**running.given())
    codes = listed(languages, "--languages")
    analyze(
        model,
        task,
        data=data,
        texts=texts,
        languages=codes,
        limit=limit,
        output=output,
        settings=settings,
        bases={"encoder": encoder, "llm": llm},
    )
