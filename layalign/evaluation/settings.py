"""How a saved model is loaded and run, whatever is asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What an evaluation and an analysis of a saved model have in common.

    Attributes:
        batch_size: texts at a time, longest first; changes the speed, and answers only as bfloat16 and float16 round.
        max_new_tokens: of an answer; an analysis writes none.
        encoder_max_length: questions are cut to so many of the encoder's tokens; None: too long a one is refused.
        prompt: what the LLM reads, by name or as a template, see `layalign.prompts.chosen_prompt`.
        dtype: "float32", "bfloat16" or "float16"; None as stored.
        device: cpu, cuda, cuda:1, ...; None for a GPU where there is one.
        devices: instead of one device, how the LLM's layers are spread over all, see `layalign.spreading.spread_llm`.
    """

    batch_size: int = 16
    max_new_tokens: int = 512
    encoder_max_length: int | None = None
    prompt: str | None = "default"
    dtype: str | None = None
    device: str | None = None
    devices: str | None = None

    def __post_init__(self) -> None:
        if self.device is not None and self.devices is not None:
            raise ValueError(f"devices: got {self.devices!r} and device {self.device!r}, takes one of them")


DEFAULT_SETTINGS = GenerationSettings()
