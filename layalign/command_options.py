"""What the commands of the command line have in common: options, and how they are read."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

Model = Annotated[str, typer.Argument(help="Folder or hub name of a LayAlign model.")]
Texts = Annotated[
    list[str] | None, typer.Argument(help="Questions; left out, they are read from --file or standard input.")
]
TaskData = Annotated[Path | None, typer.Option(help="Folder with the task's files; left out, a datasets name is used.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where results go.")]


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a command runs a model: an option for each field."""

    batch_size: Annotated[int, typer.Option(min=1)] = 16
    encoder_max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Cut questions to so many of the encoder's tokens; else too long a one is refused."),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the LLM reads: default (the model's own), none, chat (its chat template), task (a task's published one), "
            "math, xcsqa, xnli, or a text with {text}."
        ),
    ] = None
    prompt_file: Annotated[Path | None, typer.Option(help="A file with such a text.")] = None
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored by default.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")] = None
    devices: Annotated[
        str | None,
        typer.Option(help="Instead of one device the LLM's layers on all: auto, balanced, balanced_low_0, sequential."),
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that have a value: a journal of a job without them stays the same job's."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        file = values.pop("prompt_file")
        if file is not None:
            from layalign.prompts import read_prompt

            if self.prompt is not None:
                raise ValueError("--prompt, --prompt-file: give one of them")
            values["prompt"] = read_prompt(file)
        return {name: value for name, value in values.items() if value is not None}


def runs_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with the options of Running in place of its parameter `running`."""
    names = [field.name for field in fields(Running)]

    def spread(**options: Any) -> None:
        running = Running(**{name: options.pop(name) for name in names})
        command(**options, running=running)

    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "running"]
    added = inspect.signature(Running).parameters.values()
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *added)]
    wrapped: Any = functools.wraps(command)(spread)
    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


class SeveralValues(typer.core.TyperCommand):
    """A command without arguments: a repeatable option takes all words up to the next option, and commas part them too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words as click takes them: the option's name before each of its values."""
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        option, words = None, iter(args)
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
