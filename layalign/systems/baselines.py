"""MindMerger's and LangBridge's published checkpoints as systems, read in their own layouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layalign.generation.texts import Answerer
from layalign.loading import torch_device, torch_dtype
from layalign.prompts import DEFAULT_PROMPT, chosen_prompt
from layalign.published_baselines import KINDS, LANGBRIDGE, load_published, published_processor
from layalign.source_languages import check_languages
from layalign.spreading import spread
from layalign.systems.folders import causal_config, check_place, fingerprint
from layalign.systems.layalign_model import layalign_answerer
from layalign.systems.system import System


@dataclass(frozen=True, kw_only=True)
class PublishedBaseline(System):
    """A published checkpoint of a baseline; see `layalign.published_baselines.load_published` for its arguments.

    Attributes:
        kind: "mindmerger" or "langbridge".
        checkpoint: MindMerger's pytorch_model.bin or LangBridge's folder.
        encoder, llm: its bases; LangBridge's checkpoints name them too.
        encoder_tokenizer: where the encoder's tokenizer is, if not with the encoder.
    """

    kind: str
    checkpoint: str
    encoder: str | None = None
    llm: str | None = None
    encoder_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, takes {' or '.join(map(repr, KINDS))}")
        if self.kind != LANGBRIDGE and (self.encoder is None or self.llm is None):
            raise ValueError(f"{self.kind}: its checkpoint holds no base, give encoder and llm")

    @property
    def name(self) -> str:
        """Its kind, and the name of its folder or file's folder."""
        path = Path(self.checkpoint)
        return f"{self.kind} ({path.parent.name if path.is_file() else path.name})"

    def check(self, langs: Iterable[str] = ()) -> None:
        """See `System`."""
        if not Path(self.checkpoint).exists():
            raise ValueError(f"checkpoint: {self.checkpoint}: no such file or folder")
        if self.encoder is not None:
            check_place("encoder", self.encoder)
        if self.llm is not None:
            causal_config("llm", self.llm)
        check_languages(self._processor(None).encoder_tokenizer, langs)

    def fingerprint(self) -> dict[str, Any]:
        """See `System`."""
        places = {name: getattr(self, name) for name in ("checkpoint", "encoder", "llm", "encoder_tokenizer")}
        return {"kind": self.kind} | {name: fingerprint(place) for name, place in places.items() if place is not None}

    def load(self, prompt: str | None = DEFAULT_PROMPT) -> Answerer:
        """See `System`. The prompt is what MindMerger's LLM and what LangBridge's encoder reads; the system's own: the question."""
        own = None if self.kind == LANGBRIDGE else "{text}"
        template = chosen_prompt(prompt, own, self._processor(None).tokenizer)
        return layalign_answerer(self, self._model, self._processor(template), DEFAULT_PROMPT)

    def _processor(self, prompt: str | None) -> Any:
        return published_processor(
            self.kind, self.checkpoint, self.encoder, self.llm, encoder_tokenizer=self.encoder_tokenizer, prompt=prompt
        )

    @cached_property
    def _model(self) -> Any:
        device, dtype = torch_device(self.settings.device), torch_dtype(self.settings.dtype)
        model = load_published(self.kind, self.checkpoint, self.encoder, self.llm, dtype=dtype)
        for _, parameter in model.trained_parameters():
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
        return model.to(device) if self.settings.devices is None else spread(model, self.settings.devices)
