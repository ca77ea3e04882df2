"""LayAlignProcessor: two tokenizers, one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from layalign.configuration import LayAlignConfig
from layalign.loading import resolve
from layalign.prompts import checked_prompt, fill_prompts
from layalign.source_languages import source_code, takes_source_language

DEFAULT: Any = object()  # a prompt that was left out: None is one that says nothing


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
            ValueError: no text, lists of different lengths, or a language that the encoder's tokenizer does not know.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
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
            rows = [self._row(i, prompts, targets, max_length) for i in range(len(texts))]
            batch |= self._pad(rows, targets is not None, padding_side)
        return BatchFeature(batch)

    def _encoded(self, texts: list[str], languages: list[str] | None, max_length: int | None) -> BatchEncoding:
        """The encoder's ids and mask, padded on the right; texts of a language together where the tokenizer is told it."""
        tokenizer = self.encoder_tokenizer
        limits = {"truncation": max_length is not None, "max_length": max_length}
        if languages is None or not takes_source_language(tokenizer):
            return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", **limits)
        codes = [source_code(tokenizer, language) for language in languages]
        rows: list[Any] = [None] * len(texts)
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
        return tokenizer.pad({"input_ids": rows}, padding=True, padding_side="right", return_tensors="pt")

    def _row(self, index: int, prompts: list[str] | None, targets: list[str] | None, max_length: int | None) -> Row:
        """One example, cut to max_length."""
        prompt = [] if prompts is None else self.tokenizer(prompts[index], add_special_tokens=False)["input_ids"]
        target = []
        if targets is not None:
            target = self.tokenizer(targets[index], add_special_tokens=False)["input_ids"]
            if self.tokenizer.eos_token_id is not None:
                target = [*target, self.tokenizer.eos_token_id]
        if max_length is not None:
            target = target[:max_length]
            room = max_length - len(target)
            prompt = prompt[-room:] if room else []
        return Row(prompt, target)

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
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: no processor at `path`.
        """
        try:
            return super().from_pretrained(str(path), **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} holds no processor (a folder or hub name with both tokenizers): {error}"
            ) from error

    @classmethod
    def from_bases(cls, encoder: str | Path, llm: str | Path, prompt_template: str | None = None) -> LayAlignProcessor:
        """The processor of two bases, given by name, folder or `layalign:NAME`."""
        tokenizer = AutoTokenizer.from_pretrained(resolve(llm))
        return cls(tokenizer, AutoTokenizer.from_pretrained(resolve(encoder)), prompt_template)


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
