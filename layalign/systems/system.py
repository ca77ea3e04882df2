"""What an evaluation asks of a system: its name, what tells its answers from others', and an answerer, loaded when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.generation.texts import BatchedAnswerer
from layalign.prompts import DEFAULT_PROMPT


@dataclass(frozen=True, kw_only=True)
class System(ABC):
    """A system, described by plain options. Making one loads nothing.

    Attributes:
        settings: how it is run. The device, the batch size and the dtype of what is loaded; `max_new_tokens` of an answer.
        generate: arguments of transformers' generate; greedy without them.
    """

    settings: GenerationSettings = DEFAULT_SETTINGS
    generate: Mapping[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in tables."""

    @abstractmethod
    def check(self, langs: Iterable[str] = ()) -> None:
        """Look at folders and files without loading a model.

        Args:
            langs: the languages of the questions to come.

        Raises:
            ValueError: a folder that holds no such model, a malformed file, or a language that it does not know.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change with what it would answer, `settings`, `generate` and the prompt of `load` apart."""

    @abstractmethod
    def load(self, prompt: str | None = DEFAULT_PROMPT) -> BatchedAnswerer:
        """The answerer. A second call, for another prompt, loads nothing again.

        Args:
            prompt: by name or as a template, see `layalign.prompts.chosen_prompt`; the system's own by default.

        Raises:
            ValueError: as `check`, and for a prompt that the system cannot take.
        """
