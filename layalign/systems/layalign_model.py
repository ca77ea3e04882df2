"""A saved LayAlign model, baselines and ablations of it included, as a system."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layalign.generation.texts import Answerer
from layalign.loading import check_model_path, fingerprint, load_model
from layalign.prompts import DEFAULT_PROMPT
from layalign.source_languages import check_languages
from layalign.systems.system import System


@dataclass(frozen=True, kw_only=True)
class LayAlignModel(System):
    """A model that `save_pretrained` wrote.

    Attributes:
        model: its folder or hub name.
        encoder, llm: its bases, where they are not where it says; None: there.
    """

    model: str
    encoder: str | None = None
    llm: str | None = None

    @property
    def name(self) -> str:
        """The folder's."""
        return Path(os.path.abspath(self.model)).name

    def check(self, langs: Iterable[str] = ()) -> None:
        """See `System`; the encoder's tokenizer is asked for the languages, where it is told them."""
        from layalign import LayAlignProcessor

        check_model_path(self.model)
        check_languages(LayAlignProcessor.from_pretrained(self.model).encoder_tokenizer, langs)

    def fingerprint(self) -> dict[str, Any]:
        """See `System`."""
        return {"model": fingerprint(self.model)}

    def load(self, prompt: str | None = DEFAULT_PROMPT) -> Answerer:
        """See `System`; the system's own prompt is the processor's template."""
        model, processor = self._loaded
        return layalign_answerer(self, model, processor, prompt)

    @cached_property
    def _loaded(self) -> Any:
        placed = self.settings.dtype, self.settings.device, self.settings.devices
        return load_model(self.model, *placed, encoder=self.encoder, llm=self.llm)


def layalign_answerer(system: System, model: Any, processor: Any, prompt: str | None) -> Answerer:
    """The answerer of a LayAlign model as a system's settings say, with a prompt as `System.load` takes it."""
    settings = system.settings
    return Answerer(
        model,
        processor,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        prompt=prompt,
        encoder_max_length=settings.encoder_max_length,
        **system.generate,
    )
