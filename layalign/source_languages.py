"""The source language of encoders that are told it: NLLB, M2M100 and mBART put a token for it beside the text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from layalign.languages import FLORES200, language_code

_TOKEN = re.compile(r"[a-z]{2,3}(_[A-Z][A-Za-z]{1,3})?|__([a-z]{2,3})__")


def takes_source_language(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a source language beside its texts."""
    return isinstance(getattr(type(tokenizer), "src_lang", None), property)


def source_codes(tokenizer: Any) -> list[str]:
    """The codes that a tokenizer's `src_lang` takes, sorted."""
    if known := getattr(tokenizer, "lang_code_to_id", None):
        return sorted(known)
    return sorted(token for token in tokenizer.all_special_tokens if "_" in token and _TOKEN.fullmatch(token))


def source_code(tokenizer: Any, lang: str) -> str:
    """The tokenizer's code of a language.

    Args:
        tokenizer: one that takes a source language.
        lang: a two-letter code or English name of `layalign.languages` ("sw", "Swahili"), or the tokenizer's own code
            ("swh_Latn"), in any case: records hold codes in lower case.

    Raises:
        ValueError: it knows no such language.
    """
    codes = source_codes(tokenizer)
    if lang in codes:
        return lang
    code = language_code(lang)
    if code in codes:
        return code
    if FLORES200.get(code) in codes:
        return FLORES200[code]
    if alike := [known for known in codes if known.lower() == lang.strip().lower()]:
        return alike[0]
    beginning = [known for known in codes if known.startswith(f"{code}_")]
    if len(beginning) == 1:
        return beginning[0]
    shown = ", ".join(codes[:12]) + (f" and {len(codes) - 12} more" if len(codes) > 12 else "")
    raise ValueError(f"lang: {lang!r} is no language of this encoder's {type(tokenizer).__name__}, which has {shown}")


def check_languages(tokenizer: Any, langs: Iterable[str]) -> None:
    """Pass languages that a tokenizer knows; any, where it is not told them.

    Raises:
        ValueError: as `source_code`.
    """
    if takes_source_language(tokenizer):
        for lang in langs:
            source_code(tokenizer, lang)
