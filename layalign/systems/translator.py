"""Translation by any encoder-decoder of transformers, told the languages in the way it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from layalign.generation.batches import longest_first
from layalign.generation.logits import watched
from layalign.generation.texts import GREEDY
from layalign.languages import language_code, language_name
from layalign.limits import position_limit
from layalign.loading import load_checked, load_tokenizer, resolve
from layalign.source_languages import source_code, takes_source_language
from layalign.systems.folders import seq2seq_config

LANGUAGE = "{language}"


class Translator:
    """Translates texts into one language.

    Args:
        model: an encoder-decoder.
        tokenizer: its tokenizer; one that knows languages (NLLB, M2M100, mBART) is told them.
        target: the language translated into, a code or English name.
        prefix: put before every text, for models that are told their work in words (T5) or by a first token (Marian); {language}
            in it stands for the English name of the text's language.
        batch_size: texts at a time.
        max_new_tokens: of a translation.
        num_beams: 1 for greedy search.

    Raises:
        ValueError: a target that the tokenizer does not know.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target: str = "en",
        *,
        prefix: str = "",
        batch_size: int = 16,
        max_new_tokens: int = 256,
        num_beams: int = 1,
    ):
        self.model, self.tokenizer, self.prefix, self.batch_size = model, tokenizer, prefix, batch_size
        self.by_language = takes_source_language(tokenizer)
        self._limit = position_limit(model.get_encoder())
        self._arguments = {**GREEDY, "max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self._target = target_token(tokenizer, target) if self.by_language else None
        if self.by_language:
            # The first mBART begins with the language; its successors begin as others do, and the language comes second.
            first = type(tokenizer).__name__.startswith("MBartTokenizer")
            self._arguments["decoder_start_token_id" if first else "forced_bos_token_id"] = self._target

    @classmethod
    def load(cls, path: str, dtype: torch.dtype | None, device: torch.device, **settings: Any) -> Translator:
        """The translator in a folder or of a hub name.

        Raises:
            ValueError: there is none.
        """
        seq2seq_config("translator", path)
        tokenizer = load_tokenizer("translator", path)
        model = load_checked(AutoModelForSeq2SeqLM, resolve(path), "translator", dtype)
        return cls(model.to(device).eval(), tokenizer, **settings)

    def __call__(self, texts: Sequence[str], langs: Sequence[str] | None = None) -> list[str]:
        """The translations, in the order of the texts.

        Args:
            texts: one str each.
            langs: the language of each; needed by a tokenizer that is told them.

        Raises:
            ValueError: no languages for such a tokenizer, one it does not know, or a text longer than the encoder reads.
        """
        if langs is None and (self.by_language or LANGUAGE in self.prefix):
            raise ValueError(f"langs: got none, but {type(self.tokenizer).__name__} is told the language of each text")
        if langs is not None and LANGUAGE in self.prefix:
            names = [language_name(language_code(lang)) for lang in langs]
            texts = [self.prefix.replace(LANGUAGE, name) + text for name, text in zip(names, texts, strict=True)]
        else:
            texts = [self.prefix + text for text in texts]
        codes = (
            [source_code(self.tokenizer, lang) for lang in langs] if self.by_language and langs else [None] * len(texts)
        )
        found = [""] * len(texts)
        for code in dict.fromkeys(codes):
            places = [place for place, other in enumerate(codes) if other == code]
            for batch in longest_first([len(texts[place]) for place in places], self.batch_size):
                rows = [places[index] for index in batch]
                translated = self._translate([texts[row] for row in rows], code)
                for row, translation in zip(rows, translated, strict=True):
                    found[row] = translation.strip()
        return found

    def _translate(self, texts: list[str], code: str | None) -> list[str]:
        """Of one batch in one language."""
        before = self.tokenizer.src_lang if self.by_language else None
        try:
            if self.by_language:
                self.tokenizer.src_lang = code
            batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", verbose=False)
        finally:
            if self.by_language:
                self.tokenizer.src_lang = before
        length = batch["input_ids"].shape[1]
        if self._limit is not None and length > self._limit:
            raise ValueError(
                f"a text of {length} tokens is too long for the translator, which reads {self._limit}: {texts[0][:60]!r}"
            )
        wanted = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = watched(self.model, **wanted, **self._arguments)
        # Not every tokenizer counts its languages among the special tokens.
        written = [[token for token in row if token != self._target] for row in ids.tolist()]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)


def target_token(tokenizer: Any, lang: str) -> int:
    """The token that makes an encoder-decoder write in a language.

    Raises:
        ValueError: the tokenizer knows no such language.
    """
    code = source_code(tokenizer, lang)
    if hasattr(tokenizer, "get_lang_id"):  # M2M100, whose codes are not its tokens
        return tokenizer.get_lang_id(code)
    return tokenizer.convert_tokens_to_ids(code)
