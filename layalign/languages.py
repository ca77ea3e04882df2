"""Languages: codes, English names, the paper's order and groups, and other spellings found in published folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NAMES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sw": "Swahili",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
# X-CSQA's files say Flemish where the code is nl.
_CODES = {name.lower(): code for code, name in NAMES.items()} | {"flemish": "nl"}

LOW_RESOURCE = ("bn", "th", "sw")
HIGH_RESOURCE = ("ja", "zh", "de", "fr", "ru", "es", "en")
# In the order of the paper's tables.
PAPER_LANGUAGES = LOW_RESOURCE + HIGH_RESOURCE
# MGSM has an eleventh, which the paper leaves out.
MATHEMATICS = (*PAPER_LANGUAGES, "te")


def language_code(language: str) -> str:
    """Code of a language given by code or English name ("Swahili" -> "sw"); anything unknown comes back in lower
    case.
    """
    language = language.strip().lower()
    return _CODES.get(language, language)


def language_name(code: str) -> str:
    """English name of a language code, as prompts use it ("sw" -> "Swahili").

    Raises:
        ValueError: no name is known for the code.
    """
    if code not in NAMES:
        raise ValueError(f"no English name known for language {code!r}; known codes: {', '.join(NAMES)}")
    return NAMES[code]


def in_order(codes: Iterable[str], first: Sequence[str] = PAPER_LANGUAGES) -> list[str]:
    """`codes`, each once: those of `first` in its order, then the others sorted."""
    present = set(codes)
    return [code for code in first if code in present] + sorted(present.difference(first))
