"""Commands on models as such: what one is, and from one format to another."""

from pathlib import Path
from typing import Annotated

import typer

from layalign.commands.options import Model, refuse


def info(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What a model is: bases and whether they are found, settings, trained parameters, fingerprint; nothing is loaded."""
    from layalign.model_info import print_info

    print_info(model, as_json)


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
    from layalign.kernels.files import whole_folder
    from layalign.prompts import published_prompt

    if target.exists():  # before the work; `whole_folder` looks again after it
        raise ValueError(f"{target} exists already; choose another target, nothing is overwritten")
    if to_published:
        refuse(
            {"--compatible": compatible, "--task": task, "--prompt": prompt},
            "a published checkpoint, not with --to-published",
        )
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
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
