"""Translate, then answer: an encoder-decoder puts each question into the LLM's language, and the LLM alone answers it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layalign.languages import language_code
from layalign.loading import load_tokenizer, torch_device, torch_dtype
from layalign.prompts import DEFAULT_PROMPT
from layalign.source_languages import check_languages
from layalign.spelling import check_count
from layalign.systems.folders import fingerprint, seq2seq_config
from layalign.systems.llm import LLM, PromptedLLM
from layalign.systems.translator import Translator
from layalign.tasks.prompts import parts


@dataclass(frozen=True, kw_only=True)
class TranslateFirst(LLM):
    """A translator before an LLM. Questions that are in `target` already are not translated.

    Attributes:
        translator: folder or hub name of an encoder-decoder.
        target: the language that the LLM reads; its examples are those in this language.
        prefix: put before every text that is translated, "translate Swahili to English: " for instance; {language} in it stands
            for the English name of the text's language.
        translation_tokens: the most tokens of a translation.
        translation_beams: 1 for greedy search.
    """

    translator: str
    target: str = "en"
    prefix: str = ""
    translation_tokens: int = 256
    translation_beams: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("translation_tokens", "translation_beams"):
            check_count(name, getattr(self, name))

    @property
    def name(self) -> str:
        """Both folders'."""
        return f"{Path(self.translator).name} + {super().name}"

    def check(self, langs: Iterable[str] = ()) -> None:
        """See `System`; the translator's tokenizer is asked for the languages, where it is told them."""
        super().check([self.target])
        seq2seq_config("translator", self.translator)
        check_languages(load_tokenizer("translator", self.translator), (*langs, self.target))

    def fingerprint(self) -> dict[str, Any]:
        """See `System`."""
        settings = ("target", "prefix", "translation_tokens", "translation_beams")
        translator = {"translator": fingerprint(self.translator)} | {name: getattr(self, name) for name in settings}
        return super().fingerprint() | translator

    def load(self, prompt: str | None = DEFAULT_PROMPT) -> TranslatingLLM:
        """See `System`."""
        return TranslatingLLM(*self._loaded, translator=self._translator, target=self.target, **self.answering(prompt))

    @cached_property
    def _translator(self) -> Translator:
        settings = self.settings
        return Translator.load(
            self.translator,
            torch_dtype(settings.dtype),
            torch_device(settings.device),
            target=self.target,
            prefix=self.prefix,
            batch_size=settings.batch_size,
            max_new_tokens=self.translation_tokens,
            num_beams=self.translation_beams,
        )


class TranslatingLLM(PromptedLLM):
    """`PromptedLLM` on translations, which it keeps.

    Args:
        llm, tokenizer: the LLM and its tokenizer.
        translator: what translates.
        target: the language that it translates into.
        arguments: the others of `PromptedLLM`.
    """

    def __init__(self, llm: Any, tokenizer: Any, *, translator: Translator, target: str = "en", **arguments: Any):
        super().__init__(llm, tokenizer, **arguments)
        self.translator, self.target = translator, target
        self._kept: dict[tuple[str, str | None], str] = {}

    def check_languages(self, langs: Sequence[str] | None) -> None:
        """Of what the LLM reads: translations."""
        super().check_languages([self.target])

    def sequences(
        self, texts: Iterable[str], streamer: Any = None, langs: Sequence[str] | None = None
    ) -> list[list[str]]:
        """As for any answerer; languages are those of the texts, before translation."""
        texts = list(texts)
        self.check(texts)
        return super().sequences(self.translations(texts, langs), streamer, [self.target] * len(texts))

    def loglikelihoods(
        self, texts: Sequence[str], choices: Sequence[Sequence[str]], langs: Sequence[str] | None = None
    ) -> list[list[float]]:
        """As for any answerer, of choices as they are given: only texts are translated."""
        self.check(texts)
        return super().loglikelihoods(self.translations(texts, langs), choices, [self.target] * len(texts))

    def details(self, texts: Sequence[str], langs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """As for any answerer, and {"translation": what the LLM was given} of each text."""
        found = zip(super().details(texts, langs), self.translations(texts, langs), strict=True)
        return [said | {"translation": translation} for said, translation in found]

    def translations(self, texts: Sequence[str], langs: Sequence[str] | None = None) -> list[str]:
        """What the LLM reads for each text; each is translated once, a question with choices part by part, so that the LLM reads the
        published prompt. A part whose translation is empty is read as it is.

        Raises:
            ValueError: as for a `Translator`.
        """
        spoken: Sequence[str | None] = [None] * len(texts) if langs is None else langs
        taken = [parts(text) for text in texts]
        keys = [(part, lang) for pieces, lang in zip(taken, spoken, strict=True) for part in pieces[1::2]]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        same = language_code(self.target)
        self._kept |= {key: key[0] for key in new if key[1] is not None and language_code(key[1]) == same}
        if asked := [key for key in new if key not in self._kept]:
            codes = None if langs is None else [str(lang) for _, lang in asked]
            found = self.translator([part for part, _ in asked], codes)
            self._kept |= {key: translation or key[0] for key, translation in zip(asked, found, strict=True)}
        said = iter(keys)
        return [
            "".join(self._kept[next(said)] if place % 2 else piece for place, piece in enumerate(pieces))
            for pieces in taken
        ]
