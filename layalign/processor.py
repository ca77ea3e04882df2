"""LayAlignProcessor: two tokenizers, one call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import (
    AutoProcessor,
    BatchEncoding,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file

from layalign.arguments import NO_CODE, PLACE, SHARED, found_by, sorted_arguments
from layalign.configuration import LayAlignConfig
from layalign.folders import check_sealed, read_from
from layalign.loading import load_tokenizer
from layalign.prompts import checked_prompt, fill_prompts
from layalign.source_languages import source_code, takes_source_language

TOKENIZER_CONFIG = "tokenizer_config.json"
DEFAULT: Any = object()  # a prompt that was left out: None is one that says nothing
# Held while a tokenizer is told a language, which it keeps in itself: threads may call one processor.
_TELLING = threading.Lock()


class Row(NamedTuple):
    """Token ids of one example."""

    prompt: list[int]
    target: list[int]  # with end of sequence


class LayAlignProcessor(ProcessorMixin):
    """Turns questions, prompts and targets into the tensors that LayAlignForConditionalGeneration takes.

    Args:
        tokenizer: the LLM's tokenizer.
        encoder_tokenizer: the multilingual encoder's tokenizer.
        prompt_template: what the LLM reads beside the soft prompts, with `{text}` where the question goes and, if
            it names it, `{language}`; None: nothing.
        encoder_template: what the encoder reads, likewise; None: the question alone. LangBridge's encoders read the whole prompt.
    """

    attributes: ClassVar[list[str]] = ["tokenizer", "encoder_tokenizer"]
    tokenizer_class = "AutoTokenizer"
    encoder_tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase,
        prompt_template: str | None = None,
        encoder_template: str | None = None,
        **kwargs: Any,
    ):
        if prompt_template is not None:
            checked_prompt(prompt_template, "prompt_template")
        if encoder_template is not None:
            checked_prompt(encoder_template, "encoder_template")
        self.prompt_template, self.encoder_template = prompt_template, encoder_template
        super().__init__(tokenizer, encoder_tokenizer, **kwargs)

    def __call__(
        self,
        text: str | Sequence[str],
        prompt: str | Sequence[str] | None = DEFAULT,
        target: str | Sequence[str] | None = None,
        *,
        lang: str | Sequence[str] | None = None,
        max_length: int | None = None,
        encoder_max_length: int | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Tokenize a batch.

        Args:
            text: question or list of B questions, for the encoder.
            prompt: text or list of B texts for the LLM; None for no LLM text; left out: `prompt_template` filled with each question.
            target: text or list of B texts the LLM shall write; its end-of-sequence token is added.
            lang: the questions' language or one of each, by code ("sw", or the tokenizer's own, "swh_Latn"), for encoders that are
                told it (NLLB, M2M100, mBART); None: the tokenizer's `src_lang`. Others do not look at it.
            max_length, encoder_max_length: longest prompt + target and longest question, in tokens. A prompt that is too long loses
                its beginning; a target that alone is too long loses its end.
            padding_side: where input_ids are padded, "left" or "right"; it changes no result.
            return_tensors: "pt", torch's.

        Returns:
            BatchFeature: encoder_input_ids, encoder_attention_mask (B, T); input_ids, attention_mask (B, M) where there is a prompt or a
            target; labels (B, M), -100 on prompt and padding, where there is a target.

        Raises:
            ValueError: no text, lists of different lengths, a length below 1, or a language that the encoder's tokenizer does not know.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        for name, length in (("max_length", max_length), ("encoder_max_length", encoder_max_length)):
            if length is not None and length < 1:
                raise ValueError(f"{name} must be a positive number of tokens or None, got {length!r}")
        texts = _as_list("text", text)
        if not texts:
            raise ValueError("text is empty: give at least one question")
        languages = [lang] * len(texts) if isinstance(lang, str) else _as_list("lang", lang, len(texts))
        if prompt is DEFAULT:
            prompt = None if self.prompt_template is None else fill_prompts(self.prompt_template, texts, languages)
        prompts, targets = _as_list("prompt", prompt, len(texts)), _as_list("target", target, len(texts))
        read = texts if self.encoder_template is None else fill_prompts(self.encoder_template, texts, languages)
        encoded = self._encoded(read, languages, encoder_max_length)
        batch = {"encoder_input_ids": encoded["input_ids"], "encoder_attention_mask": encoded["attention_mask"]}
        if prompts is not None or targets is not None:
            rows = [_cut(row, max_length) for row in self.text_rows(prompts, targets)]
            batch |= self._pad(rows, targets is not None, padding_side)
        return BatchFeature(batch)

    def _encoded(self, texts: list[str], languages: list[str] | None, max_length: int | None) -> BatchEncoding:
        """The encoder's ids and mask, padded on the right; texts of a language together where the tokenizer is told it."""
        tokenizer = self.encoder_tokenizer
        limits = {"truncation": max_length is not None, "max_length": max_length}
        if languages is None or not takes_source_language(tokenizer):
            with _telling(tokenizer):
                return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", **limits)
        rows = self._by_language(texts, languages, limits)
        return tokenizer.pad({"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt")

    def _by_language(self, texts: Sequence[str], languages: Sequence[str], limits: dict[str, Any]) -> list[list[int]]:
        """The encoder's ids of each text; the tokenizer is told one language at a time."""
        tokenizer = self.encoder_tokenizer
        codes = [source_code(tokenizer, language) for language in languages]
        rows: list[Any] = [None] * len(texts)
        with _telling(tokenizer):
            before = tokenizer.src_lang
            try:
                for code in dict.fromkeys(codes):
                    places = [place for place, other in enumerate(codes) if other == code]
                    tokenizer.src_lang = code
                    found = tokenizer([texts[place] for place in places], **limits)["input_ids"]
                    for place, ids in zip(places, found, strict=True):
                        rows[place] = ids
            finally:
                tokenizer.src_lang = before
        return rows

    def encoder_rows(
        self, text: Sequence[str], lang: Sequence[str] | None = None, max_length: int | None = None
    ) -> list[list[int]]:
        """What the encoder reads of each text, without padding: the ids of a call's encoder_input_ids.

        Args:
            text, lang: texts and the language of each, as in a call.
            max_length: the longest row, in tokens; None: any length.

        Raises:
            ValueError: a language that the encoder's tokenizer does not know.
        """
        read = list(text) if self.encoder_template is None else fill_prompts(self.encoder_template, text, lang)
        limits = {"truncation": max_length is not None, "max_length": max_length}
        if lang is None or not takes_source_language(self.encoder_tokenizer):
            with _telling(self.encoder_tokenizer):
                return self.encoder_tokenizer(read, **limits)["input_ids"]
        return self._by_language(read, lang, limits)

    def text_rows(self, prompt: Sequence[str] | None, target: Sequence[str] | None) -> list[Row]:
        """What the LLM reads and writes, without padding and uncut; one of the two may be left out.

        Args:
            prompt, target: a text each; the target gets its end of sequence.
        """
        prompts, targets = self._ids(prompt), self._ids(target)
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if targets is None:
            return [Row(ids, []) for ids in prompts or ()]
        targets = [ids + end for ids in targets]
        return [Row(*pair) for pair in zip(prompts or [[] for _ in targets], targets, strict=True)]

    def _ids(self, texts: Sequence[str] | None) -> list[list[int]] | None:
        return None if texts is None else self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _pad(self, rows: list[Row], with_labels: bool, side: str) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(target) for prompt, target in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), pad if pad is not None else self.tokenizer.eos_token_id or 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        for i, (prompt, target) in enumerate(rows):
            length = len(prompt) + len(target)
            first = width - length if side == "left" else 0
            ids[i, first : first + length] = torch.tensor(prompt + target, dtype=torch.long)
            mask[i, first : first + length] = 1
            labels[i, first + len(prompt) : first + length] = torch.tensor(target, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if with_labels else {})

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The LLM tokenizer's batch_decode."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The LLM tokenizer's decode."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What a call makes."""
        return ["encoder_input_ids", "encoder_attention_mask", "input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> LayAlignProcessor:
        """Load what `save_pretrained` wrote; arguments as in transformers.

        Raises:
            ValueError: no processor at `path`, or one of its two tokenizers alone.
        """
        try:
            finds = {name: kwargs[name] for name in (*SHARED, *PLACE) if name in kwargs}
            inside = "/".join(part for part in (finds.pop("subfolder", None), "encoder_tokenizer") if part)
            # Where it is missing, transformers gives the LLM's in its place and only logs it.
            cached_file(str(path), TOKENIZER_CONFIG, subfolder=inside, **finds)
            check_sealed(path, weights=False)
            with read_from(path, "processor"):
                return super().from_pretrained(str(path), **NO_CODE | kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} holds no processor (a folder or hub name with both tokenizers): {error}"
            ) from error

    @classmethod
    def from_bases(
        cls, encoder: str | Path | None, llm: str | Path, prompt_template: str | None = None, **kwargs: Any
    ) -> LayAlignProcessor:
        """The processor of two bases.

        Args:
            encoder, llm: names, folders or `layalign:NAME`. Without an encoder, for an LLM alone, the LLM's tokenizer stands for its too:
                what it makes of a question is not read.
            prompt_template: see LayAlignProcessor.
            kwargs: what finds the bases, as `LayAlignForConditionalGeneration.from_bases` takes it (token, cache_dir, ...,
                encoder_kwargs, llm_kwargs).

        Raises:
            ValueError: an argument that is none of these.
        """
        given = sorted_arguments("from_bases", kwargs, (), own_files=False)
        of_llm = found_by(given.llm)
        tokenizer = load_tokenizer("llm", llm, of_llm)
        finds = of_llm if encoder is None else found_by(given.encoder)
        of_encoder = load_tokenizer("encoder", llm if encoder is None else encoder, finds)
        if of_encoder.pad_token is None:  # of a decoder-only one; the mask hides what is padded
            of_encoder.pad_token = of_encoder.eos_token
        return cls(tokenizer, of_encoder, prompt_template)


def _telling(tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Any]:
    """What a call of an encoder's tokenizer is made under."""
    return _TELLING if takes_source_language(tokenizer) else nullcontext()


def _cut(row: Row, max_length: int | None) -> Row:
    """One example, cut to max_length: its prompt from the beginning, then its target from the end."""
    if max_length is None:
        return row
    target = row.target[:max_length]
    room = max_length - len(target)
    return Row(row.prompt[-room:] if room else [], target)


def _as_list(name: str, value: Any, count: int | None = None) -> list[str] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{name} must be a text or a list of texts, got {type(value).__name__}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} has {len(values)} texts for {count} questions; one each is needed")
    return values


AutoProcessor.register(LayAlignConfig, LayAlignProcessor)
