"""Commands that ask a model: answers, evaluations, their comparison, and the paper's figures."""

from collections.abc import Iterable
from itertools import zip_longest
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
    refuse,
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
        str, typer.Option(help="transformers, or vllm (the extra of that name): continuous batches, for long files.")
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
        **running.given(64 if engine == "vllm" else 16),
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
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders or hub names of LayAlign models, and of LLMs that are read alone; several stand side by side. NAME=FOLDER: "
            "so it is called."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="mgsm (the default), msvamp, problems or a JSON-lines file; questions are parallel."
        ),
    ] = None,
    data: TaskData = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Instead of a task: a folder of parallel files, a language each, such as sw.txt."),
    ] = None,
    languages: Annotated[str | None, typer.Option(help="Comma-separated codes, en among them; all by default.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Texts per language.")] = 100,
    output: Output = None,
    published: Annotated[
        list[str] | None,
        typer.Option(
            help="mindmerger=CHECKPOINT or langbridge=FOLDER, over --encoder and --llm: a baseline's; may be repeated."
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The models' encoder, where it has moved, and that of --published.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="The models' LLM, likewise.")] = None,
    encoder_tokenizer: Annotated[
        str | None, typer.Option(help="--published: where the encoder's tokenizer is, if not with it.")
    ] = None,
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two texts whose tokens are compared; by default the shortest pair of the analysed ones."),
    ] = None,
    pair_languages: Annotated[
        str | None, typer.Option(help="Theirs; by default zh,en, or the first language that there is and en.")
    ] = None,
    pair_layers: Annotated[
        str | None, typer.Option(help="The encoder's layers, such as 1,12,24; by default first, middle and last.")
    ] = None,
    *,
    running: Running,
) -> None:
    """The paper's figures of one or several models, as images, CSV and one HTML page: languages side by side in the states, tokens of
    two texts, the weight of the cross-attention, the aligner's weights.
    """
    require("matplotlib", "rich")
    from layalign.analysis.run import analyze
    from layalign.analysis.tokens import TokenPair
    from layalign.evaluation.settings import GenerationSettings
    from layalign.systems import LLM, PublishedBaseline, System, system_at

    if texts is not None:
        refuse({"--task": task, "--data": data}, "questions of a task, not with --texts")
    settings = GenerationSettings(**running.given())
    if encoder_tokenizer is not None and not published:
        raise ValueError("--encoder-tokenizer goes with --published; a LayAlign model has its own")
    names, places = _named(models or ())
    systems: list[System] = [system_at(place, settings, encoder, llm) for place in places]
    for words in published or ():
        kind, _, checkpoint = words.partition("=")
        if not checkpoint:
            raise ValueError(f"--published: got {words!r}, takes mindmerger=CHECKPOINT or langbridge=FOLDER")
        systems.append(
            PublishedBaseline(
                kind=kind,
                checkpoint=checkpoint,
                encoder=encoder,
                llm=llm,
                encoder_tokenizer=encoder_tokenizer,
                settings=settings,
            )
        )
    if systems and all(isinstance(system, LLM) for system in systems):
        given = {"--encoder": encoder, "--llm": llm, "--prompt": running.prompt, "--prompt-file": running.prompt_file}
        refuse(given, "a LayAlign model or --published; of an LLM alone the texts are read as they are")
    layers = listed(pair_layers, "--pair-layers")
    if layers is not None and not all(layer.isdecimal() for layer in layers):
        raise ValueError(f"--pair-layers: got {pair_layers!r}, takes numbers parted by commas")
    if any(names):
        called = [name or system.name for name, system in zip_longest(names, systems)]
        if twice := [name for name in called if called.count(name) > 1]:
            raise ValueError(f"models: two are called {twice[0]}; NAME=FOLDER gives a name of its own to each")
    analyze(
        dict(zip(called, systems, strict=True)) if any(names) else systems,
        task or "mgsm",
        data=data,
        texts=texts,
        languages=listed(languages, "--languages"),
        limit=limit,
        output=output,
        pair=TokenPair(
            texts=pair,
            languages=listed(pair_languages, "--pair-languages"),
            layers=None if layers is None else [int(layer) for layer in layers],
        ),
    )


def _named(models: Iterable[str]) -> tuple[list[str | None], list[str]]:
    """Names and places of words PLACE and NAME=PLACE."""
    names: list[str | None] = []
    places = []
    for word in models:
        name, sign, place = word.partition("=")
        named = bool(sign and name and place) and not Path(word).exists()
        names.append(name if named else None)
        places.append(place if named else word)
    return names, places
