"""Languages: codes, English names, the paper's orders and groups, and other spellings found in published folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

NAMES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "eu": "Basque",
    "fa": "Persian",
    "fr": "French",
    "gl": "Galician",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "ht": "Haitian Creole",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "mk": "Macedonian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "qu": "Quechua",
    "ru": "Russian",
    "sq": "Albanian",
    "sr": "Serbian",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
# FLORES-200 and NLLB call them so.
FLORES200 = {
    "ar": "arb_Arab",
    "bg": "bul_Cyrl",
    "bn": "ben_Beng",
    "ca": "cat_Latn",
    "cs": "ces_Latn",
    "de": "deu_Latn",
    "el": "ell_Grek",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "et": "est_Latn",
    "eu": "eus_Latn",
    "fa": "pes_Arab",
    "fr": "fra_Latn",
    "gl": "glg_Latn",
    "gu": "guj_Gujr",
    "he": "heb_Hebr",
    "hi": "hin_Deva",
    "hr": "hrv_Latn",
    "ht": "hat_Latn",
    "hu": "hun_Latn",
    "id": "ind_Latn",
    "it": "ita_Latn",
    "ja": "jpn_Jpan",
    "ko": "kor_Hang",
    "lt": "lit_Latn",
    "mk": "mkd_Cyrl",
    "nl": "nld_Latn",
    "pl": "pol_Latn",
    "pt": "por_Latn",
    "qu": "quy_Latn",
    "ru": "rus_Cyrl",
    "sq": "als_Latn",
    "sr": "srp_Cyrl",
    "sw": "swh_Latn",
    "ta": "tam_Taml",
    "te": "tel_Telu",
    "th": "tha_Thai",
    "tr": "tur_Latn",
    "uk": "ukr_Cyrl",
    "ur": "urd_Arab",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
# FLORES-101 leaves the script out and calls three otherwise.
FLORES101 = {code: name.split("_")[0] for code, name in FLORES200.items()} | {
    "ar": "ara",
    "fa": "fas",
    "zh": "zho_simpl",
}
# X-CSQA's files say Flemish and jap where others say Dutch and ja.
_CODES = {
    **{name.lower(): code for names in (NAMES, FLORES101, FLORES200) for code, name in names.items()},
    "flemish": "nl",
    "jap": "ja",
}

LOW_RESOURCE = ("bn", "th", "sw")
HIGH_RESOURCE = ("ja", "zh", "de", "fr", "ru", "es", "en")
# In the order of the paper's tables.
PAPER_LANGUAGES = LOW_RESOURCE + HIGH_RESOURCE
# MGSM has an eleventh, which the paper leaves out.
MATHEMATICS = (*PAPER_LANGUAGES, "te")

# {"avg", and where the paper has them "lrl" and "hrl": codes}; tables follow the order of "avg".
Groups = Mapping[str, tuple[str, ...]]
MATHEMATICS_GROUPS: Groups = {"avg": PAPER_LANGUAGES, "lrl": LOW_RESOURCE, "hrl": HIGH_RESOURCE}
# Table 12 of the paper.
XCSQA_GROUPS: Groups = {
    "avg": ("ur", "sw", "hi", "ar", "vi", "ja", "pl", "zh", "nl", "ru", "it", "de", "pt", "fr", "es", "en")
}
# Table 13 of the paper.
XNLI_GROUPS: Groups = {
    "avg": ("sw", "ur", "hi", "th", "ar", "tr", "el", "vi", "zh", "ru", "bg", "de", "fr", "es", "en")
}
# Out of English nothing is translated into English.
FLORES_GROUPS: Groups = {
    group: tuple(code for code in codes if code != "en") for group, codes in MATHEMATICS_GROUPS.items()
}
# All that XCOPA has; the paper does not report it.
XCOPA_GROUPS: Groups = {"avg": ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")}


def language_code(language: str) -> str:
    """Code of a language given by code, English name ("Swahili" -> "sw") or FLORES code ("swh_Latn", "swh" -> "sw");
    anything unknown comes back in lower case.
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
