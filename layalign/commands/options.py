"""What the commands of the command line have in common: options, and how they are read."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from layalign.spelling import long_dtype

Model = Annotated[str, typer.Argument(help="Folder or hub name of a LayAlign model.")]
Texts = Annotated[
    list[str] | None, typer.Argument(help="Questions; left out, they are read from --file or standard input.")
]
TaskData = Annotated[Path | None, typer.Option(help="Folder with the task's files; left out, a datasets name is used.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where results go.")]
Encoder = Annotated[str | None, typer.Option(help="The model's encoder, where it is no longer where the model says.")]
OwnLLM = Annotated[str | None, typer.Option("--llm", help="The model's LLM, likewise.")]


def require(*packages: str) -> None:
    """Before work that ends with them; `main` says how to install the first that is missing.

    Raises:
        ModuleNotFoundError: one is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def refuse(options: dict[str, Any], where: str) -> None:
    """Refuse options that go with others only.

    Args:
        options: {name: value as given}.
        where: what they go with.

    Raises:
        ValueError: one has a value.
    """
    if given := [name for name, value in options.items() if value is not None and value is not False and value != []]:
        raise ValueError(f"{', '.join(given)} goes with {where}")


def listed(values: str | Sequence[str] | None, name: str) -> list[str] | None:
    """Words parted by commas, with spaces or without; None where there are none. A file's name may have a comma.

    Args:
        values: as given, once or several times.
        name: of the option.

    Raises:
        ValueError: an empty word.
    """
    if not values:
        return None
    found: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        found += [value] if Path(value).exists() else [word.strip() for word in value.split(",")]
    if "" in found:
        raise ValueError(f"{name}: got {values!r}, takes names parted by commas")
    return found


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a command runs a model: an option for each field."""

    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Texts at a time: 16, and 64 with --engine vllm. It changes answers only as bf16 and fp16 round.",
        ),
    ] = None
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
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 (bf16), float16 (fp16) or float32 (fp32); as stored by default.")
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU where there is one.")] = None
    devices: Annotated[
        str | None,
        typer.Option(help="Instead of one device the LLM's layers on all: auto, balanced, balanced_low_0, sequential."),
    ] = None

    def given(self, batch_size: int = 16) -> dict[str, Any]:
        """Those that have a value: a journal of a job without them stays the same job's.

        Args:
            batch_size: where the command line says none.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["batch_size"] = self.batch_size or batch_size
        values["dtype"] = long_dtype(self.dtype)
        file = values.pop("prompt_file")
        if file is not None:
            from layalign.prompts import read_prompt

            if self.prompt is not None:
                raise ValueError("--prompt, --prompt-file: give one of them")
            values["prompt"] = read_prompt(file)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, an option for each field; greedily by default."""

    temperature: Annotated[float | None, typer.Option(min=0, help="Sample, flatter above 1; 0: greedily.")] = None
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample among tokens of this probability in all.")
    ] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among so many tokens.")] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampling; the same answers again, 0 by default.")] = None
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beam search with so many beams.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None

    def given(self) -> dict[str, Any]:
        """Arguments of transformers' generate, and the seed.

        Raises:
            ValueError: a seed without sampling, or sampling that is switched off and on.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if value is not None}
        sampling = {"temperature", "top_p", "top_k"} & values.keys()
        if self.temperature == 0:
            if len(sampling) > 1:
                raise ValueError(
                    f"--temperature 0 is greedy, {', '.join(sorted(sampling - {'temperature'}))} samples: give one"
                )
            values.pop("temperature")
            sampling = set()
        if "seed" in values and not sampling:
            raise ValueError("--seed goes with --temperature, --top-p or --top-k")
        return {"do_sample": True, "seed": 0, **values} if sampling else values


_GROUPS: dict[str, type] = {"sampling": Sampling, "running": Running}


def runs_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with the options of Running, and of Sampling, in place of its parameters `running` and `sampling`."""
    given = inspect.signature(command).parameters
    groups = {name: group for name, group in _GROUPS.items() if name in given}

    def spread(**options: Any) -> None:
        made = {
            name: group(**{field.name: options.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**options, **made)

    own = [parameter for name, parameter in given.items() if name not in groups]
    added = [parameter for group in groups.values() for parameter in inspect.signature(group).parameters.values()]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *added)]
    wrapped: Any = functools.wraps(command)(spread)
    wrapped.__signature__ = inspect.Signature(parameters)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


class SeveralValues(typer.core.TyperCommand):
    """A command without arguments: a repeatable option takes all words up to the next option, and commas part them too."""

    def takes(self, word: str) -> bool:
        """Whether a further word is the option's."""
        return True

    def parted(self, word: str) -> list[str]:
        """The values that a word holds."""
        return word.split(",")

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
            elif word.startswith("-") or not self.takes(word):
                option = None
            spread += [word] if option is None else [part for value in self.parted(word) for part in (option, value)]
        return super().parse_args(ctx, spread)


class SeveralTasks(SeveralValues):
    """A command with a model as argument: --task takes words as long as they name tasks or files."""

    def takes(self, word: str) -> bool:
        """Whether it is a task, and not the model."""
        from layalign.tasks.registry import NAMES

        return Path(word).is_file() or all(name.strip() in NAMES for name in word.split(","))

    def parted(self, word: str) -> list[str]:
        """As they are: the command parts them."""
        return [word]
