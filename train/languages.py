"""Codes and English names of the languages in the paper's training and evaluation data."""

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


def language_code(language):
    """Code of a language given by code or English name ("Swahili" -> "sw"); anything unknown comes back in lower
    case.
    """
    language = language.strip().lower()
    return _CODES.get(language, language)


def language_name(code):
    """English name of a language code, as prompts use it ("sw" -> "Swahili").

    Raises:
        ValueError: no name is known for the code.
    """
    if code not in NAMES:
        raise ValueError(f"no English name known for language {code!r}; known codes: {', '.join(NAMES)}")
    return NAMES[code]
