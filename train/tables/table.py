"""The tables as files: their rows, what is published of each, and the settings that make it."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from layalign.evaluation.report import AVERAGES
from layalign.languages import NAMES
from layalign.train.recipe import SHIPPED
from layalign.train.settings import CONFIG, Count, Settings, build, read_yaml

FOLDER = Path(__file__).parent
# Columns beside averages and languages: numbers of parameters, in millions, and what a row is made of, in words.
COUNTED = ("encoder_millions", "adapter_millions", "aligner_millions", "trained_millions")
WORDS = ("backbone", "training_data", "source")
OWN = "LayAlign"
COLUMNS = (*AVERAGES, *NAMES, *COUNTED, *WORDS)


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Part(Settings):
    """One of the blocks that a table consists of: the same rows for a further task or other data."""

    name: str
    """Its heading in the paper."""
    task: Literal["mgsm", "msvamp", "xcsqa", "xnli"]
    """What is measured on, by the task's published scorer."""
    recipe: str
    """The shipped recipe that rows are settings over, and the name by which another takes its place."""
    columns: list[str]
    """Averages ("avg", ...), codes of languages, COUNTED and WORDS, in the paper's order."""

    def __post_init__(self) -> None:
        if unknown := [column for column in self.columns if column not in COLUMNS]:
            raise ValueError(f"columns: {unknown[0]!r} is no average, language or other column that there is")

    @property
    def is_asked(self) -> bool:
        """Whether a column takes answers, and is not counted or said of what a row is made of."""
        return any(column not in (*COUNTED, *WORDS) for column in self.columns)


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Row(Settings):
    """A row: what is published, and how it is made."""

    name: str
    """As the paper has it."""
    published: dict[str, list[float | str]]
    """{part: a figure a column}."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe that differ in this row; mappings are merged."""
    stages: Annotated[list[Literal["translation", "task"]], Field(min_length=1)] | None = None
    """The recipe's stages that remain; None: all."""
    recipe: str | None = None
    """In place of the parts' recipes."""
    states: Literal["first third", "middle third", "last third"] | None = None
    """Of the states that LayAlign mixes, those that this row does."""
    adapter_widening: Count | None = None
    """`adapter_width` in widths of the encoder's states."""
    aligner_widening: Count | None = None
    """`aligner_width` likewise."""
    system: Literal["trained", "llm", "translate"] = "trained"
    """Who is asked: what was trained, an LLM alone, or an LLM after a translator."""
    llm: str | None = None
    """Of "llm": which; None: the recipe's."""
    translator: str | None = None
    """Of "translate"."""

    def __post_init__(self) -> None:
        if (self.translator is not None) != (self.system == "translate"):
            raise ValueError(f"translator: goes with system translate, which needs one; system is {self.system}")
        if self.llm is not None and self.system != "llm":
            raise ValueError(f"llm: goes with system llm; system is {self.system}")

    @property
    def is_the_recipe(self) -> bool:
        """Whether it is the recipe as it is, which others differ from."""
        return self == Row(name=self.name, published=self.published)


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Table(Settings):
    """A table of the paper."""

    number: Count
    title: str
    section: str
    """Of the paper, which speaks of it."""
    parts: Annotated[list[Part], Field(min_length=1)]
    rows: Annotated[list[Row], Field(min_length=1)]

    def __post_init__(self) -> None:
        parts = {part.name: part for part in self.parts}
        for row in self.rows:
            for name, figures in row.published.items():
                if name not in parts:
                    raise ValueError(f"rows: {row.name}: no part is called {name!r}; there are {', '.join(parts)}")
                if len(figures) != len(parts[name].columns):
                    raise ValueError(
                        f"rows: {row.name}: {len(figures)} figures in {name}, which has {len(parts[name].columns)} columns"
                    )
        for recipe in self.recipes:
            if not (SHIPPED / f"{recipe}.yaml").is_file():
                raise ValueError(f"recipe: none that is shipped is called {recipe!r}")

    @property
    def recipes(self) -> list[str]:
        """The recipes that its rows are settings over."""
        return list(dict.fromkeys(row.recipe or part.recipe for row in self.rows for part in self.parts_of(row)))

    @property
    def bases(self) -> list[str]:
        """The encoders, LLMs and translators that its rows name."""
        named = ((row.settings.get("encoder"), row.llm, row.translator) for row in self.rows)
        return sorted({name for names in named for name in names if name is not None})

    @property
    def reference(self) -> str | None:
        """The row that others are compared with: the recipe as it is, else the one called LayAlign; None: there is neither."""
        found = [row.name for row in self.rows if row.is_the_recipe]
        return next(iter(found + [row.name for row in self.rows if row.name == OWN]), None)

    def parts_of(self, row: Row) -> list[Part]:
        """The parts that a row stands in."""
        return [part for part in self.parts if part.name in row.published]


def table_numbers() -> list[int]:
    """The numbers of the tables that there are."""
    return sorted(int(file.stem) for file in FOLDER.glob("[0-9][0-9].yaml"))


def load_table(number: int) -> Table:
    """A table by its number in the paper.

    Raises:
        ValueError: there is none, or its file is wrong.
    """
    file = FOLDER / f"{number:02}.yaml"
    if not file.is_file():
        numbers = table_numbers()
        raise ValueError(
            f"table: got {number}, takes {numbers[0]} to {numbers[-1]}; `layalign table --list` names them"
        )
    try:
        return build(Table, {"number": number, **read_yaml(file.read_text(encoding="utf-8"))})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
